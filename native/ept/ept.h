/* EPT page tables: 512 atomic 64-bit SPTEs a page, in the arena of host frames.
 *
 * SPTE: 0 R, 1 W, 2 X, 5:3 memory type, 7 page size, 8 accessed, 9 dirty, 35:12 frame, 50:36 custody (host tag
 * of a 4K leaf's frame, clock of a huge leaf's block, tag of the child table's frame), 54 and 56 R and X of a
 * leaf that is access-tracked, 57 host-writable, 58 MMU-writable, as in arch/x86/kvm/mmu/spte.h where KVM has
 * them.
 *
 * These are mechanisms: single SPTE steps that also keep the ledger, and chunks of like steps over a range.
 * Python decides when to lock, flush, yield and free.  Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G.
 */
#ifndef FLUSHLAB_EPT_H
#define FLUSHLAB_EPT_H

#include "memory/frame.h"
#include "core/machine.h"

/* api */
enum spte_level { PG_LEVEL_4K = 1, PG_LEVEL_2M = 2, PG_LEVEL_1G = 3, PG_LEVEL_512G = 4 };
enum spte_bits_low {
	SPTE_READABLE = 1,
	SPTE_WRITABLE = 2,
	SPTE_EXECUTABLE = 4,
	SPTE_PAGE_SIZE = 128,
	SPTE_ACCESSED = 256,
	SPTE_DIRTY = 512,
	FROZEN_SPTE = 0x1a0,
};
enum spte_shift {
	SPTE_HFN_SHIFT = 12,
	SPTE_CUSTODY_SHIFT = 36,
	SPTE_ACC_TRACK_SAVED_SHIFT = 54, /* SHADOW_ACC_TRACK_SAVED_BITS_SHIFT */
	SPTE_HOST_WRITABLE_BIT = 57,
	SPTE_MMU_WRITABLE_BIT = 58,
};

/* make_spte(): a present leaf; level > 1 sets the page-size bit.  W and MMU-writable iff both flags are set;
 * A always, D iff W (KVM marks the page dirty in the log when it maps it writable). */
uint64_t make_spte(uint32_t hfn, uint32_t custody, uint32_t level, int writable, int host_writable);
/* make_nonleaf_spte() for a table page. */
uint64_t make_nonleaf_spte(struct machine *m, uint32_t table);

/* Allocate a zeroed table page (kind FRAME_ROOT or FRAME_TABLE), or MACHINE_NOMEM. */
int64_t ept_table_alloc(struct machine *m, uint32_t cpu, uint32_t kind);
uint64_t spte_read(struct machine *m, uint32_t table, uint32_t index);

/* In the single steps, gfn may be any gfn that the SPTE covers; index must agree with it. */

/* Walk from a root towards gfn without changing anything: sptes[level] and tables[level] are filled from
 * the root's level down to the returned level (where the walk met a leaf, a non-present or level 1).
 * Lockless: call under rcu_read_lock. */
int tdp_mmu_get_walk(struct machine *m, uint32_t root, uint32_t root_level, uint64_t gfn, uint64_t *sptes,
		     uint32_t *tables);

/* __tdp_mmu_set_spte_atomic(): cmpxchg under mmu_lock for read.  0, or MACHINE_AGAIN if the SPTE changed.
 * Keeps the ledger for leaf SPTEs; the caller takes care of removed tables (handle_removed_pt). */
int tdp_mmu_set_spte_atomic(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			    uint32_t level, uint64_t gfn, uint64_t old_spte, uint64_t new_spte);
/* tdp_mmu_set_spte(): under mmu_lock for write; returns the SPTE actually replaced.  (All ones: invalid
 * arguments, named by machine_error_text() as for MACHINE_MISUSE of the other steps.) */
uint64_t tdp_mmu_set_spte(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			  uint32_t level, uint64_t gfn, uint64_t new_spte);

/* handle_removed_pt(), step by step: freeze and ungrant the children of an unlinked table, and of the tables
 * below it.  Children come before their parent.  Begin, then step until level is 0; the caller owns each page
 * that a step has completed, and flushes and frees it as its policy says. */
