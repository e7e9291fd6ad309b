/* Steps of a walk of KVM's tables, with EPT (walk.c) and without (walk_shadow.c). */
#ifndef FLUSHLAB_WALK_STEPS_H
#define FLUSHLAB_WALK_STEPS_H

#include "core/counters.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "memory/frame.h"
#include "oracle/tracking.h"
#include "tlb/psc.h"
#include "tlb/tlb.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

enum { SPTE_RWX = SPTE_READABLE | SPTE_WRITABLE | SPTE_EXECUTABLE };

static inline uint32_t walk_access_bit(uint32_t type)
{
	return type == ACCESS_READ ? SPTE_READABLE : type == ACCESS_WRITE ? SPTE_WRITABLE : SPTE_EXECUTABLE;
}

static inline bool walk_table_holds(const struct walk *w, uint32_t table, uint32_t custody)
{
	return table < w->m->frames->pool[FRAME_GUEST].first && frame_tag(w->m->frames, table) == custody;
}

/* Write the rights that a leaf grants.  A write needs D as well: a walk sets it before it fills. */
static inline void walk_rights(uint64_t spte, uint32_t right, uint32_t rights[ACCESS_TYPES])
{
	rights[ACCESS_READ] = spte & SPTE_READABLE ? right : RIGHT_NONE;
	rights[ACCESS_WRITE] = (spte & SPTE_WRITABLE) && (spte & SPTE_DIRTY) ? right : RIGHT_NONE;
	rights[ACCESS_EXECUTE] = spte & SPTE_EXECUTABLE ? right : RIGHT_NONE;
}

/* Return whether the oracle must judge a write to `page` of the translation: KVM has promised to see the guest's stores
 * to it, or the host does not permit them. */
static inline bool writes_doubtful(const struct walk *w, const struct tlb_entry *e, uint64_t page)
{
	return frame_host_readonly(w->m->frames, e->hfn + (uint32_t)(page - e->page)) ||
	       writes_tracked(w->vm, e->gfn + (page - e->page));
}

/* Return whether the custody of a 4K leaf holds, and the host permits writes if the leaf does. */
static inline bool walk_leaf_permitted(const struct frames *frames, uint64_t spte)
{
	uint32_t readonly = spte & SPTE_WRITABLE ? (uint32_t)FRAME_HOST_READONLY : 0;

	return (frame_host(frames, spte_hfn(spte)) & (FRAME_TAG_MASK | readonly)) == spte_custody(spte);
}

/* Set A, and D for a write.  False: the SPTE changed meanwhile and must be read again.  *spte is the table's
 * value afterwards. */
static inline bool walk_set_accessed(struct counters *counters, _Atomic uint64_t *slot, uint64_t *spte, uint32_t type)
{
	uint64_t want = *spte | SPTE_ACCESSED | (type == ACCESS_WRITE ? SPTE_DIRTY : 0);

	if (want == *spte)
		return true;
	/* Hardware's locked update; acq_rel as the SPTE writers' (ept.c). */
	if (!atomic_compare_exchange_strong_explicit(slot, spte, want, memory_order_acq_rel,
						     memory_order_acquire))
		return false;
	*spte = want;
	count(counters, COUNT_WALK_UPDATES, 1);
	return true;
}

/* The rest of walk_start() for a cached link that another guest, root or VM has filled, or to a table that is no
 * longer in use; *table and *custody are the link's. */
uint32_t walk_start_slow(struct walk *w, const struct psc_entry *link, uint32_t kind, uint64_t page, uint32_t type,
			 uint32_t *table, uint32_t *custody);

/* Find the table where a walk starts: the deepest one cached for the page under `kind`, or the root.  Return its
 * level; 0: a cached link may not be used, and a speculative walk, which repairs nothing, ends here.  Any other walk
 * reports the link, drops it, and starts at the root. */
static inline uint32_t walk_start(struct walk *w, uint32_t kind, uint64_t page, uint32_t type, uint32_t *table,
				  uint32_t *custody)
{
	const struct psc_entry *link = psc_search(w->tlb, kind, page);

	if (!link) {
		*table = w->vmcs->root;
		*custody = w->vmcs->life;
		return w->vmcs->root_level;
	}
	*table = link->hfn;
	*custody = link->right & FRAME_TAG_MASK;
	if (__builtin_expect(link->right >> 16 != w->life_bits >> 16 || link->nested != w->guest->vmx.nested ||
			     link->vm != w->vcpu->vm || frame_unlinked(w->m->frames, link->hfn) ||
			     !walk_table_holds(w, *table, *custody), 0))
		return walk_start_slow(w, link, kind, page, type, table, custody);
	return link->level;
}

/* Cache the table that `spte` links, at `level`. */
void walk_cache_table(struct walk *w, uint32_t kind, uint64_t page, uint32_t level, uint64_t spte);
/* Report a table page that the link to it no longer owns, or that an earlier owner of the root page linked.  page: the
 * walk's input. */
void walk_report_link(struct walk *w, const struct psc_entry *link, uint64_t page, uint32_t type, uint32_t kinds);
void walk_report_table(struct walk *w, uint32_t kind, uint32_t table, uint32_t custody, uint64_t page, uint32_t level,
		       uint32_t type);

#endif
