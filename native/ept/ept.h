/* EPT page tables: 512 atomic 64-bit SPTEs a page, in the arena of host frames.
 *
 * SPTE: 0 R, 1 W, 2 X, 5:3 memory type, 7 page size, 8 accessed, 9 dirty, 35:12 frame, 50:36 custody (host tag
 * of a 4K leaf's frame, clock of a huge leaf's block, tag of the child table's frame), 54 and 56 R and X of a
 * leaf that is access-tracked, 57 host-writable, 58 MMU-writable, as in arch/x86/kvm/mmu/spte.h where KVM has
 * them.
 *
 * Without EPT, SPTEs have the same layout, so that all steps serve both: 0 P, 1 W, 2 not NX, 10 U, 11 G.  Bit 51 is
 * reserved: an entry with this bit is present and faults, which KVM uses for MMIO; its bits 2:0, 54 and 56 are clear
 * and the others are KVM's.  Only a leaf's rights count, because KVM gives non-leaf SPTEs all of them.
 *
 * The folder holds mechanisms: single SPTE steps that also keep the ledger (spte.h), and chunks of like steps over
 * a range (tdp_*.h).  Python decides when to lock, flush, yield and free.
 */
#ifndef FLUSHLAB_EPT_H
#define FLUSHLAB_EPT_H

#include "core/machine_types.h"
#include "memory/frame.h"

/* api */
enum spte_bits_low {
	SPTE_READABLE = 1,
	SPTE_WRITABLE = 2,
	SPTE_EXECUTABLE = 4,
	SPTE_PAGE_SIZE = 128,
	SPTE_ACCESSED = 256,
	SPTE_DIRTY = 512,
	SPTE_USER = 1024,   /* without EPT */
	SPTE_GLOBAL = 2048, /* without EPT */
	FROZEN_SPTE = 0x1a0,
};
enum spte_shift {
	SPTE_HFN_SHIFT = 12,
	SPTE_CUSTODY_SHIFT = 36,
	SPTE_MMIO_BIT = 51,     /* without EPT */
	SPTE_ACC_TRACK_SAVED_SHIFT = 54, /* SHADOW_ACC_TRACK_SAVED_BITS_SHIFT */
	SPTE_HOST_WRITABLE_BIT = 57,
	SPTE_MMU_WRITABLE_BIT = 58,
};

/* Allocate a zeroed table page (kind FRAME_ROOT or FRAME_TABLE), or MACHINE_NOMEM. */
/* call: step table; writes root_frames if kind == FRAME_ROOT; writes table_frames if kind != FRAME_ROOT;
 * writes table(result) if result >= 0; at frames */
int64_t ept_table_alloc(struct machine *m, uint32_t cpu, uint32_t kind);
/* call: part; reads ept, table(table); keeps-gil */
uint64_t spte_read(struct machine *m, uint32_t table, uint32_t index);
/* Return the number of table pages linked below a table of `level`.  No other CPU may change SPTEs meanwhile. */
/* call: anything */
uint32_t ept_tables_below(struct machine *m, uint32_t table, uint32_t level);

/* Walk from a root towards gfn without changing anything: sptes[level] and tables[level] are filled from
 * the root's level down to the returned level (where the walk met a leaf, a non-present or level 1).
 * Lockless: call under rcu_read_lock. */
/* call: step sptes; reads ept, table(root); keeps-gil */
int tdp_mmu_get_walk(struct machine *m, uint32_t root, uint32_t root_level, uint64_t gfn, uint64_t *sptes,
		     uint32_t *tables);

/* Free a table now, or after a grace period (call_rcu with tdp_mmu_free_sp_rcu_callback). */
/* call: step table; writes root_frames, table_frames, tables, table(table); at frames */
void ept_table_free(struct machine *m, uint32_t cpu, uint32_t table);
/* call: step call_rcu; writes callbacks, freed(table) */
int ept_table_free_rcu(struct machine *m, uint32_t cpu, uint32_t table);
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

static inline bool ept_is_table(const struct machine *m, uint32_t table)
{
	return table < m->frames->count && frame_kind_of(m->frames, table) <= FRAME_TABLE;
}

/* Set the handler of RCU_FREE_FRAME. */
void ept_register(void);

#endif
