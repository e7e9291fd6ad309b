/* KVM's flush instructions, counted and attributed.  See flush.h. */
#include "walk/flush.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "memory/frame.h"
#include "sync/ipi.h"
#include "tlb/tlb_flush.h"
#include "tlb/tlb_report.h"
#include "vm/vm.h"
#include "walk/vmcs.h"

enum { FLUSHES_REMEMBERED = 1024 };

struct flush_account {
	uint64_t flushes;
	uint64_t necessary[FLUSHES_REMEMBERED]; /* last flush known to have averted a use, by number */
	uint16_t root_life[];                   /* life of each root page, from frame 1 on, when last flushed here */
};

/* Return the CPU's record.  NULL only if memory is out: then flushes work, unattributed. */
static struct flush_account *account(const struct machine *m, struct cpu *c)
{
	if (!c->flush_account)
		c->flush_account = heap_zalloc(m->heap, 1, sizeof(struct flush_account) +
							   m->config.root_frames * sizeof(uint16_t));
	return c->flush_account;
}

void flush_account_destroy(struct machine *m, struct cpu *cpu)
{
	heap_free(m->heap, cpu->flush_account);
	cpu->flush_account = NULL;
}

/* The flush followed an interruption of the guest. */
#define FLUSH_INTERRUPTED (UINT64_C(1) << 63)

/* A flush's number encodes its kind: sequence << 24 | vm << 8 | scope << 4 | reason, sequence from 1. */
static uint64_t flush_number(const struct cpu *c, uint64_t sequence, uint32_t vm, uint32_t scope,
			     uint32_t reason)
{
	/* The interrupt of a VMCLEAR would have come without the flush, too. */
	bool forced = c->interrupted && c->kicked && reason != REASON_MIGRATION;

	return (forced ? FLUSH_INTERRUPTED : 0) | sequence << 24 | (uint64_t)(vm & 0xffff) << 8 | scope << 4 |
	       reason;
}

static void bump(_Atomic uint64_t *table, uint32_t vm, uint32_t scope, uint32_t reason)
{
	_Atomic uint64_t *cell = &table[(vm * SCOPES + scope) * REASONS + reason];

	/* Relaxed: written by the owner only, as every counter. */
	atomic_store_explicit(cell, atomic_load_explicit(cell, memory_order_relaxed) + 1,
			      memory_order_relaxed);
}

/* Return whether the vCPU of the current VMCS, which this CPU's thread alone changes, has chosen a nested guest. */
static bool in_nested_guest(const struct machine *m, uint32_t cpu)
{
	const struct vmcs *vmcs = vmcs_current(m, cpu);
	const struct vcpu *vcpu = vmcs ? &m->vcpus[vmcs->vcpu] : NULL;

	return vcpu && vcpu->guest != vcpu->guests[0];
}

static struct tlb *begin(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t scope, uint32_t reason,
			 uint64_t argument)
{
	struct cpu *c = &m->cpus[cpu];
	struct flush_account *a = account(m, c);

	/* Relaxed: written by the owner only, as every counter. */
	atomic_store_explicit(&c->counters->flushed[vm], 1, memory_order_relaxed);
	bump(c->counters->flushes, vm, scope, reason);
	count(c->counters, in_nested_guest(m, cpu) ? COUNT_LEVEL2_FLUSHES : COUNT_LEVEL1_FLUSHES, 1);
	tlb_flush_begin(c->tlb, a ? flush_number(c, ++a->flushes, vm, scope, reason) : 0);
	event_record(m, cpu, event_of(vm, EVENT_FLUSH), (uint64_t)scope << 32 | reason, argument);
	return c->tlb;
}

static void end(struct machine *m, uint32_t cpu, uint32_t vm)
{
	struct cpu *c = &m->cpus[cpu];

	count(c->counters, COUNT_COLLATERAL, tlb_dropped(c->tlb, vm));
	tlb_flush_begin(c->tlb, 0);
}

void flush_invept_global(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t reason)
{
	invept_global(begin(m, cpu, vm, SCOPE_INVEPT_GLOBAL, reason, 0));
	end(m, cpu, vm);
}

/* Guest-physical addresses and host frames have fewer bits; EPTPs with more are refused. */
enum { EPTP_ADDRESS_BITS = 52 };

/* Memory type write-back or uncacheable, 4 or 5 levels; A/D at bit 6; no reserved bit, no bit beyond the address. */
static bool eptp_is_valid(uint64_t eptp)
{
	uint64_t type = eptp & 7, levels = eptp >> 3 & 7;

	return (type == 0 || type == 6) && (levels == 3 || levels == 4) && !(eptp & UINT64_C(0xf80)) &&
	       !(eptp >> EPTP_ADDRESS_BITS);
}

