/* Invalidation, with the scopes of SDM vol. 3C, 29.4.3; each acts on translations and paging-structure caches. */
#ifndef FLUSHLAB_TLB_FLUSH_H
#define FLUSHLAB_TLB_FLUSH_H

#include "core/machine_types.h"

struct tlb;

/* api */
/* calls: anything */
/* (INVVPID of VPID 0 fails, except type 2, and invalidates nothing.) */
void invept_single(struct tlb *t, uint32_t ep4ta);
void invept_global(struct tlb *t);
/* HvCallFlushGuestPhysicalAddressList: guest-physical mappings of these pages under an EP4TA.  Combined mappings of other
 * pages may go as well, and here go all of that EP4TA. */
void ept_flush_list(struct tlb *t, uint32_t ep4ta, uint64_t gpa_page, uint64_t pages);
void invvpid_address(struct tlb *t, uint32_t vpid, uint64_t page);
void invvpid_single(struct tlb *t, uint32_t vpid);
void invvpid_all(struct tlb *t);
void invvpid_retain_globals(struct tlb *t, uint32_t vpid);
/* The following act for the current VPID and PCID of tlb_switch, on linear and combined mappings. */
void invlpg(struct tlb *t, uint64_t page);
void invpcid_address(struct tlb *t, uint32_t pcid, uint64_t page);
void invpcid_single(struct tlb *t, uint32_t pcid);
void invpcid_all(struct tlb *t);
void invpcid_retain_globals(struct tlb *t);
/* MOV CR3 that invalidates (PCIDE=0, or bit 63 clear): non-global entries of `pcid`. */
void mov_to_cr3(struct tlb *t, uint32_t pcid);
/* MOV CR4 toggling PGE or clearing PCIDE; MOV CR0 clearing PG: all entries of the VPID, globals too. */
void mov_to_cr_all(struct tlb *t);
/* MOV CR4 toggling PAE or setting SMEP: current PCID.  Globals go too (they are used with it). */
void mov_to_cr_pcid(struct tlb *t);
/* #PF on a page: the entries that would translate it, current PCID and globals. */
void page_fault_invalidate(struct tlb *t, uint64_t page);
/* EPT violation: guest-physical entries for gpa_page under the current EP4TA and, if linear_valid, the combined
 * entries for linear_page under the current VPID, PCID and EP4TA. */
void ept_violation_invalidate(struct tlb *t, uint64_t gpa_page, uint64_t linear_page, int linear_valid);
/* VM entry or exit with "enable VPID" = 0: linear and combined mappings of VPID 0. */
void vm_transition_no_vpid(struct tlb *t);
/* end api */

#endif
