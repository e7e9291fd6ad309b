/* The fast path of a walk without EPT, which most misses of both levels take: the deepest table is cached, the SPTE is of
 * 4 KiB, no flag is to be set and no use to be judged.  As in walk_fast.c, only the order of replacement changes until it is
 * certain that the fast path applies. */
#include "walk/walk_shadow_fast.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/shadow_mmu.h"
#include "memory/frame.h"
#include "oracle/tracking.h"
#include "tlb/psc.h"
#include "tlb/tlb.h"
#include "tlb/tlb_fast.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"
#include "walk/walk_steps.h"

struct found {
	uint64_t spte;
	uint64_t gfn;
	uint32_t hfn;
	uint32_t right;
};

static const uint64_t wanted[ACCESS_TYPES] = {
	[ACCESS_READ] = SPTE_USER | SPTE_ACCESSED | SPTE_READABLE,
	[ACCESS_WRITE] = SPTE_USER | SPTE_ACCESSED | SPTE_WRITABLE | SPTE_DIRTY,
	[ACCESS_EXECUTE] = SPTE_USER | SPTE_ACCESSED | SPTE_EXECUTABLE,
};

/* Read the SPTE, its gfn and the frame's tag, in the order of walk_shadow(). */
static inline bool read_spte(struct walk *w, uint64_t page, uint32_t type, struct found *f)
{
	const struct frames *frames = w->m->frames;
	const struct psc_entry *link = psc_search_deepest(w->tlb, w->tlb->paged, page);
	const _Atomic uint64_t *sptep, *gfns;

	if (!link || link->vm != w->vcpu->vm || link->right >> 16 != w->life_bits >> 16 ||
	    link->hfn >= frames->pool[FRAME_GUEST].first)
		return false;
	gfns = shadowed_gfns(w->m, link->hfn);
	sptep = ept_table(w->m, link->hfn) + (page & 511);
	f->spte = atomic_load_explicit(sptep, memory_order_acquire);
	f->hfn = spte_hfn(f->spte);
	if ((f->spte & (wanted[type] | SPTE_GLOBAL)) != wanted[type] || f->hfn >= frames->count || !gfns ||
	    frame_tag(frames, link->hfn) != (link->right & FRAME_TAG_MASK) || frame_unlinked(frames, link->hfn))
		return false;
	f->gfn = atomic_load_explicit(&gfns[page & 511], memory_order_relaxed);
	f->right = (uint32_t)atomic_load_explicit(&frames->tag[f->hfn], memory_order_acquire) | w->life_bits;
	return atomic_load_explicit(sptep, memory_order_acquire) == f->spte &&
	       walk_leaf_permitted(frames, f->spte);
}

/* Return whether the guest's tables permit the translation, and KVM has promised nothing about it. */
static inline bool undoubted(const struct walk *w, uint64_t page, const struct found *f)
{
	const struct guest_page *gp;
	struct guest_mapping now;

	if (f->spte & SPTE_WRITABLE && writes_tracked(w->vm, f->gfn))
		return false;
	if (!w->guest->config.paging)
		return f->gfn == page;
	gp = guest_page_place(w->guest, page);
	if (!gp)
		return false;
	now = guest_mapping_of(gp);
	return now.gfn == f->gfn && (now.writable || !(f->spte & SPTE_WRITABLE));
}

bool walk_shadow_fast(struct walk *w, uint64_t page, uint32_t type, uint32_t *hfn)
{
	struct tlb *t = w->tlb;
	struct tlb_entry *e;
	struct place place;
	struct found f;

	if (t->l2.way_bits != TAGGED_WAY_BITS || t->absent[ABSENT_PAGED] != mapping_id(PAGE_4K, page, t->paged) ||
	    t->ghost || w->supervisor)
		return false;
	if (!read_spte(w, page, type, &f) || !undoubted(w, page, &f))
		return false;
	count(w->cpu->counters, COUNT_WALK_REFERENCES, 1);
	place = place_of_4k(t, t->paged, page);
	e = place_fill(t, &place, w->vcpu->vm, true);
	*e = (struct tlb_entry){
		.page = page,
		.hfn = f.hfn,
		.vpid = place.context->vpid,
		.pcid = place.context->pcid,
		.kind = KIND_LINEAR,
		.size = PAGE_4K,
		.vm = w->vcpu->vm,
		.vcpu = w->vcpu->id,
		.clock = w->guest->clock,
		.gfn = f.gfn,
		.custody = (uint16_t)spte_custody(f.spte),
		.nested = w->guest->vmx.nested,
		.apic_page = w->vmcs->apic_page,
	};
	walk_rights(f.spte, f.right, e->right);
	l1_put(&t->l1, l1_victim(&t->l1, page), e, PAGE_4K, page);
	t->absent[ABSENT_PAGED] = 0;
	*hfn = f.hfn;
	return true;
}
