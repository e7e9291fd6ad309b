/* Guest mode: from VM entry to VM exit. */
#include "guest/run.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/access.h"
#include "guest/guest.h"
#include "guest/guest_batch.h"
#include "guest/guest_boot.h"
#include "guest/guest_cr3.h"
#include "guest/guest_flush.h"
#include "guest/guest_hypervisor.h"
#include "guest/guest_insn.h"
#include "guest/guest_nested.h"
#include "guest/guest_os.h"
#include "guest/guest_roles.h"
#include "guest/guest_shadow.h"
#include "guest/program.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/adversary.h"
#include "walk/context.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

/* A reason without a counter of its own would be counted in memory behind the last counter. */
_Static_assert(COUNT_EXIT_INTERRUPT + EXIT_REASONS == COUNTERS, "each exit reason has a counter, in the same order");

struct run {
	struct walk walk;
	uint64_t budget;
	struct accesses accesses;
	bool inside; /* in steps: between guest_enter and guest_leave */
};

static bool attention(const struct run *run)
{
	return atomic_load_explicit(&run->walk.cpu->attention, memory_order_relaxed) != 0;
}

/* Without EPT: if KVM has emulated the next record, a store, go on behind it.  Returns the records passed. */
static uint32_t pass_emulated_store(struct run *run, struct guest_process *p)
{
	struct guest_store *store = &run->walk.guest->store;

	if (__builtin_expect(!store->done, 1))
		return 0;
	store->done = false;
	if (p->position == p->record_count || !record_stores_to(p->records[p->position], store->linear))
		return 0;
	if (++p->position == p->record_count)
		p->position = 0;
	run->walk.guest->clock++;
	run->budget--;
	return 1;
}

/* Do records up to `n` of the current process; WALK_DONE also when attention is set. */
static enum walk_result run_records(struct run *run, uint64_t n)
{
	struct guest_process *p = &run->walk.guest->process[run->walk.guest->current];
	enum walk_result r = WALK_DONE;

	n -= pass_emulated_store(run, p);
	while (n && r == WALK_DONE && !attention(run)) {
		uint64_t left = p->record_count - p->position, done;

		r = accesses_run(&run->accesses, &run->walk, p->records + p->position, n < left ? n : left, &done);
		p->position += done;
		n -= done;
		run->budget -= done;
		if (p->position == p->record_count)
			p->position = 0;
	}
	return r;
}

static uint64_t until_event(const struct run *run)
{
	uint64_t next = os_next_event(run->walk.guest), clock = run->walk.guest->clock;
	uint64_t n = next > clock ? next - clock : 0;

	return n < run->budget ? n : run->budget;
}

/* HLT without an exit (KVM_CAP_X86_DISABLE_EXITS), as on hosts that give guests pCPUs of their own.  A host
 * interrupt makes the guest exit; on the next entry it continues to halt (VMCS activity state). */
static uint32_t halted(struct run *run)
{
	struct walk *w = &run->walk;
	struct guest *g = w->guest;

	cpu_guest_halt(w->m, w->cpu->id, g->halted_until);
	if (monotonic_ns() >= g->halted_until)
		g->halted_until = 0;
	return EXIT_REASONS;
}

/* Run the SMI handler to its end, then RSM. */
static uint32_t smm(struct run *run)
{
	struct guest_process *p = &run->walk.guest->smi_handler;
	uint64_t left, done;
	enum walk_result r;

	pass_emulated_store(run, p);
	/* Without paging there is no page fault to inject, unless KVM is wrong: the handler goes on behind the access. */
	p->position += run->walk.guest->injected.pending;
	run->walk.guest->injected.pending = false;
	left = p->record_count - p->position;

	if (!run->budget)
		return EXIT_PREEMPTION_TIMER;
	if (!left)
		return exit_instruction(&run->walk, GUEST_INSN_RSM, 0);
	r = accesses_run(&run->accesses, &run->walk, p->records + p->position, left < run->budget ? left : run->budget, &done);
	p->position += done;
	run->budget -= done;
	return exit_of(&run->walk, r);
}

