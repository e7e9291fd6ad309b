/* Instructions of the guest that exit to KVM, and system-management mode.
 *
 * In SMM the guest runs without paging: it executes its SMI handler, which is a list of guest-physical accesses,
 * once, and then RSM.  A guest without a handler executes RSM at once.
 */
#ifndef FLUSHLAB_GUEST_INSN_H
#define FLUSHLAB_GUEST_INSN_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* api */
/* calls: anything */
/* Bits of control registers (SDM vol. 3A, 2.5) by their names in the kernel (asm/processor-flags.h): those that
 * the guest OS sets, and so operands of GUEST_INSN_MOV_CR0 and GUEST_INSN_MOV_CR4. */
enum x86_cr_bit {
	X86_CR0_PE_BIT = 0,
	X86_CR0_WP_BIT = 16,
	X86_CR0_PG_BIT = 31,
	X86_CR4_PAE_BIT = 5,
	X86_CR4_PGE_BIT = 7,
	X86_CR4_PCIDE_BIT = 17,
	X86_CR4_SMEP_BIT = 20,
	EFER_LME_BIT = 8, /* asm/msr-index.h */
	EFER_NX_BIT = 11,
};

enum guest_insn {
	GUEST_INSN_NONE,
	GUEST_INSN_MOV_CR0,
	GUEST_INSN_MOV_CR3,    /* operand: address of the top table, PCID, and bit 63 to flush nothing; no exit with EPT */
	GUEST_INSN_MOV_CR4,
	GUEST_INSN_RSM,
	GUEST_INSN_TOGGLE_PGE, /* no exit: CR4.PGE is the guest's own, and so is the flush */
	/* Without EPT; the guest's own, as they are chosen by its OS or its program. */
	GUEST_INSN_INVLPG,     /* operand: linear address, canonical */
	GUEST_INSN_INVPCID,    /* operand: linear address, canonical; exit.invpcid_type, exit.invpcid_pcid */
	GUEST_INSN_WRMSR_EFER, /* exits with EPT and without */
	GUEST_INSN_CPUID,      /* exits always, and touches no memory */
	GUEST_INSN_OUT,        /* to a port that user space emulates */
	/* VMX (guest_nested.h), of programs only.  A VMCS12 is named by the number of its nested guest. */
	GUEST_INSN_VMXON,
	GUEST_INSN_VMXOFF,
	GUEST_INSN_VMPTRLD,    /* operand: VMCS12 */
	GUEST_INSN_VMCLEAR,    /* operand: VMCS12 */
	GUEST_INSN_VMWRITE,    /* exit.invpcid_type: enum vmcs12_field; operand: its value */
	GUEST_INSN_VMLAUNCH,   /* VMLAUNCH or VMRESUME; exit.invpcid_type: enum vmentry_check */
	GUEST_INSN_VMCALL,     /* of a nested guest */
	GUEST_INSN_INVVPID,    /* operand: linear address, canonical; exit.invpcid_type, exit.invpcid_pcid: the VPID */
	GUEST_INSN_VMWRITE_EPTP, /* operand: EPT_POINTER of the current VMCS12; 0 clears "enable EPT" */
	GUEST_INSN_INVEPT,     /* operand: EPTP, for type 1; exit.invpcid_type */
	GUEST_INSN_VMFUNC,     /* of a nested guest, function 0: switch to the EPTP that is the operand, of L1's list */
};

/* The check of the VMCS12 with which VM entry fails (SDM vol. 3C, 27.2, 27.3.1 and 27.4).  Of the controls: the
 * instruction fails, and L1 goes on.  Of the guest state or of an MSR to load: L1 goes on as after a VM exit.
 * VMENTRY_HALTED: none fails, but L2 is entered in the activity state HLT (24.4.2), and an event that exits to L1 comes
 * before L2 executes an instruction. */
enum vmentry_check { VMENTRY_SUCCEEDS, VMENTRY_CONTROLS, VMENTRY_GUEST_STATE, VMENTRY_MSR_LOAD, VMENTRY_HALTED };

/* Fields of the current VMCS12. */
enum vmcs12_field {
	VMCS12_VPID,      /* VIRTUAL_PROCESSOR_ID; 0 clears "enable VPID" */
	VMCS12_APIC_PAGE, /* APIC_ACCESS_ADDR, a gfn of L1's; 0 clears "virtualize APIC accesses" */
};

/* Any thread: make the vCPU execute this instruction before its next access.  If it exits, the VM exit is
 * EXIT_INSTRUCTION with the instruction in `access` and its operand in `linear`.  One at a time: MACHINE_AGAIN
 * while an earlier instruction is pending. */
int guest_execute(struct machine *m, uint32_t vcpu, uint32_t insn, uint64_t operand);
/* Return whether the pending instruction has exited. */
int guest_executed(struct machine *m, uint32_t vcpu);
/* Set the SMI handler: records[n] as in guest_add_process, but with guest-physical addresses.  Before the vCPU
 * runs. */
void guest_set_smi_handler(struct machine *m, uint32_t vcpu, const uint64_t *records, uint64_t n);
/* Called by the vCPU's thread, outside guest mode: SMM begins (no paging) or ends (paging as before it). */
/* call: aside */
void vcpu_set_smm(struct machine *m, uint32_t vcpu, int on);
/* Set or clear CR0.PG. */
/* call: aside */
void vcpu_set_paging(struct machine *m, uint32_t vcpu, int on);
/* Set or clear CR0.WP.  While it is clear, the guest's kernel may write to pages that its tables map read-only (SDM vol. 3A,
 * 4.6.1).  A new vCPU's is set. */
/* call: aside */
void vcpu_set_wp(struct machine *m, uint32_t vcpu, int on);
/* Set the paging mode that applies while CR0.PG is set (enum guest_tables). */
/* call: aside */
void vcpu_set_tables(struct machine *m, uint32_t vcpu, uint32_t tables);
/* Set the four PDPTE registers of GUEST_TABLES_PAE, which the CPU does not read again until the next MOV to CR3. */
/* call: aside */
void vcpu_set_pdptrs(struct machine *m, uint32_t vcpu, const uint64_t *pdptes);
/* Set or clear CR4.PCIDE of a guest that runs a program.  Processes keep the PCIDs that they were added with. */
/* call: aside */
void vcpu_set_pcide(struct machine *m, uint32_t vcpu, int on);
/* end api */

struct guest;
/* In guest mode: take the instruction to exit with, or GUEST_INSN_NONE. */
uint32_t guest_take_insn(struct guest *g, uint64_t *operand);
/* Describe the instruction in the VM exit, and return the exit's reason. */
uint32_t exit_instruction(struct walk *w, uint32_t insn, uint64_t operand);
/* Return the exit reason that a walk's result stands for; EXIT_REASONS: no exit. */
uint32_t exit_of(const struct walk *w, enum walk_result r);

#endif