struct tdp_removal {
	uint32_t shared;     /* mmu_lock held for read: other CPUs may be in the table */
	uint32_t freeze;     /* 1; 0: leave empty entries, in which other CPUs may install SPTEs */
	uint32_t recurse;    /* 1; 0: the tables below are left alone, and leak */
	uint32_t set_pfn;    /* 0; 1: kvm_set_pfn_dirty() and kvm_set_pfn_accessed() for each leaf */
	uint32_t single;     /* 0; 1: a step ends after the first mapping entry, however many empty entries
			      * preceded it */
	uint32_t top;        /* level of the first table's entries */
	uint32_t level;      /* level of the entries in work; 0: done */
	uint32_t table[6];   /* by level, from top down */
	uint32_t index[6];   /* by level: the next entry */
	uint64_t gfn;        /* the gfn that the next entry covers */
	/* Results of this step alone: */
	uint32_t page;       /* the table page that it has completed; 0: none */
	uint32_t page_level; /* of that page's entries */
	uint64_t leafs;      /* 4 KiB pages unmapped */
};

/* Begin at a table that was linked by `spte`, of `level`.  If the frame is no longer that table, this is
 * reported, and there is nothing to do. */
int tdp_removal_begin(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_removal *removal, uint64_t spte,
		      uint32_t level, uint64_t gfn, int shared);
/* Process at most `max` entries, of one page.  0, or MACHINE_AGAIN at an entry that another CPU has frozen:
 * that CPU must run, and its flush may need this CPU's acknowledgement, before the next step. */
int tdp_removal_step(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_removal *removal, uint32_t max);
/* Return whether the frame behind a non-leaf SPTE of `level` is still the table that the SPTE was made for.  If
 * not, a software walk went through freed memory, and that is reported. */
int tdp_table_holds(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn);
/* Free a table now, or after a grace period (call_rcu with tdp_mmu_free_sp_rcu_callback). */
void ept_table_free(struct machine *m, uint32_t cpu, uint32_t table);
int ept_table_free_rcu(struct machine *m, uint32_t cpu, uint32_t table);

/* Walks over a range.  One walker, which visits at most `max` SPTEs per call (tables walked through do not
 * count); call again with the same struct until done.  A yield or a changed tree requires no reset: each call
 * walks down from the root to next_gfn (as tdp_iter_restart does). */
enum tdp_walk {
	TDP_ZAP_LEAFS,    /* clear present leaf SPTEs (tdp_mmu_zap_leafs); a leaf larger than the range goes whole */
	TDP_ZAP_LEVEL,    /* one pass of tdp_mmu_zap_root: clear present SPTEs at `level`; higher ones are only walked
			   * through; stops at each table that lost its link */
	TDP_WRPROT,       /* clear W (wrprot_gfn_range): leafs at min level `level` (0: 4K) and above */
	TDP_CLEAR_DIRTY,  /* clear W of the 4K gfns in mask (kvm_tdp_mmu_clear_dirty_pt_masked) */
	TDP_AGE,          /* clear A; needs no lock, only RCU, with shared = 1 */
	TDP_ACCESS_TRACK, /* TDP_AGE without A/D bits (mark_spte_for_access_track): R, W and X are cleared; R and
			   * X are saved */
	TDP_COUNT,        /* present leafs, no change */
	TDP_FIND_HUGE,    /* stop at the next leaf above `level` (0: 4K), for splitting */
	TDP_FIND_TABLE,   /* stop at the next 2M-level SPTE that points to a table (for recovery) */
	TDP_ZAP_RANGE,    /* zap_gfn_range() before 5.18: leafs, and tables that lie wholly in the range; stops at
			   * each table that lost its link */
};