/* Clear and set CR4.PGE, which exits. */
static uint32_t toggle_pge(struct run *run)
{
	run->walk.guest->choices.sets_pge = true;
	return exit_instruction(&run->walk, GUEST_INSN_MOV_CR4, os_cr4_of(run->walk.guest, false));
}

/* Without EPT: a page fault that KVM has injected, the boot, and the second half of an instruction pair precede what the
 * guest does next.  Returns as step(). */
static uint32_t before_the_next(struct run *run)
{
	struct walk *w = &run->walk;
	struct guest *g = w->guest;
	uint32_t reason;

	if (g->smm)
		return EXIT_REASONS;
	reason = os_role_step(w);
	if (reason != EXIT_REASONS)
		return reason;
	if (!os_inside(w) && os_flush_due(g))
		return exit_of(w, os_flush_step(w));
	if (g->injected.pending && program_takes_fault(g)) {
		g->injected.pending = false;
		return EXIT_REASONS;
	}
	if (g->injected.pending || g->choices.changing) {
		if (!os_enter(w))
			return os_spin(w);
		return os_exit_of(w, os_leave(w, g->choices.changing ? os_change_resumed(w) : os_injected_fault(w)));
	}
	if (g->boot)
		return guest_boot_step(&run->walk);
	if (!g->choices.sets_pge)
		return EXIT_REASONS;
	g->choices.sets_pge = false;
	return exit_instruction(&run->walk, GUEST_INSN_MOV_CR4, os_cr4_of(g, true));
}

/* Return an exit reason; EXIT_REASONS: no exit is needed, go on. */
static uint32_t step(struct run *run)
{
	struct walk *w = &run->walk;
	struct guest *g = w->guest;
	enum walk_result r;
	uint64_t n, operand;
	uint32_t insn, reason;

	if (attention(run)) {
		uint32_t bits = cpu_attention(w->m, w->cpu->id);

		if (w->m->config.hyperv && bits == ATTENTION_IPI && ipi_run_hypervisors(w->m, w->cpu))
			return EXIT_REASONS;
		return bits & ATTENTION_IPI ? EXIT_INTERRUPT : EXIT_MESSAGE;
	}
	if (!w->vmcs->ept) {
		reason = before_the_next(run);
		if (reason != EXIT_REASONS)
			return reason;
	}
	if (g->program)
		return program_step(w, &run->accesses, &run->budget);
	if (g->smm)
		return smm(run);
	if (g->boot)
		return guest_boot_step(&run->walk);
	if (g->moves_to_cr3) {
		r = os_mov_cr3(w);
		if (r != WALK_DONE)
			return exit_of(w, r);
	}
	reason = hypervisor_step(w);
	if (reason != EXIT_REASONS)
		return reason;
	insn = guest_take_insn(g, &operand);
	if (insn == GUEST_INSN_TOGGLE_PGE) {
		count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
		if (!w->vmcs->ept)
			return toggle_pge(run);
		invpcid_all(w->tlb);
	} else if (insn == GUEST_INSN_MOV_CR3 && w->vmcs->ept && g->config.paging) {
		g->new_cr3 = operand;
		g->moves_to_cr3 = true;
		return EXIT_REASONS;
	} else if (insn) {
		return exit_instruction(&run->walk, insn, operand);
	}
	if (g->halted_until)
		return halted(run);
	reason = os_role_begin(w);
	if (reason != EXIT_REASONS)
		return reason;
	if (g->clock >= g->due[GUEST_HALT]) {
		os_schedule(g, GUEST_HALT);
		if (!g->config.halt_us)
			return EXIT_HLT;
		g->halted_until = monotonic_ns() + g->config.halt_us * UINT64_C(1000);
		return EXIT_REASONS;
	}
	if (!os_enter(w))
		return os_spin(w);
	r = os_setup(w);
	if (r == WALK_DONE)
		r = os_events(w);
	if (os_leave(w, r) == WALK_EXIT)
		return os_exit_of(w, r);
	n = until_event(run);
	if (!n)
		return run->budget ? EXIT_REASONS : EXIT_PREEMPTION_TIMER;
	if (!g->processes)
		return EXIT_HLT;
	return exit_of(&run->walk, run_records(run, n));
}

