#define _GNU_SOURCE
#include "sync/cpu.h"

#include <linux/futex.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "core/chaos.h"
#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "sync/ipi.h"

/* Where the orders below are sequentially consistent, the pairing is P1 to P3 of cpu.h. */
#define SEQ_CST memory_order_seq_cst

static void futex_wait(_Atomic uint32_t *word, uint32_t value, uint64_t nanoseconds)
{
	struct timespec limit = {
		.tv_sec = (time_t)(nanoseconds / 1000000000u),
		.tv_nsec = (long)(nanoseconds % 1000000000u),
	};

	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nanoseconds ? &limit : NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

int cpu_misuse(struct machine *m, uint32_t cpu, const char *format, ...)
{
	struct cpu *c = &m->cpus[cpu];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(c->error, sizeof(c->error), format, arguments);
	va_end(arguments);
	return MACHINE_MISUSE;
}

int cpu_may_wait(struct machine *m, uint32_t cpu, const char *what)
{
	const struct cpu *c = &m->cpus[cpu];

	if (c->in_call)
		return cpu_misuse(m, cpu, "%s on CPU %u inside an IPI function", what, cpu);
	if (c->irqs_off)
		return cpu_misuse(m, cpu, "%s on CPU %u with interrupts off since %s", what, cpu,
				  c->irqs_off_where);
	return 0;
}

/* --- attention and event ------------------------------------------------------------------------- */

uint32_t cpu_attention(struct machine *m, uint32_t cpu)
{
	return atomic_load_explicit(&m->cpus[cpu].attention, SEQ_CST);
}

void cpu_notify(struct machine *m, uint32_t cpu, uint32_t bits)
{
	atomic_fetch_or_explicit(&m->cpus[cpu].attention, bits, SEQ_CST);
	chaos_point(m, cpu);
	cpu_wake(m, cpu);
}

void cpu_clear_attention(struct machine *m, uint32_t cpu, uint32_t bits)
{
	bits &= ~(uint32_t)(ATTENTION_STOP | ATTENTION_IPI);
	atomic_fetch_and_explicit(&m->cpus[cpu].attention, ~bits, SEQ_CST);
}

uint32_t cpu_event(struct machine *m, uint32_t cpu)
{
	return atomic_load_explicit(&m->cpus[cpu].event, SEQ_CST);
}

void cpu_wake(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];
	uint32_t power;

	atomic_fetch_add_explicit(&c->event, 1, SEQ_CST);
	power = atomic_load_explicit(&c->power, SEQ_CST);
	if (power == CPU_HALTED || power == CPU_SERVICED || power == CPU_GUEST_HALTED)
		futex_wake(&c->event);
}

/* --- power ---------------------------------------------------------------------------------------- */

static bool power_change(struct cpu *c, uint32_t from, uint32_t to)
{
	return atomic_compare_exchange_strong_explicit(&c->power, &from, to, SEQ_CST, SEQ_CST);
}

/* A sender services this CPU: that is bounded, but the sender's thread may not be running. */
static void power_pause(uint32_t turn)
{
	if (turn & 63)
		cpu_relax();
	else
		sched_yield();
}

static int cpu_resume(struct machine *m, struct cpu *c)
{
	for (uint32_t turn = 1;; turn++) {
		if (power_change(c, CPU_HALTED, CPU_RUNNING)) {
			chaos_point(m, c->id);
			return 0;
		}
		if (atomic_load_explicit(&c->power, SEQ_CST) == CPU_OFFLINE)
			return MACHINE_OFFLINE;
		power_pause(turn);
	}
}

/* The one place where a CPU's thread sleeps.  HALTED meanwhile: senders run its calls. */
static int cpu_sleep(struct machine *m, struct cpu *c, uint32_t seq, uint64_t nanoseconds)
{
	chaos_point(m, c->id);
	if (!power_change(c, CPU_RUNNING, CPU_HALTED))
		return MACHINE_OFFLINE;
	chaos_point(m, c->id);
	/* P2: a sender that still saw RUNNING has queued its call before this test. */
	if (!ipi_queued(c))
		futex_wait(&c->event, seq, nanoseconds);
	return cpu_resume(m, c);
}

