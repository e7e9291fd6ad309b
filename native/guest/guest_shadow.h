/* The guest's OS without EPT: its tables are written through linear addresses, and its MOVs to CR3, INVLPG and INVPCID
 * exit.  Each function may be repeated from its start after WALK_EXIT, as those of guest_os.h. */
#ifndef FLUSHLAB_GUEST_SHADOW_H
#define FLUSHLAB_GUEST_SHADOW_H

#include "core/machine_types.h"
#include "guest/guest_insn.h"
#include "vm/guest_state.h"
#include "walk/walk.h"

/* SDM vol. 3A, 2.5: control registers. */
#define CR0_PE (UINT64_C(1) << X86_CR0_PE_BIT)
#define CR0_WP (UINT64_C(1) << X86_CR0_WP_BIT)
#define CR0_PG (UINT64_C(1) << X86_CR0_PG_BIT)
#define CR3_NOFLUSH (UINT64_C(1) << 63)
#define CR4_PAE (UINT64_C(1) << X86_CR4_PAE_BIT)
#define CR4_PGE (UINT64_C(1) << X86_CR4_PGE_BIT)
#define CR4_PCIDE (UINT64_C(1) << X86_CR4_PCIDE_BIT)
#define CR4_SMEP (UINT64_C(1) << X86_CR4_SMEP_BIT)
#define EFER_LME (UINT64_C(1) << EFER_LME_BIT)
#define EFER_NX (UINT64_C(1) << EFER_NX_BIT)

/* Return the linear page by which the OS reaches a page of guest memory. */
static inline uint64_t os_linear(const struct guest *g, uint64_t gfn)
{
	return g->config.paging ? GUEST_DIRECT_BASE + gfn : gfn;
}

/* Execute an instruction that exits.  WALK_EXIT at first; WALK_DONE when the action is repeated: KVM has emulated it. */
enum walk_result guest_exit_insn(struct walk *w, enum guest_insn insn, uint64_t operand);
enum walk_result guest_exit_invpcid(struct walk *w, uint32_t type, uint64_t pcid, uint64_t linear);
/* Handle a page fault that KVM has injected.  WALK_GUEST_FAULT: the OS cannot go on. */
enum walk_result os_injected_fault(struct walk *w);

/* Get a zeroed page for a table: one that an interrupted action has left, or a new one. */
enum walk_result os_spare_table(struct walk *w, uint64_t *gfn);
/* The page is a table now. */
void os_table_linked(struct guest *g, uint64_t gfn);
/* Return whether each process has its own tables for the kernel's pages. */
bool os_own_kernel(const struct walk *w);
/* Give a process its PML4 table, with the kernel's part in it. */
enum walk_result os_new_pml4(struct walk *w, struct guest_process *p);
/* Build the first tables, with CR0.PG = 0: the kernel's, and the PML4 table of the current process. */
enum walk_result os_boot_tables(struct walk *w);
/* Return whether a process has its tables by now; another vCPU may have built them. */
bool os_has_tables(struct guest *g, uint32_t process);
/* Return the operand of MOV to CR4 with paging on, with CR4.PGE or without. */
uint64_t os_cr4_of(const struct guest *g, bool pge);
/* Return the operand of MOV to CR3 for a process. */
uint64_t os_cr3_of(const struct guest_process *p, bool noflush);
/* The guest is behind MOV to CR3, which KVM has emulated. */
void os_cr3_written(struct walk *w, uint32_t process, uint64_t cr3);
/* Switch to the next process. */
enum walk_result os_switch_shadowed(struct walk *w);
/* Forget the choices of interrupted actions: after a reset. */
void os_choices_reset(struct guest *g);

#endif