static int enter(struct run *run, struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget,
		 struct vcpu_exit *out)
{
	const struct vmcs *vmcs = vmcs_current(m, cpu);
	struct vcpu *v = &m->vcpus[vcpu];
	struct walk *w = &run->walk;

	if (!irqs_disabled(m, cpu))
		return cpu_misuse(m, cpu, "VM entry on CPU %u with interrupts on", cpu);
	if (vcpu_mode(m, vcpu) == OUTSIDE_GUEST_MODE)
		return cpu_misuse(m, cpu, "VM entry on CPU %u with mode OUTSIDE_GUEST_MODE", cpu);
	if (!vmcs || vmcs->vcpu != vcpu)
		return cpu_misuse(m, cpu, "VM entry on CPU %u, where no VMCS of vCPU %u is current", cpu, vcpu);
	if (!vmcs->root)
		return cpu_misuse(m, cpu, "VM entry on CPU %u of vCPU %u without a root", cpu, vcpu);
	*out = (struct vcpu_exit){ .reason = EXIT_PREEMPTION_TIMER };
	*run = (struct run){ .budget = budget };
	*w = (struct walk){ .m = m, .cpu = &m->cpus[cpu], .tlb = m->cpus[cpu].tlb, .vcpu = v,
			    .vm = &m->vms[v->vm], .guest = v->guest, .exit = out };
	hw_load_context(w, vmcs);
	accesses_begin(&run->accesses, w);
	w->cpu->guest_vm = v->vm;
	w->cpu->interrupted = false;
	if (v->left_guest_at)
		histogram_record(m, cpu, HISTOGRAM_VCPU_PAUSE, monotonic_ns() - v->left_guest_at);
	count(w->cpu->counters, COUNT_VM_ENTRIES, 1);
	count(w->cpu->counters, v->guest == v->guests[0] ? COUNT_LEVEL1_ENTRIES : COUNT_LEVEL2_ENTRIES, 1);
	event_record_more(m, cpu, event_of(v->vm, EVENT_ENTRY), vcpu,
			  vmcs->root | (uint64_t)vcpu_guest_mode(m, vcpu) << EVENT_ENTRY_GUEST, v->guest->clock);
	return 0;
}

/* The order that makes an acknowledgement mean "left the guest": mode, then interrupts, then the queue. */
static int leave(struct run *run, uint32_t reason, uint64_t accesses)
{
	struct walk *w = &run->walk;
	struct counters *c = w->cpu->counters;
	struct vcpu *v = w->vcpu;
	int r;

	w->exit->reason = reason;
	w->exit->accesses = accesses;
	w->exit->attention = cpu_attention(w->m, w->cpu->id);
	/* Before the mode: the exit is complete when it tells that the guest is left.  VM entry does the same, but finds
	 * nothing: such mappings arise in guest mode only. */
	if (!w->vmcs->vpid) {
		vm_transition_no_vpid(w->tlb);
		count(c, COUNT_NO_VPID_EXITS, 1);
	}
	vcpu_set_mode(w->m, v->id, OUTSIDE_GUEST_MODE);
	v->left_guest_at = reason == EXIT_HLT ? 0 : monotonic_ns();
	count(c, COUNT_ACCESSES, accesses);
	count(c, COUNT_POLLS, run->accesses.polls);
	count(c, COUNT_LOOKUPS, run->accesses.lookups);
	count(c, COUNT_CHECKS, run->accesses.checks);
	count(c, COUNT_L1_MISSES, run->accesses.l1_misses);
	count(c, COUNT_EXIT_INTERRUPT + reason, 1);
	count(c, COUNT_INTERRUPTIONS, reason == EXIT_INTERRUPT);
	event_record_more(w->m, w->cpu->id, event_of(v->vm, EVENT_EXIT), v->id, reason, w->guest->clock);
	w->cpu->concerned = w->cpu->kicked = false;
	w->cpu->interrupted = reason == EXIT_INTERRUPT;
	r = local_irq_enable(w->m, w->cpu->id);
	count(c, COUNT_BYSTANDER, reason == EXIT_INTERRUPT && !w->cpu->concerned);
	count(c, COUNT_INTERRUPTIONS_VMCLEAR, reason == EXIT_INTERRUPT && !w->cpu->kicked);
	return r;
}