static void invept_root(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint32_t reason)
{
	struct tlb *t = begin(m, cpu, vm, SCOPE_INVEPT_SINGLE, reason, root);
	struct flush_account *a = m->cpus[cpu].flush_account;
	uint16_t life = (uint16_t)frame_tag(m->frames, root);

	invept_single(t, root);
	if (a && root - 1 < m->config.root_frames && a->root_life[root - 1] != life) {
		count(m->cpus[cpu].counters, COUNT_DEAD_ROOT_ENTRIES, tlb_dropped(t, -1));
		a->root_life[root - 1] = life;
	}
	end(m, cpu, vm);
}

static int vmfail(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t scope, uint32_t reason, uint64_t operand)
{
	event_record(m, cpu, event_of(vm, EVENT_VMFAIL), (uint64_t)scope << 32 | reason, operand);
	return VMFAIL_INVALID_OPERAND;
}

int flush_invept_single(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t eptp, uint32_t reason)
{
	if (!eptp_is_valid(eptp))
		return vmfail(m, cpu, vm, SCOPE_INVEPT_SINGLE, reason, eptp);
	invept_root(m, cpu, vm, (uint32_t)(eptp >> 12), reason);
	return 0;
}

int flush_invvpid_single(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t vpid, uint32_t reason)
{
	if (!vpid)
		return vmfail(m, cpu, vm, SCOPE_INVVPID_SINGLE, reason, vpid);
	invvpid_single(begin(m, cpu, vm, SCOPE_INVVPID_SINGLE, reason, vpid), vpid);
	end(m, cpu, vm);
	return 0;
}

void flush_invvpid_all(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t reason)
{
	invvpid_all(begin(m, cpu, vm, SCOPE_INVVPID_ALL, reason, 0));
	end(m, cpu, vm);
}

int flush_invvpid_address(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t vpid, uint64_t page,
			  uint32_t reason)
{
	/* Bits 63 to 47 of the address are equal. */
	uint64_t upper = page >> 35;

	if (!vpid || (upper && upper != UINT64_C(0x1ffff)))
		return vmfail(m, cpu, vm, SCOPE_INVVPID_ADDRESS, reason, vpid ? page << 12 : vpid);
	invvpid_address(begin(m, cpu, vm, SCOPE_INVVPID_ADDRESS, reason, page), vpid, page);
	end(m, cpu, vm);
	return 0;
}

int flush_invvpid_retain_globals(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t vpid, uint32_t reason)
{
	if (!vpid)
		return vmfail(m, cpu, vm, SCOPE_INVVPID_SINGLE, reason, vpid);
	invvpid_retain_globals(begin(m, cpu, vm, SCOPE_INVVPID_SINGLE, reason, vpid), vpid);
	end(m, cpu, vm);
	return 0;
}

void flush_by_hypervisor(struct machine *m, uint32_t cpu, const struct hv_flush *f)
{
	if (f->pages)
		ept_flush_list(begin(m, cpu, f->vm, SCOPE_HV_LIST, f->reason, f->gfn), f->root, f->gfn, f->pages);
	else
		invept_single(begin(m, cpu, f->vm, SCOPE_HV_SPACE, f->reason, f->root), f->root);
	end(m, cpu, f->vm);
	count(m->cpus[cpu].counters, COUNT_HYPERCALL_FLUSHES, 1);
}

bool flush_is_of_ept(uint64_t flush)
{
	uint32_t scope = flush >> 4 & 15;

	return scope == SCOPE_INVEPT_GLOBAL || scope == SCOPE_INVEPT_SINGLE || scope == SCOPE_HV_SPACE ||
	       scope == SCOPE_HV_LIST;
}

void flush_reset(struct machine *m, uint32_t cpu)
{
	struct tlb *t = m->cpus[cpu].tlb;

	tlb_flush_begin(t, 0);
	invept_global(t);
	invvpid_all(t);
}

void flush_averted(struct machine *m, struct cpu *cpu, uint64_t flush)
{
	uint32_t slot = flush >> 24 & (FLUSHES_REMEMBERED - 1);
	uint32_t vm = flush >> 8 & 0xffff, scope = flush >> 4 & 15, reason = flush & 15;

	/* Counted once, however many uses it averted. */
	if (!cpu->flush_account || cpu->flush_account->necessary[slot] == flush)
		return;
	cpu->flush_account->necessary[slot] = flush;
	count(cpu->counters, COUNT_NECESSARY_INTERRUPTIONS, flush >> 63);
	if (vm < m->config.vms)
		bump(cpu->counters->necessary, vm, scope, reason);
}

static void ipi_invept_global(struct machine *m, struct cpu *target, uint64_t argument)
{
	flush_invept_global(m, target->id, (uint32_t)(argument >> 32), REASON_OTHER);
}

static void ipi_invept_single(struct machine *m, struct cpu *target, uint64_t argument)
{
	invept_root(m, target->id, (uint32_t)(argument >> 32), (uint32_t)argument, REASON_ROOT_ALLOC);
}

void flush_register(void)
{
	ipi_register(IPI_INVEPT_GLOBAL, ipi_invept_global);
	ipi_register(IPI_INVEPT_SINGLE, ipi_invept_single);
}
