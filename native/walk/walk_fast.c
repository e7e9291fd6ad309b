/* The fast path of a walk, which most misses of both levels take: the deepest tables of both dimensions are
 * cached, the guest's page and the host's are of 4 KiB, no flag is to be set and no use to be judged.
 *
 * It does the work of walk_linear() and walk_physical() in one pass, without entries that are built to be
 * copied.  Until it is certain that the fast path applies, it changes only the order of replacement, which
 * those functions change in the same way: every other case can therefore be left to them.
 */
#include "walk/walk_fast.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "ept/ept.h"
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

/* The results of reading both tables. */
struct found {
	struct place physical;
	uint64_t gfn;
	uint32_t hfn;
	uint32_t custody;
	uint32_t right[ACCESS_TYPES]; /* of the guest-physical mapping */
};

/* The bits that must be set in an entry that is used without a change, by type of access. */
static const uint64_t gpte_wanted[ACCESS_TYPES] = {
	[ACCESS_READ] = GPTE_PRESENT | GPTE_ACCESSED,
	[ACCESS_WRITE] = GPTE_PRESENT | GPTE_ACCESSED | GPTE_WRITABLE | GPTE_DIRTY,
	[ACCESS_EXECUTE] = GPTE_PRESENT | GPTE_ACCESSED,
};
static const uint64_t spte_wanted[ACCESS_TYPES] = {
	[ACCESS_READ] = SPTE_ACCESSED | SPTE_READABLE,
	[ACCESS_WRITE] = SPTE_ACCESSED | SPTE_WRITABLE | SPTE_DIRTY,
	[ACCESS_EXECUTE] = SPTE_ACCESSED | SPTE_EXECUTABLE,
};

/* Return the guest's entry for the page.  0, which is not present: walk_linear() must look. */
static inline uint64_t read_gpte(struct walk *w, uint64_t page, uint32_t type)
{
	const struct psc_entry *table = psc_search_deepest(w->tlb, w->tlb->paged, page);
	uint64_t gpte;

	/* Entries of 4 bytes are walk_linear()'s. */
	if (!table || w->guest->tables > GUEST_TABLES_PAE || !right_holds(w, table->right, table->hfn))
		return 0;
	/* Relaxed, as in walk_linear(). */
	gpte = atomic_load_explicit(guest_word(w->m, table->hfn, page & 511), memory_order_relaxed);
	return (gpte & (gpte_wanted[type] | GPTE_GLOBAL)) == gpte_wanted[type] ? gpte : 0;
}

/* Return whether the cached table of the EPT may be read for this vCPU.  As link_faults() except for its tag,
 * which is compared when the entry has been read. */
static inline bool link_holds(const struct walk *w, const struct psc_entry *p)
{
	return p->vm == w->vcpu->vm && p->right >> 16 == w->life_bits >> 16 &&
	       p->hfn < w->m->frames->pool[FRAME_GUEST].first;
}

/* Read the SPTE and the frame's tag, in the order of ept_walk(). */
static inline bool read_spte(struct walk *w, uint64_t gfn, uint32_t type, struct found *f)
{
	const struct frames *frames = w->m->frames;
	const struct psc_entry *link = psc_search_deepest(w->tlb, w->tlb->physical, gfn);
	_Atomic uint64_t *sptep;
	uint64_t spte;
	uint32_t right;

	if (!link || !link_holds(w, link))
		return false;
	sptep = ept_table(w->m, link->hfn) + (gfn & 511);
	spte = atomic_load_explicit(sptep, memory_order_acquire);
	f->hfn = spte_hfn(spte);
	f->custody = spte_custody(spte);
	if ((spte & spte_wanted[type]) != spte_wanted[type] || f->hfn >= frames->count ||
	    frame_tag(frames, link->hfn) != (link->right & FRAME_TAG_MASK) || frame_unlinked(frames, link->hfn))
		return false;
	right = (uint32_t)atomic_load_explicit(&frames->tag[f->hfn], memory_order_acquire) | w->life_bits;
	if (atomic_load_explicit(sptep, memory_order_acquire) != spte || !walk_leaf_permitted(frames, spte))
		return false;
	walk_rights(spte, right, f->right);
	return true;
}

