/* Single steps on SPTEs, with the rights that SPTEs grant.
 *
 * Order of a change (oracle.h): a new right is granted before its SPTE is published, and taken back if
 * publishing fails; a lost right is ungranted after its SPTE is gone, and then the frame's tag is advanced.  At
 * every moment, therefore, the ledger grants at least the rights of the tables: a checker that meets an SPTE
 * never misses its grant.  In the other direction it errs only for the few instructions in which the change is
 * under way, while using the translation is still legal.
 */
#ifndef FLUSHLAB_SPTE_H
#define FLUSHLAB_SPTE_H

#include "core/machine_types.h"
#include "ept/ept.h"
#include "oracle/ledger.h"

/* api */
/* make_spte(): a present leaf; level > 1 sets the page-size bit.  W and MMU-writable iff both flags are set;
 * A always, D iff W (KVM marks the page dirty in the log when it maps it writable). */
/* call: local; keeps-gil */
uint64_t make_spte(uint32_t hfn, uint32_t custody, uint32_t level, int writable, int host_writable);
/* make_nonleaf_spte() for a table page. */
/* call: local; keeps-gil */
uint64_t make_nonleaf_spte(struct machine *m, uint32_t table);

/* Return whether the frame behind a non-leaf SPTE of `level` is still the table that the SPTE was made for.  If
 * not, a software walk went through freed memory, and that is reported. */
/* call: step sptes; reads ept, table_below(spte) */
int tdp_table_holds(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn);
/* end api */

/* The place of an SPTE, and the first gfn that it maps, which the caller knows.  The TDP MMU's tables imply it by the
 * place (tdp_mmu.h); a table that shadows a guest's may map any gfn in any entry (kvm_mmu_page_get_gfn()). */
struct spte_place {
	uint32_t table;
	uint32_t index;
	uint32_t level;
	uint64_t gfn;
};

/* Compare and swap an SPTE, under mmu_lock for read.  0, or MACHINE_AGAIN if the SPTE changed.  Keeps the ledger for
 * leaf SPTEs; the caller takes care of removed tables. */
int spte_set_atomic(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t old_spte,
		    uint64_t new_spte);
/* Do as spte_set_atomic(), but permit a leaf to be replaced by a leaf of another frame. */
int spte_replace(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t old_spte,
		 uint64_t new_spte);
/* Replace an SPTE with a plain store, which loses a change by another CPU meanwhile; *old: the SPTE right before it. */
int spte_store(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t *old,
	       uint64_t new_spte);
/* Store an SPTE, under mmu_lock for write; return the SPTE actually replaced.  All ones: invalid arguments, named by
 * machine_error_text() as for MACHINE_MISUSE of the other steps. */
uint64_t spte_set(struct machine *m, uint32_t cpu, uint32_t vm, const struct spte_place *at, uint64_t new_spte);

static inline uint64_t kvm_pages_per_hpage(uint32_t level)
{
	return UINT64_C(1) << 9 * (level - 1);
}

static inline bool is_frozen_spte(uint64_t spte)
{
	return spte == FROZEN_SPTE;
}

#define SPTE_ACC_TRACK_SAVED ((uint64_t)(SPTE_READABLE | SPTE_EXECUTABLE) << SPTE_ACC_TRACK_SAVED_SHIFT)

/* As KVM defines it: an access-tracked SPTE is present, too, though a CPU cannot use it. */
static inline bool is_shadow_present_pte(uint64_t spte)
{
	return spte & (SPTE_READABLE | SPTE_WRITABLE | SPTE_EXECUTABLE | SPTE_ACC_TRACK_SAVED);
}

static inline bool is_access_track_spte(uint64_t spte)
{
	return !spte_present(spte) && spte & SPTE_ACC_TRACK_SAVED;
}

/* Move R and X to the saved bits.  W is not saved: MMU-writable tells whether it may be restored. */
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

/* spte_needs_atomic_update(): return whether a relevant bit may change without mmu_lock.  A fast page fault
 * sets W where MMU-writable allows it, and restores access-tracked SPTEs; a CPU sets D where W is set.  A CPU's
 * setting of A is irrelevant, as in the kernel. */
static inline bool spte_has_volatile_bits(uint64_t spte)
{
	if (spte & SPTE_WRITABLE)
		return !(spte & SPTE_DIRTY);
	return is_mmu_writable_spte(spte) || is_access_track_spte(spte);
}

/* kvm_tdp_mmu_write_spte(), under mmu_lock held for write: returns the SPTE actually replaced. */
static inline uint64_t kvm_tdp_mmu_write_spte(_Atomic uint64_t *sptep, uint64_t old, uint64_t new_spte,
					      uint32_t level)
{
	/* Release: a walker that follows the new SPTE sees the table behind it, and the grant; pairs with the
	 * acquire loads of walkers.  Acquire: sees the stores of the CPU that last changed a volatile SPTE. */
	if (is_last_spte(old, level) && spte_has_volatile_bits(old))
		return atomic_exchange_explicit(sptep, new_spte, memory_order_acq_rel);
	atomic_store_explicit(sptep, new_spte, memory_order_release);
	return old;
}

/* Grant the rights of a leaf SPTE that is about to appear. */
static inline void spte_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	ledger_grant(m, vm, gfn, spte_hfn(spte), kvm_pages_per_hpage(level), spte_leaf_custody(spte, level),
		     spte & SPTE_WRITABLE);
}

/* Grant the write right of a leaf SPTE that gains W. */
static inline void spte_grant_write(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	ledger_grant_write(m, vm, gfn, spte_hfn(spte), kvm_pages_per_hpage(level), spte_leaf_custody(spte, level));
}

/* Ungrant a leaf SPTE that is gone, with W if it had it, or that has lost W alone.  Also undoes a grant: the
 * tag is advanced then, too, because a checker may have refreshed its own under the short-lived grant. */
static inline void spte_ungrant(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level,
				bool read, bool write)
{
	ledger_ungrant(m, vm, gfn, spte_hfn(spte), kvm_pages_per_hpage(level), read, write);
}

static inline void spte_ungrant_all(struct machine *m, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level)
{
	spte_ungrant(m, vm, gfn, spte, level, true, spte & SPTE_WRITABLE);
}

/* spte_ungrant() for loops over many SPTEs; their cursor holds the locks of the ledger. */
void spte_ungrant_at(struct ledger_cursor *c, struct frames *f, uint64_t gfn, uint64_t spte, uint32_t level, bool read,
		     bool write);

/* Return whether the frame behind a non-leaf SPTE of `level` is still the table that the SPTE was made for.  If
 * not, the walk went through freed memory and is reported; the caller must not go further. */
bool spte_child_holds(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn);

/* kvm_set_pfn_dirty() and kvm_set_pfn_accessed() for a zapped leaf, by the SPTE's bits (before 6.13): KVM's own
 * use of the page, a violation if the host has freed the frame since the SPTE's fault. */
void spte_set_pfn(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint64_t spte, uint32_t level);

/* Change an SPTE with one compare-and-swap, and its rights with it.  False: it was not `old`, and nothing has
 * changed. */
bool spte_try_change(struct machine *m, uint32_t cpu, uint32_t vm, _Atomic uint64_t *sptep, uint32_t level,
		     uint64_t gfn, uint64_t old, uint64_t new_spte);

#endif
