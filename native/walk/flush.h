/* KVM's flush instructions on the pCPU that executes them, counted and attributed. */
#ifndef FLUSHLAB_FLUSH_H
#define FLUSHLAB_FLUSH_H

#include "core/machine_types.h"

/* api */
/* INVEPT all-context; vm and reason are for the accounts only. */
/* call: part; writes tlb(cpu); at tlb */
void flush_invept_global(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t reason);
/* The instructions with a descriptor return 0, or VMFAIL_INVALID_OPERAND if the processor refuses it: then nothing
 * is invalidated (SDM vol. 3C, 31.3, INVEPT and INVVPID; the error's number, 28, is in 31.4). */
enum { VMFAIL_INVALID_OPERAND = 28 };

/* INVEPT single-context.  Refused is an EPTP with which VM entry would fail (28.2.1.1). */
/* call: part; writes tlb(cpu); at tlb */
int flush_invept_single(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t eptp, uint32_t reason);
/* Refused are VPID 0 and, for an individual address, a linear address that is not canonical. */
/* call: part; writes tlb(cpu); at tlb */
int flush_invvpid_single(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t vpid, uint32_t reason);
int flush_invvpid_address(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t vpid, uint64_t page,
			  uint32_t reason);
/* call: part; writes tlb(cpu); at tlb */
void flush_invvpid_all(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t reason);
/* INVVPID single-context, retaining global translations.  Accounted as INVVPID single-context. */
/* call: part; writes tlb(cpu); at tlb */
int flush_invvpid_retain_globals(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t vpid, uint32_t reason);
/* Reset the pCPU: its cached entries go, and no VM is charged.  For machines that go on with other VMs. */
/* call: aside */
void flush_reset(struct machine *m, uint32_t cpu);
/* end api */

/* Set the handlers of IPI_INVEPT_GLOBAL and IPI_INVEPT_SINGLE; their argument is the VM << 32 | EP4TA. */
void flush_register(void);
/* A pCPU's record of its flushes; made at the first one. */
struct flush_account;
struct hv_flush;
void flush_account_destroy(struct machine *m, struct cpu *cpu);
/* Flush an EPT on this pCPU, as Hyper-V does for a hypercall (hypercall.h). */
void flush_by_hypervisor(struct machine *m, uint32_t cpu, const struct hv_flush *f);
/* Return whether this flush, by its number, was one of an EPT's mappings. */
bool flush_is_of_ept(uint64_t flush);
/* Record that a ghost that `flush` left would have been a violation if used: the flush was necessary. */
void flush_averted(struct machine *m, struct cpu *cpu, uint64_t flush);

#endif
