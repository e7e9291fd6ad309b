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

/* Return whether L1's entry for the page has the flags that an access sets, if the EPTP enables them.  Relaxed: the vCPU's own
 * thread has written the flags, as L1 or as KVM. */
static bool flags_set(const struct ept12s *s, const struct guest_vmx *l2, uint64_t page, uint32_t type)
{
	uint64_t flags = EPT12_ACCESSED | (type == ACCESS_WRITE ? EPT12_DIRTY : 0);

	for (uint32_t i = 0; l2->ept12_ad && i < s->cleans; i++) {
		const struct ept12_cleaned *c = &s->cleaned[i];

		if (c->ept12 == l2->ept12 && c->page == page)
			return (atomic_load_explicit(c->entry, memory_order_relaxed) & flags) == flags;
	}
	return true;
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
	if (now.gfn == gfn && (type != ACCESS_WRITE || now.writable) && flags_set(s, &g->vmx, own, type))
		return GUEST_AGREES;
	for (uint32_t i = 0; i < s->changes; i++)
		if (s->change[i].ept12 == g->vmx.ept12 && s->change[i].page == own && s->change[i].gfn == gfn)
			return GUEST_AGREED;
	return GUEST_CONTRADICTS;
}
