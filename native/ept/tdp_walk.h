/* Chunks of like steps over a range: the loops of tdp_mmu.c. */
#ifndef FLUSHLAB_TDP_WALK_H
#define FLUSHLAB_TDP_WALK_H

#include "core/machine_types.h"

/* api */
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
	uint32_t shared;    /* mmu_lock held for read (or not at all, TDP_AGE): cmpxchg, retry on change (but not to
			     * age) */
	uint32_t freeze;    /* TDP_ZAP_LEVEL, TDP_ZAP_RANGE: a table's link becomes FROZEN, not 0 */
	uint32_t set_pfn;   /* zaps: kvm_set_pfn_dirty() and kvm_set_pfn_accessed() for each leaf */
	uint32_t done;
	uint64_t next_gfn;  /* in: first gfn; out: gfn to continue at (past the SPTE that TDP_FIND_* found) */
	uint64_t end_gfn;
	uint64_t mask;      /* TDP_CLEAR_DIRTY: bit i is gfn next_gfn + i; shifted along with next_gfn */
	uint64_t most_changed; /* a call ends after this many changes; 0: no such limit */
	/* Results of this call alone: */
	uint64_t changed;   /* SPTEs changed (TDP_COUNT: leafs seen) */
	uint64_t old_spte;  /* the SPTEs that were changed, as they were, OR'ed: with one change, that SPTE */
	uint64_t pages;     /* changed, in 4 KiB pages, without those in tables */
	uint64_t flush;     /* of those, pages that need a TLB flush (zapped, or W cleared) */
	uint64_t looked_at; /* SPTEs visited, out of `max` */
	uint64_t young;     /* TDP_AGE, TDP_ACCESS_TRACK: leafs found used, also if changing one failed */
	uint64_t already;   /* leafs found without W; a TLB may still have them writable if MMU-writable is set */
	uint64_t zapped;    /* next_gfn at entry, for forward progress (next_last_level_gfn != yielded_gfn) */
	/* TDP_FIND_*, and tables that lost their link: the caller removes them (tdp_removal_begin) before it
	 * continues.  found_level 0: none. */
	uint32_t found_table, found_index, found_level;
	uint64_t found_gfn, found_spte;
};

/* 0, or an error.  A call ends early at an SPTE that another CPU has frozen (shared walks that remove rights):
 * done is not set and next_gfn is unchanged; the other CPU must have a chance to run before the next call. */
/* call: step sptes; reads ept, table(chunk->root); reads custody if chunk->set_pfn and chunk->changed;
 * writes ept if chunk->changed and chunk->walk != TDP_COUNT */
int tdp_walk_chunk(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_chunk *chunk, uint32_t max);
/* end api */

#endif
