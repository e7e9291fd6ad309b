/* Guest mode: from VM entry to VM exit.  Each guest access takes one interrupt poll, one TLB look-up and one
 * custody check. */
#include "counters.h"
#include "frame.h"
#include "guest_os.h"
#include "tlb_internal.h"
#include "vm.h"

#define RECORD_PAGE(record) ((record) >> 12 & GUEST_PAGE_MASK)
/* The same in fewer instructions, if bits 48 to 61 are 0, as they should be. */
#define RECORD_PAGE_FAST(record) ((record) << 2 >> 14)
#define RECORD_TYPE(record) ((uint32_t)((record) >> 62))
#define RECORD_WORD(record) ((uint32_t)(record) >> 3 & 511)

enum { FAULTS_IN_A_ROW = 16 };

struct run {
	struct walk walk;
	uint64_t budget;
	uint64_t polls, lookups, checks, l1_misses;
};

static void store(struct walk *w, const struct tlb_entry *e, uint64_t record)
{
	uint32_t hfn = e->hfn + (uint32_t)(RECORD_PAGE(record) - e->page);

	/* Relaxed: guest memory. */
	if (RECORD_TYPE(record) == ACCESS_WRITE)
		atomic_store_explicit(guest_word(w->m, hfn, RECORD_WORD(record)), w->guest->clock,
				      memory_order_relaxed);
}

/* Walk, with the page faults on the way. */
static enum walk_result walk(struct walk *w, uint64_t record)
{
	uint64_t page = RECORD_PAGE(record);
	uint32_t type = RECORD_TYPE(record);
	enum walk_result r = WALK_GUEST_FAULT;
	struct tlb_entry e;

	for (int i = 0; i < FAULTS_IN_A_ROW && r == WALK_GUEST_FAULT; i++) {
		r = w->guest->config.paging ? walk_linear(w, page, type, &e) : walk_physical(w, page, type, &e);
		if (r == WALK_GUEST_FAULT && os_page_fault(w, page, type) == WALK_EPT_VIOLATION)
			return WALK_EPT_VIOLATION;
	}
	if (r == WALK_DONE)
		store(w, &e, record);
	return r;
}

/* Neither level had it.  ghost: what tlb_ghost() says, or NULL. */
static enum walk_result guest_access_miss(struct walk *w, uint64_t record, const struct tlb_entry *ghost)
{
	w->linear = record & (GUEST_PAGE_MASK << 12 | 0xfff);
	count(w->cpu->counters, COUNT_L2_MISSES, 1);
	/* Without paging the walk looks the same translation up again, and minds the ghost. */
	if (ghost && w->guest->config.paging)
		walk_ghost(w, ghost, RECORD_PAGE(record), RECORD_TYPE(record));
	return walk(w, record);
}

enum walk_result guest_access_slow(struct walk *w, uint64_t record)
{
	uint64_t page = RECORD_PAGE(record);
	struct tlb_entry e;
	int hit;

	w->linear = page << 12 | (record & 0xfff);
	hit = tlb_refill_l1(w->tlb, page, &e);
	if (hit != 1)
		return guest_access_miss(w, record, hit ? &e : NULL);
	if (!walk_check(w, &e, page, RECORD_TYPE(record), 0))
		return walk(w, record);
	store(w, &e, record);
	return WALK_DONE;
}

/* A record that the first level cannot do.  Not in the TLB at all (`missed`): a walk, which checks.  Else its right
 * did not hold. */
static __attribute__((noinline)) enum walk_result finish_record(struct walk *w, uint64_t record, bool missed)
{
	enum walk_result r = missed ? guest_access_miss(w, record, tlb_ghost(w->tlb)) : guest_access_slow(w, record);

	return r == WALK_SKIPPED ? WALK_DONE : r;
}

/* Records up to `n` as far as they can be done: WALK_DONE, which also means that attention is wanted, or why the
 * next one cannot.  *done: how many were. */
static enum walk_result run_stretch(struct run *run, const uint64_t *records, uint64_t n, uint64_t *done)
{
	struct walk *w = &run->walk;
	struct tlb *tlb = w->tlb;
	const _Atomic uint32_t *attention = &w->cpu->attention;
	const _Atomic uint16_t *tag = w->m->frames->tag;
	uint8_t *memory = w->m->frames->memory;
	uint32_t life = w->life_bits;
	uint64_t clock = w->guest->clock, misses = tlb->l1_misses, i;
	struct tlb_view view = tlb_l1_view(&tlb->l1);
	enum walk_result r = WALK_DONE;

