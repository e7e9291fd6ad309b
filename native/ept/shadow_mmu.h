/* Single steps of the shadow MMU.  In its tables any entry may map any gfn (kvm_mmu_page_get_gfn()). */
#ifndef FLUSHLAB_SHADOW_MMU_H
#define FLUSHLAB_SHADOW_MMU_H

#include "core/machine_types.h"

/* api */
/* kvm_mmu_alloc_shadow_page(): allocate a zeroed table page (kind FRAME_ROOT or FRAME_TABLE), with room for the gfn of
 * each entry (sp->shadowed_translation).  ept_table_free() frees it.  The frame, or MACHINE_NOMEM. */
/* call: step table; writes root_frames if kind == FRAME_ROOT; writes table_frames if kind != FRAME_ROOT;
 * writes table(result) if result >= 0; at frames */
int64_t shadow_page_alloc(struct machine *m, uint32_t cpu, uint32_t kind);
/* make_spte() without EPT.  access: SPTE_WRITABLE, SPTE_EXECUTABLE, SPTE_USER and SPTE_GLOBAL, of those that the guest's
 * tables permit; W, MMU-writable and D iff writable by both guest and host. */
/* call: local; keeps-gil */
uint64_t make_shadow_spte(uint32_t hfn, uint32_t custody, uint32_t level, uint32_t access, int host_writable);
/* Set an SPTE under mmu_lock held for write (mmu_set_spte(), mmu_spte_update(), drop_spte(), link_shadow_page()); return
 * the SPTE actually replaced.  gfn: the first gfn that a leaf maps; ignored for other SPTEs.  Keeps the ledger.  All
 * ones: invalid arguments, named by machine_error_text(); also if a leaf replaces that of another gfn, which must be
 * dropped before. */
/* call: step spte; reads table(table), rights(new_spte, level); writes ept */
uint64_t shadow_mmu_set_spte(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			     uint32_t level, uint64_t gfn, uint64_t new_spte);
/* Compare and swap a leaf of the same frame without mmu_lock (fast_pf_fix_direct_spte(), spte_write_protect()).  0, or
 * MACHINE_AGAIN if the SPTE changed. */
/* call: step spte; reads ept, table(table), rights(new_spte, level); writes ept if result == 0; keeps-gil */
int shadow_mmu_set_spte_atomic(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			       uint32_t level, uint64_t old_spte, uint64_t new_spte);
/* mmu_spte_get_lockless(): read, in a walk without mmu_lock, the entry for `page` of the table of `level` behind `link`,
 * the non-leaf SPTE that the walk has followed.  If the table was freed meanwhile, a software walk went through freed
 * memory: that is reported, and the result is 0, which is not present. */
/* call: step sptes; reads ept, table_below(link) */
uint64_t mmu_spte_get_lockless(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t link, uint32_t level,
			       uint64_t page);
/* Return the index of the table's first SPTE from `index` on that is not 0, or FRAME_WORDS: to walk over sp->spt. */
/* call: part; reads ept, table(table); keeps-gil */
uint32_t spte_next(struct machine *m, uint32_t table, uint32_t index);
/* kvm_mmu_page_get_gfn(): the first gfn that the leaf in this entry maps, or mapped last. */
/* call: part; reads ept, table(table); keeps-gil */
uint64_t kvm_mmu_page_get_gfn(struct machine *m, uint32_t table, uint32_t index);
/* end api */

/* Return the gfns of a table's entries; NULL: it is no shadow page. */
const _Atomic uint64_t *shadowed_gfns(const struct machine *m, uint32_t table);
int shadow_mmu_create(struct machine *m);
void shadow_mmu_destroy(struct machine *m);

#endif
