/* What ept.c, tdp_walk.c and tdp_map.c share: predicates of SPTEs, and the rights behind them.
 *
 * Order of a change (oracle.h): a right that appears is granted before its SPTE is published and taken back if
 * publishing fails; a right that goes is ungranted after its SPTE is gone, then the frame's tag is advanced.  So at
 * every moment the ledger grants at least what the tables do: a checker that meets an SPTE never misses its grant,
 * and the other way round it errs for the few instructions in which the change is under way, when using the
 * translation is legal.
 */
#ifndef FLUSHLAB_SPTE_H
#define FLUSHLAB_SPTE_H

#include "ept.h"
#include "ledger.h"

static inline uint64_t kvm_pages_per_hpage(uint32_t level)
{
	return UINT64_C(1) << 9 * (level - 1);
}

static inline uint32_t spte_index(uint64_t gfn, uint32_t level)
{
	return (uint32_t)(gfn >> 9 * (level - 1)) & 511;
}

static inline bool is_frozen_spte(uint64_t spte)
{
	return spte == FROZEN_SPTE;
}

#define SPTE_ACC_TRACK_SAVED ((uint64_t)(SPTE_READABLE | SPTE_EXECUTABLE) << SPTE_ACC_TRACK_SAVED_SHIFT)

/* KVM's notion: an access-tracked SPTE is present, too, though a CPU cannot use it. */
static inline bool is_shadow_present_pte(uint64_t spte)
{
	return spte & (SPTE_READABLE | SPTE_WRITABLE | SPTE_EXECUTABLE | SPTE_ACC_TRACK_SAVED);
}

static inline bool is_access_track_spte(uint64_t spte)
{
	return !spte_present(spte) && spte & SPTE_ACC_TRACK_SAVED;
}

/* R and X move to where they are saved; W is not: MMU-writable tells whether it may come back. */
static inline uint64_t mark_spte_for_access_track(uint64_t spte)
{
	uint64_t saved = spte & (SPTE_READABLE | SPTE_EXECUTABLE);

	return (spte & ~(uint64_t)(SPTE_READABLE | SPTE_WRITABLE | SPTE_EXECUTABLE)) |
	       saved << SPTE_ACC_TRACK_SAVED_SHIFT;
}

static inline bool is_last_spte(uint64_t spte, uint32_t level)
{
	return is_shadow_present_pte(spte) && spte_leaf(spte, level);
}

static inline bool is_nonleaf_spte(uint64_t spte, uint32_t level)
{
	return spte_present(spte) && !spte_leaf(spte, level);
}

static inline bool is_mmu_writable_spte(uint64_t spte)
{
	return spte >> SPTE_MMU_WRITABLE_BIT & 1;
}

/* spte_needs_atomic_update(): may somebody without mmu_lock change something of it that matters?  A fast page
 * fault sets W where MMU-writable allows it, and restores what is access-tracked; a CPU sets D where W is set.  That a CPU sets A does not matter, as in
 * the kernel. */
static inline bool spte_has_volatile_bits(uint64_t spte)
{
	if (spte & SPTE_WRITABLE)
		return !(spte & SPTE_DIRTY);
	return is_mmu_writable_spte(spte) || is_access_track_spte(spte);
}

/* kvm_tdp_mmu_write_spte(), under mmu_lock held for write: returns the really old SPTE. */
static inline uint64_t kvm_tdp_mmu_write_spte(_Atomic uint64_t *sptep, uint64_t old, uint64_t new_spte,
					      uint32_t level)
{
	/* Release: a walker that follows the new SPTE sees the table behind it, and the grant; pairs with the
	 * acquire loads of walkers.  Acquire: the last word of whoever changed a volatile SPTE. */
	if (is_last_spte(old, level) && spte_has_volatile_bits(old))
		return atomic_exchange_explicit(sptep, new_spte, memory_order_acq_rel);
	atomic_store_explicit(sptep, new_spte, memory_order_release);
	return old;
}

/* A leaf SPTE appears. */
static inline void spte_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	ledger_grant(m, vm, gfn, spte_hfn(spte), kvm_pages_per_hpage(level), spte_leaf_custody(spte, level),
		     spte & SPTE_WRITABLE);
}

/* A leaf SPTE gains W. */
static inline void spte_grant_write(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	ledger_grant_write(m, vm, gfn, spte_hfn(spte), kvm_pages_per_hpage(level), spte_leaf_custody(spte, level));
}

/* A leaf SPTE has gone, with W if it had it, or has lost W alone.  Also undoes a grant: the tag is advanced then,
 * too, because a checker may have refreshed its own by what was granted for a moment. */
static inline void spte_ungrant(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level,
				bool read, bool write)
{
	ledger_ungrant(m, vm, gfn, spte_hfn(spte), kvm_pages_per_hpage(level), read, write);
}

static inline void spte_ungrant_all(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	spte_ungrant(m, vm, gfn, spte, level, true, spte & SPTE_WRITABLE);
}

/* The same for loops over many SPTEs, whose cursor holds the locks of the ledger. */
void spte_ungrant_at(struct ledger_cursor *c, struct frames *f, uint64_t gfn, uint64_t spte, uint32_t level, bool read,
		     bool write);

/* Is the table behind a non-leaf SPTE of `level` still the one that it was made for?  If not, the walk is one
 * through freed memory and is reported; the caller goes no further. */
bool spte_child_holds(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn);

/* kvm_set_pfn_dirty() and kvm_set_pfn_accessed() for a leaf that was zapped, as the SPTE says (before 6.13): KVM's own
 * use of the page, a violation if the host has freed the frame since the SPTE's fault. */
void spte_set_pfn(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level);

/* One compare-and-swap of an SPTE with its rights.  False: it was not `old`, and nothing has changed. */
bool spte_try_change(struct machine *m, uint32_t cpu, uint32_t vm, _Atomic uint64_t *sptep, uint32_t level,
		     uint64_t gfn, uint64_t old, uint64_t new_spte);

#endif