	for (i = 0; i < n; i++) {
		uint64_t record = records[i];
		uint32_t type = RECORD_TYPE(record);
		struct tlb_hot *hot;

		/* The poll.  Relaxed: whoever notices acquires when it takes the queue. */
		if (__builtin_expect(atomic_load_explicit(attention, memory_order_relaxed), 0))
			break;
		/* The look-up. */
		hot = tlb_l1_hinted(&tlb->l1, view, RECORD_PAGE_FAST(record));
		if (__builtin_expect(!hot, 0)) {
			hot = tlb_l1_miss(tlb, RECORD_PAGE(record));
			view = tlb_l1_view(&tlb->l1);
			if (!hot)
				goto slow;
		}
		tlb_l1_touch(hot, view);
		/* The check. */
		if (__builtin_expect((atomic_load_explicit(&tag[hot->hfn], memory_order_relaxed) | life) !=
					     hot->right[type], 0))
			goto slow;
		if (type == ACCESS_WRITE)
			atomic_store_explicit((_Atomic uint64_t *)(void *)(memory + ((uint64_t)hot->hfn << 12) +
									   (record & 0xff8)),
					      clock + i, memory_order_relaxed);
		continue;
slow:
		w->guest->clock = clock + i;
		r = finish_record(w, record, !hot);
		if (r != WALK_DONE)
			break;
		/* A page fault may have taken time. */
		clock = w->guest->clock - i;
		view = tlb_l1_view(&tlb->l1);
	}
	w->guest->clock = r == WALK_DONE ? clock + i : w->guest->clock;
	run->polls += i + (i < n);
	run->lookups += i + (r != WALK_DONE);
	run->checks += i + (r != WALK_DONE);
	run->l1_misses += tlb->l1_misses - misses;
	*done = i;
	return r;
}

static bool attention(const struct run *run)
{
	return atomic_load_explicit(&run->walk.cpu->attention, memory_order_relaxed) != 0;
}

/* Records up to `n` of the current process; WALK_DONE also when attention is wanted. */
static enum walk_result run_records(struct run *run, uint64_t n)
{
	struct guest_process *p = &run->walk.guest->process[run->walk.guest->current];
	enum walk_result r = WALK_DONE;

