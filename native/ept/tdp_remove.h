/* Tables that are no longer linked: handle_removed_pt(), divided into steps. */
#ifndef FLUSHLAB_TDP_REMOVE_H
#define FLUSHLAB_TDP_REMOVE_H

#include "core/machine_types.h"

/* api */
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
	uint64_t old_spte;   /* their SPTEs, as they were, OR'ed */
};

/* Begin at a table that was linked by `spte`, of `level`.  If the frame is no longer that table, this is
 * reported, and there is nothing to do. */
/* call: part; reads ept, tables_on_path(removal); reads custody if removal->set_pfn and removal->leafs */
int tdp_removal_begin(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_removal *removal, uint64_t spte,
		      uint32_t level, uint64_t gfn, int shared);
/* Process at most `max` entries, of one page.  0, or MACHINE_AGAIN at an entry that another CPU has frozen:
 * that CPU must run, and its flush may need this CPU's acknowledgement, before the next step. */
/* call: step sptes; reads tables_on_path(removal); reads custody if removal->set_pfn and removal->leafs;
 * writes ept */
int tdp_removal_step(struct machine *m, uint32_t cpu, uint32_t vm, struct tdp_removal *removal, uint32_t max);
/* end api */

#endif