bool cpu_seize(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	for (uint32_t turn = 1; !power_change(c, CPU_RUNNING, CPU_SERVICED); turn++) {
		if (power_change(c, CPU_HALTED, CPU_SERVICED))
			break;
		if (atomic_load_explicit(&c->power, SEQ_CST) == CPU_OFFLINE)
			return false;
		power_pause(turn);
	}
	c->irqs_off = 0;
	c->in_call = 0;
	return true;
}

void cpu_retire(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	/* The calls are executed, as by a CPU that the kernel takes offline (smpcfd_dying_cpu()): their senders rely on
	 * them until the CPU is seen to be offline.  VMPTRLD elsewhere needs the VMCLEAR. */
	ipi_run_queue(m, c);
	chaos_point(m, cpu);
	atomic_store_explicit(&c->power, CPU_OFFLINE, SEQ_CST);
	chaos_point(m, cpu);
	/* P3: a sender that queued meanwhile saw SERVICED and left its call to us. */
	if (ipi_queued(c))
		ipi_kick(m, cpu, c);
	atomic_fetch_add_explicit(&c->event, 1, SEQ_CST);
	futex_wake(&c->event);
}

void cpu_online(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	for (uint32_t turn = 1; !power_change(c, CPU_OFFLINE, CPU_RUNNING); turn++) {
		if (atomic_load_explicit(&c->power, SEQ_CST) == CPU_RUNNING)
			return;
		power_pause(turn);
	}
	chaos_point(m, cpu);
	ipi_drain(m, cpu);
}

int cpu_idle(struct machine *m, uint32_t cpu)
{
	struct cpu *c = &m->cpus[cpu];

	ipi_drain(m, cpu);
	if (!power_change(c, CPU_RUNNING, CPU_HALTED))
		return MACHINE_OFFLINE;
	chaos_point(m, cpu);
	/* P2: a sender that still saw RUNNING left it to this CPU's next poll, which may be far off. */
	if (ipi_queued(c))
		ipi_kick(m, cpu, c);
	return 0;
}

int cpu_take(struct machine *m, uint32_t cpu)
{
	if (cpu_power(m, cpu) == CPU_OFFLINE)
		cpu_online(m, cpu);
	else if (cpu_resume(m, &m->cpus[cpu]))
		return MACHINE_OFFLINE;
	ipi_drain(m, cpu);
	return 0;
}

int cpu_power(struct machine *m, uint32_t cpu)
{
	return (int)atomic_load_explicit(&m->cpus[cpu].power, SEQ_CST);
}

/* --- interrupt flag -------------------------------------------------------------------------------- */

int local_irq_disable(struct machine *m, uint32_t cpu, const char *where)
{
	struct cpu *c = &m->cpus[cpu];

	if (c->irqs_off)
		return 0;
	ipi_drain(m, cpu);
	c->irqs_off = 1;
	snprintf(c->irqs_off_where, sizeof(c->irqs_off_where), "%s", where ? where : "?");
	return 0;
}

int local_irq_enable(struct machine *m, uint32_t cpu)
{
	m->cpus[cpu].irqs_off = 0;
	ipi_drain(m, cpu);
	return 0;
}

int irqs_disabled(struct machine *m, uint32_t cpu)
{
	return m->cpus[cpu].irqs_off != 0;
}

/* --- waits ------------------------------------------------------------------------------------------ */

struct wait wait_begin(struct machine *m, uint32_t cpu)
{
	return (struct wait){
		.m = m,
		.cpu = cpu,
		.seq = cpu_event(m, cpu),
		.sleeps = m->spin_ns == 0,
	};
}

static int wait_ended(const struct wait *w, const struct cpu *c)
{
	if (!w->ignore_stop && atomic_load_explicit(&w->m->stopping, SEQ_CST))
		return MACHINE_STOPPED;
	if (atomic_load_explicit(&c->power, SEQ_CST) == CPU_OFFLINE)
		return MACHINE_OFFLINE;
	return cpu_may_wait(w->m, w->cpu, "a wait");
}

