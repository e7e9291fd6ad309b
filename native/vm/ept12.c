/* See ept12.h. */
#include "vm/ept12.h"

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

struct guest_mapping ept12_mapping(const struct ept12 *ept, uint64_t page)
{
	uint64_t word = ept->mapping && page < ept->pages ? ept->mapping[page] : 0;

	return (struct guest_mapping){ .gfn = word & EPT12_MAPPED ? (uint32_t)word : (uint32_t)GUEST_NO_GFN,
				       .writable = (word & EPT12_WRITABLE) != 0 };
}

enum guest_agreement ept12_agreement(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page, uint32_t type)
{
	uint64_t gfn = entry->gfn + (page - entry->page), own = gfn + (uint64_t)entry->ept12_delta;
	const struct guest *g = vcpu->guest;
	const struct ept12s *s = vcpu->guests[0] ? vcpu->guests[0]->vmx.ept12s : NULL;
	struct guest_mapping now;

	if (!g || !g->vmx.nested || !g->vmx.ept12 || !s || entry->kind == KIND_LINEAR)
		return GUEST_AGREES;
	now = ept12_mapping(&s->ept[g->vmx.ept12], own);
	if (now.gfn == gfn && (type != ACCESS_WRITE || now.writable))
		return GUEST_AGREES;
	for (uint32_t i = 0; i < s->changes; i++)
		if (s->change[i].ept12 == g->vmx.ept12 && s->change[i].page == own && s->change[i].gfn == gfn)
			return GUEST_AGREED;
	return GUEST_CONTRADICTS;
}