/* The guest-physical look-up and walk.  False: the mapping or a ghost of it is cached, or the fast path does
 * not apply. */
static inline bool find_physical(struct walk *w, uint64_t gfn, uint32_t type, struct found *f)
{
	const uint32_t *slots = w->tlb->contexts[w->tlb->physical].slots;

	/* walk_physical() alone looks up gfns behind an EPT of L1's. */
	if (slots[PAGE_2M] | slots[PAGE_1G] || gfn > PAGE_NUMBER_MASK || w->vmcs->nested_ept)
		return false;
	f->gfn = gfn;
	f->physical = place_of_4k(w->tlb, w->tlb->physical, gfn);
	return place_vacant(w->tlb, &f->physical) && read_spte(w, gfn, type, f) &&
	       !(f->right[ACCESS_WRITE] != RIGHT_NONE && writes_tracked(w->vm, gfn));
}

/* Write the fields that both mappings share. */
static inline void write_entry(const struct walk *w, const struct found *f, const struct place *p, struct tlb_entry *e)
{
	e->page = key_page(p->key);
	e->hfn = f->hfn;
	e->right[ACCESS_READ] = f->right[ACCESS_READ];
	e->right[ACCESS_WRITE] = f->right[ACCESS_WRITE];
	e->right[ACCESS_EXECUTE] = f->right[ACCESS_EXECUTE];
	e->ep4ta = p->context->ep4ta;
	e->vpid = p->context->vpid;
	e->pcid = p->context->pcid;
	e->kind = p->context->kind;
	e->size = PAGE_4K;
	e->global = e->fractured = 0;
	e->vm = w->vcpu->vm;
	e->vcpu = w->vcpu->id;
	e->clock = w->guest->clock;
	e->gfn = f->gfn;
	e->ept12_delta = 0;
	e->custody = (uint16_t)f->custody;
	e->nested = w->guest->vmx.nested;
	e->apic_page = w->vmcs->apic_page;
}

bool walk_fast(struct walk *w, uint64_t page, uint32_t type, uint32_t *hfn)
{
	struct counters *c = w->cpu->counters;
	struct tlb *t = w->tlb;
	struct tlb_entry *e;
	struct place combined;
	struct found f = { 0 };
	uint64_t gpte;

	if (t->l2.way_bits != TAGGED_WAY_BITS || t->absent[ABSENT_PAGED] != mapping_id(PAGE_4K, page, t->paged) || t->ghost)
		return false;
	gpte = read_gpte(w, page, type);
	if (!gpte || !find_physical(w, (gpte & GPTE_ADDRESS) >> 12, type, &f))
		return false;
	count(c, COUNT_WALK_REFERENCES, 2);
	count(c, COUNT_GPA_LOOKUPS, 1);
	count(c, COUNT_GPA_MISSES, 1);
	/* The guest-physical mapping is not looked up while the combined mapping exists, so it counts as
	 * unused. */
	write_entry(w, &f, &f.physical, place_fill(t, &f.physical, w->vcpu->vm, false));
	combined = place_of_4k(t, t->paged, page);
	e = place_fill(t, &combined, w->vcpu->vm, true);
	if ((gpte & (GPTE_WRITABLE | GPTE_DIRTY)) != (GPTE_WRITABLE | GPTE_DIRTY))
		f.right[ACCESS_WRITE] = RIGHT_NONE;
	write_entry(w, &f, &combined, e);
	l1_put(&t->l1, l1_victim(&t->l1, page), e, PAGE_4K, page);
	t->absent[ABSENT_PAGED] = t->absent[ABSENT_PHYSICAL] = 0;
	*hfn = f.hfn;
	return true;
}