static void wait_account(struct wait *w, struct cpu *c, uint64_t now)
{
	if (!w->started)
		w->started = w->counted = now;
	if (!w->idle)
		count(c->counters, COUNT_WAIT_NANOSECONDS, now - w->counted);
	w->counted = now;
	w->sleeps = now - w->started >= w->m->spin_ns;
}

int wait_turn(struct wait *w)
{
	struct cpu *c = &w->m->cpus[w->cpu];
	int r = wait_ended(w, c);

	if (r)
		return r;
	if (!w->started)
		wait_account(w, c, monotonic_ns());
	if (w->sleeps)
		r = cpu_sleep(w->m, c, w->seq, w->sleep_ns);
	else
		cpu_relax();
	if (r)
		return r;
	ipi_drain(w->m, w->cpu);
	wait_account(w, c, monotonic_ns());
	w->seq = cpu_event(w->m, w->cpu);
	return 0;
}

static uint64_t deadline_after(uint64_t timeout_us)
{
	uint64_t longest = 365ull * 24 * 3600 * 1000000;

	if (!timeout_us)
		return 0;
	return monotonic_ns() + (timeout_us < longest ? timeout_us : longest) * 1000;
}

/* Set how long the next turn may sleep; false once the deadline has passed. */
static bool deadline_set(struct wait *w, uint64_t deadline)
{
	uint64_t now;

	if (!deadline)
		return true;
	now = monotonic_ns();
	if (now >= deadline)
		return false;
	w->sleep_ns = deadline - now;
	return true;
}

static int cpu_may_halt(struct machine *m, uint32_t cpu)
{
	const struct cpu *c = &m->cpus[cpu];

	if (c->rcu_depth)
		return cpu_misuse(m, cpu, "cpu_halt on CPU %u inside an RCU read section", cpu);
	if (c->locks_held)
		return cpu_misuse(m, cpu, "cpu_halt on CPU %u under mmu_lock", cpu);
	return cpu_may_wait(m, cpu, "cpu_halt");
}

int cpu_halt(struct machine *m, uint32_t cpu, uint64_t timeout_us)
{
	uint64_t deadline = deadline_after(timeout_us);
	int r = cpu_may_halt(m, cpu);
	struct wait w;

	if (r)
		return r;
	ipi_drain(m, cpu);
	w = wait_begin(m, cpu);
	w.idle = true;
	while (deadline_set(&w, deadline)) {
		uint32_t bits = cpu_attention(m, cpu) & ~(uint32_t)ATTENTION_IPI;

		if (bits & ~(uint32_t)ATTENTION_STOP)
			return (int)bits;
		r = wait_turn(&w);
		if (r)
			return r;
	}
	return 0;
}

void cpu_guest_halt(struct machine *m, uint32_t cpu, uint64_t until)
{
	struct cpu *c = &m->cpus[cpu];
	uint32_t seq = cpu_event(m, cpu);
	uint64_t now = monotonic_ns();

	chaos_point(m, cpu);
	if (now >= until || !power_change(c, CPU_RUNNING, CPU_GUEST_HALTED))
		return;
	chaos_point(m, cpu);
	/* P5 */
	if (!cpu_attention(m, cpu))
		futex_wait(&c->event, seq, until - now);
	power_change(c, CPU_GUEST_HALTED, CPU_RUNNING);
}

int cpu_wait_event(struct machine *m, uint32_t cpu, uint32_t seq, uint64_t timeout_us)
{
	uint64_t deadline = deadline_after(timeout_us);
	int r = cpu_may_wait(m, cpu, "cpu_wait_event");
	struct wait w;

	if (r)
		return r;
	ipi_drain(m, cpu);
	w = wait_begin(m, cpu);
	while (w.seq == seq && deadline_set(&w, deadline)) {
		r = wait_turn(&w);
		if (r)
			return r;
	}
	return atomic_load_explicit(&m->stopping, SEQ_CST) ? MACHINE_STOPPED : 0;
}