int guest_run(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget, struct vcpu_exit *out)
{
	struct run run;
	uint32_t reason;
	int r = enter(&run, m, cpu, vcpu, budget, out);

	if (r)
		return r;
	do
		reason = step(&run);
	while (reason == EXIT_REASONS);
	r = leave(&run, reason, budget - run.budget);
	return r < 0 ? r : (int)reason;
}

int guest_access(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t linear, uint32_t type,
		 struct vcpu_exit *out)
{
	uint64_t record = (uint64_t)type << 62 | (linear & UINT64_C(0xffffffffffff)), done = 0;
	uint32_t reason = EXIT_PREEMPTION_TIMER;
	enum walk_result w;
	struct run run;
	int r = enter(&run, m, cpu, vcpu, 1, out);

	if (r)
		return r;
	if (!run.walk.vmcs->ept) {
		reason = before_the_next(&run);
		if (reason != EXIT_REASONS) {
			r = leave(&run, reason, 0);
			return r < 0 ? r : (int)reason;
		}
		reason = EXIT_PREEMPTION_TIMER;
	}
	w = os_setup(&run.walk);
	if (w == WALK_DONE)
		w = accesses_run(&run.accesses, &run.walk, &record, 1, &done);
	/* Attention is set: the access is done all the same. */
	if (w == WALK_DONE && !done) {
		w = accesses_one(&run.walk, record);
		run.walk.guest->clock += w == WALK_DONE;
	}
	if (w == WALK_EXIT || w == WALK_GUEST_FAULT)
		reason = exit_of(&run.walk, w);
	r = leave(&run, reason, reason == EXIT_PREEMPTION_TIMER);
	return r < 0 ? r : (int)reason;
}

/* --- step by step --------------------------------------------------------------------------------------- */

int guest_enter(struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget, struct vcpu_exit *out)
{
	struct cpu *c = &m->cpus[cpu];
	int r;

	if (!c->stepped)
		c->stepped = heap_zalloc(m->heap, 1, sizeof(*c->stepped));
	if (!c->stepped)
		return MACHINE_NOMEM;
	c->stepped_budget = budget;
	r = enter(c->stepped, m, cpu, vcpu, budget, out);
	c->stepped->inside = !r;
	return r;
}

int guest_step(struct machine *m, uint32_t cpu)
{
	return (int)step(m->cpus[cpu].stepped);
}

int guest_speculate(struct machine *m, uint32_t cpu, uint64_t linear)
{
	const struct run *run = m->cpus[cpu].stepped;
	const struct vcpu *v;

	if (!run || !run->inside)
		return cpu_misuse(m, cpu, "speculation on CPU %u outside guest mode", cpu);
	if (!walk_speculatively(&run->walk, linear))
		return 0;
	v = run->walk.vcpu;
	event_record(m, cpu, event_of(v->vm, EVENT_SPECULATE), v->id, linear >> 12 & GUEST_PAGE_MASK);
	return 1;
}

int guest_leave(struct machine *m, uint32_t cpu, uint32_t reason)
{
	struct cpu *c = &m->cpus[cpu];
	int r;

	c->stepped->inside = false;
	r = leave(c->stepped, reason, c->stepped_budget - c->stepped->budget);
	return r < 0 ? r : (int)reason;
}