struct tdp_chunk {
	uint32_t root;
	uint32_t root_level;
	uint64_t root_link; /* make_nonleaf_spte(root) when it became a root: a walk in a freed root is reported;
			     * 0: not checked */
	uint32_t walk;      /* tdp_walk */
	uint32_t level;     /* for TDP_ZAP_LEVEL; least level for TDP_WRPROT; target level for TDP_FIND_HUGE */
	uint32_t shared;    /* mmu_lock held for read (or not at all, TDP_AGE): cmpxchg, retry on change */
	uint32_t freeze;    /* TDP_ZAP_LEVEL, TDP_ZAP_RANGE: a table's link becomes FROZEN, not 0 */
	uint32_t set_pfn;   /* zaps: kvm_set_pfn_dirty() and kvm_set_pfn_accessed() for each leaf */
	uint32_t done;
	uint64_t next_gfn;  /* in: first gfn; out: gfn to continue at (past the SPTE that TDP_FIND_* found) */
	uint64_t end_gfn;
	uint64_t mask;      /* TDP_CLEAR_DIRTY: bit i is gfn next_gfn + i; shifted along with next_gfn */
	uint64_t most_changed; /* a call ends after this many changes; 0: no such limit */
	/* Results of this call alone: */
	uint64_t changed;   /* SPTEs changed (TDP_COUNT: leafs seen) */
	uint64_t pages;     /* changed, in 4 KiB pages, without those in tables */
	uint64_t flush;     /* of those, pages that need a TLB flush (zapped, or W cleared) */
	uint64_t looked_at; /* SPTEs visited, out of `max` */
	uint64_t already;   /* leafs found without W; a TLB may still have them writable if MMU-writable is set */
	uint64_t zapped;    /* next_gfn at entry, for forward progress (next_last_level_gfn != yielded_gfn) */
	/* TDP_FIND_*, and tables that lost their link: the caller removes them (tdp_removal_begin) before it
	 * continues.  found_level 0: none. */
	uint32_t found_table, found_index, found_level;
	uint64_t found_gfn, found_spte;
};

/* 0, or an error.  A call ends early at an SPTE that another CPU has frozen (shared walks that remove rights):
 * done is not set and next_gfn is unchanged; the other CPU must have a chance to run before the next call. */
int tdp_walk_chunk(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_chunk *chunk, uint32_t max);

/* make_small_spte(), 512 times: make a table of 512 leafs that map the block of huge_spte, not yet linked; its
 * number or MACHINE_NOMEM.  Linking it with tdp_mmu_set_spte_atomic changes no right. */
int64_t tdp_mmu_make_split_table(struct machine *m, uint32_t cpu, uint64_t huge_spte, uint32_t level);
/* Install 4K leafs for n gfns from `gfn` on in one table where the SPTE is not present (fault-around): hfns,
 * host tags and writable flags from the arrays, hfn 0xffffffff: skip.  Returns the number installed. */
int tdp_mmu_map_around(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint64_t gfn, uint32_t n,
		       const uint32_t *hfns, const uint32_t *tags, const uint32_t *writable);
/* end api */

static inline uint32_t spte_hfn(uint64_t spte)
{
	return (uint32_t)(spte >> SPTE_HFN_SHIFT) & 0xffffff;
}

/* Return the custody of a leaf, for frame_custody_holds() and similar functions. */
static inline uint32_t spte_leaf_custody(uint64_t spte, uint32_t level)
{
	return ((uint32_t)(spte >> SPTE_CUSTODY_SHIFT) & FRAME_TAG_MASK) |
	       (level > PG_LEVEL_4K ? (uint32_t)CUSTODY_OF_BLOCK : 0);
}

static inline uint32_t spte_custody(uint64_t spte)
{
	return (uint32_t)(spte >> SPTE_CUSTODY_SHIFT) & 0x7fff;
}

static inline bool spte_present(uint64_t spte)
{
	return spte & (SPTE_READABLE | SPTE_WRITABLE | SPTE_EXECUTABLE);
}

static inline bool spte_leaf(uint64_t spte, uint32_t level)
{
	return level == PG_LEVEL_4K || (spte & SPTE_PAGE_SIZE);
}

static inline _Atomic uint64_t *ept_table(const struct machine *m, uint32_t table)
{
	return frame_words(m->frames, table);
}

struct cpu;
/* The handler of RCU_FREE_FRAME. */
void tdp_mmu_free_sp_rcu_callback(struct machine *m, struct cpu *cpu, uint64_t table);

#endif