	while (n && r == WALK_DONE && !attention(run)) {
		uint64_t left = p->record_count - p->position, done;

		r = run_stretch(run, p->records + p->position, n < left ? n : left, &done);
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

/* HLT without an exit (KVM_CAP_X86_DISABLE_EXITS), as on hosts that give guests pCPUs of their own.  An interrupt
 * of the host makes the guest exit; entered again it goes on halting (VMCS activity state). */
static uint32_t halted(struct run *run)
{
	struct walk *w = &run->walk;
	struct guest *g = w->guest;

	cpu_guest_halt(w->m, w->cpu->id, g->halted_until);
	if (monotonic_ns() >= g->halted_until)
		g->halted_until = 0;
	return EXIT_REASONS;
}

static uint32_t exit_of(enum walk_result r)
{
	return r == WALK_EPT_VIOLATION ? EXIT_EPT_VIOLATION : r == WALK_GUEST_FAULT ? EXIT_TRIPLE_FAULT
										     : EXIT_REASONS;
}

static uint32_t instruction(struct run *run, uint32_t insn, uint64_t operand)
{
	run->walk.exit->access = insn;
	run->walk.exit->linear = operand;
	return EXIT_INSTRUCTION;
}

/* The SMI handler, to its end, and RSM. */
static uint32_t smm(struct run *run)
{
	struct guest_process *p = &run->walk.guest->smi_handler;
	uint64_t left = p->record_count - p->position, done;
	enum walk_result r;

	if (!run->budget)
		return EXIT_PREEMPTION_TIMER;
	if (!left)
		return instruction(run, GUEST_INSN_RSM, 0);
	r = run_stretch(run, p->records + p->position, left < run->budget ? left : run->budget, &done);
	p->position += done;
	run->budget -= done;
	return exit_of(r);
}

/* Returns an exit reason; EXIT_REASONS: nothing happened that needs one, go on. */
static uint32_t step(struct run *run)
{
	struct walk *w = &run->walk;
	struct guest *g = w->guest;
	enum walk_result r;
	uint64_t n, operand;
	uint32_t insn;

	if (attention(run))
		return cpu_attention(w->m, w->cpu->id) & ATTENTION_IPI ? EXIT_INTERRUPT : EXIT_MESSAGE;
	if (g->smm)
		return smm(run);
	insn = guest_take_insn(g, &operand);
	if (insn == GUEST_INSN_TOGGLE_PGE) {
		invpcid_all(w->tlb);
		count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	} else if (insn) {
		return instruction(run, insn, operand);
	}
	if (g->halted_until)
		return halted(run);
	if (g->clock >= g->due[GUEST_HALT]) {
		os_schedule(g, GUEST_HALT);
		if (!g->config.halt_us)
			return EXIT_HLT;
		g->halted_until = monotonic_ns() + g->config.halt_us * UINT64_C(1000);
		return EXIT_REASONS;
	}
	r = os_setup(w);
	if (r == WALK_DONE)
		r = os_events(w);
	if (r == WALK_EPT_VIOLATION)
		return EXIT_EPT_VIOLATION;
	n = until_event(run);
	if (!n)
		return run->budget ? EXIT_REASONS : EXIT_PREEMPTION_TIMER;
	if (!g->processes)
		return EXIT_HLT;
	return exit_of(run_records(run, n));
}

static int enter(struct run *run, struct machine *m, uint32_t cpu, uint32_t vcpu, uint64_t budget,
		 struct vcpu_exit *out)
{
	struct vcpu *v = &m->vcpus[vcpu];
	struct walk *w = &run->walk;

	if (!irqs_disabled(m, cpu))
		return cpu_misuse(m, cpu, "VM entry on CPU %u with interrupts on", cpu);
	if (vcpu_mode(m, vcpu) == OUTSIDE_GUEST_MODE)
		return cpu_misuse(m, cpu, "VM entry on CPU %u with mode OUTSIDE_GUEST_MODE", cpu);
	*out = (struct vcpu_exit){ .reason = EXIT_PREEMPTION_TIMER };
	*run = (struct run){ .budget = budget };
	*w = (struct walk){ .m = m, .cpu = &m->cpus[cpu], .tlb = m->cpus[cpu].tlb, .vcpu = v,
			    .guest = v->guest, .life_bits = v->guest->life << 16, .exit = out };
	w->cpu->guest_vm = v->vm;
	w->cpu->interrupted = false;
	if (v->left_guest_at)
		histogram_record(m, cpu, HISTOGRAM_VCPU_PAUSE, monotonic_ns() - v->left_guest_at);
	count(w->cpu->counters, COUNT_VM_ENTRIES, 1);
	event_record_more(m, cpu, event_of(v->vm, EVENT_ENTRY), vcpu, v->guest->root, v->guest->clock);
	os_load_context(w);
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
	vcpu_set_mode(w->m, v->id, OUTSIDE_GUEST_MODE);
	v->left_guest_at = reason == EXIT_HLT ? 0 : monotonic_ns();
	count(c, COUNT_ACCESSES, accesses);
	count(c, COUNT_POLLS, run->polls);
	count(c, COUNT_LOOKUPS, run->lookups);
	count(c, COUNT_CHECKS, run->checks);
	count(c, COUNT_L1_MISSES, run->l1_misses);
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
	w = os_setup(&run.walk);
	if (w == WALK_DONE)
		w = run_stretch(&run, &record, 1, &done);
	/* Wanted elsewhere: the access is done all the same. */
	if (w == WALK_DONE && !done) {
		w = finish_record(&run.walk, record, false);
		run.walk.guest->clock += w == WALK_DONE;
	}
	if (w == WALK_EPT_VIOLATION)
		reason = EXIT_EPT_VIOLATION;
	else if (w == WALK_GUEST_FAULT)
		reason = EXIT_TRIPLE_FAULT;
	r = leave(&run, reason, reason == EXIT_PREEMPTION_TIMER);
	return r < 0 ? r : (int)reason;
}
