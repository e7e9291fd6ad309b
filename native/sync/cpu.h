/* CPUs: attention, the event that every wait sleeps on, interrupt flag, halting, going offline.
 *
 * One thread drives one CPU.  It sleeps in exactly one place, on its own `event`; any thread that may end one
 * of its waits calls cpu_wake().  While it waits it keeps running the calls that others queued for it (ipi.h),
 * so two pCPUs that interrupt each other cannot deadlock.  A CPU asleep in any wait, not only in cpu_halt(), is
 * HALTED: a sender runs its calls for it instead of waking it.
 *
 * pCPUs start OFFLINE: their thread calls cpu_online() before anything else.  Housekeeping CPUs start RUNNING.
 *
 * Pairings:
 *   P1  waiter: read event; test condition; power = HALTED; sleep iff event unchanged (futex)
 *       waker:  make condition true; add to event; read power; wake if asleep
 *                                                                           -- all sequentially consistent
 *   P2  target: power = HALTED; test call queue; sleep
 *       sender: queue the call; read power                                  -- Dekker, sequentially consistent
 *   P3  servicer: power = HALTED (or OFFLINE) again; test call queue
 *       sender:   queue the call; read power, go if SERVICED                -- Dekker, sequentially consistent
 *   P5  target: power = GUEST_HALTED; test attention; sleep
 *       sender: set attention; read power, wake if asleep                   -- Dekker, sequentially consistent
 *   P4  owner and servicers hand the CPU's plain fields to each other through power:
 *       compare-and-swap acquires, the store or compare-and-swap that leaves a state releases
 */
#ifndef FLUSHLAB_CPU_H
#define FLUSHLAB_CPU_H

#include "core/machine_types.h"

/* api */
/* Reasons for a CPU to leave its current activity at the next poll. */
enum attention {
	ATTENTION_IPI = 1,     /* the call queue went from empty to not empty */
	ATTENTION_MESSAGE = 2, /* a message waits in the actor's inbox */
	ATTENTION_RESCHED = 4, /* need_resched(): another vCPU is to run on this CPU */
	ATTENTION_STOP = 8,    /* the machine stops */
};

enum power {
	CPU_RUNNING = 0,
	CPU_HALTED = 1,   /* sleeps; a sender may take it to SERVICED and run its calls */
	CPU_SERVICED = 2, /* a sender runs its calls; a wake-up waits for the end of that */
	CPU_OFFLINE = 3,  /* acknowledges every call without running it; like HALTED for senders */
	CPU_GUEST_HALTED = 4, /* asleep in guest mode: an interrupt wakes it and makes it exit */
};

/* Called by the CPU's thread: hlt until attention other than IPI is non-zero, then return it.  timeout_us 0: no
 * time limit.  Serves calls meanwhile.  Returns attention bits (0 on timeout) or an error.  While the machine
 * stops, pending messages are still announced (with ATTENTION_STOP); without any, it returns MACHINE_STOPPED.
 * MACHINE_MISUSE with interrupts off, inside an RCU read section or under mmu_lock. */
/* call: anything */
int cpu_halt(struct machine *m, uint32_t cpu, uint64_t timeout_us);
/* Return the current attention bits. */
/* call: aside; keeps-gil */
uint32_t cpu_attention(struct machine *m, uint32_t cpu);
/* Any thread: set attention bits and interrupt the CPU's wait or guest. */
/* call: anything; keeps-gil */
void cpu_notify(struct machine *m, uint32_t cpu, uint32_t bits);
/* Called by the CPU's thread: clear bits (ATTENTION_STOP and ATTENTION_IPI stay). */
/* call: anything; keeps-gil */
void cpu_clear_attention(struct machine *m, uint32_t cpu, uint32_t bits);

/* Event count for waits on a condition that Python tests: seq = cpu_event(); test; cpu_wait_event(seq).
 * Returns 0 when the event moved on or the timeout passed (timeout_us 0: none), or an error. */
/* call: aside; keeps-gil */
uint32_t cpu_event(struct machine *m, uint32_t cpu);
/* call: modelled; fence */
int cpu_wait_event(struct machine *m, uint32_t cpu, uint32_t seq, uint64_t timeout_us);
/* Any thread: end a wait of this CPU. */
/* call: modelled; fence; keeps-gil */
void cpu_wake(struct machine *m, uint32_t cpu);

/* The interrupt flag, which does not nest.  While interrupts are off no call runs on this CPU and waiting is
 * MACHINE_MISUSE; the message about that names `where` (copied).  Enabling runs the calls that were queued
 * meanwhile. */
/* call: modelled; keeps-gil */
int local_irq_disable(struct machine *m, uint32_t cpu, const char *where);
int local_irq_enable(struct machine *m, uint32_t cpu);
/* call: local; keeps-gil */
int irqs_disabled(struct machine *m, uint32_t cpu);

/* Take the CPU online; its waits and calls begin to work.  cpu_offline() is in offline.h. */
/* call: anything */
void cpu_online(struct machine *m, uint32_t cpu);
/* call: aside; keeps-gil */
int cpu_power(struct machine *m, uint32_t cpu);
/* For a CPU without a thread of its own, which several threads drive in turn.  cpu_idle() leaves it to senders
 * (HALTED, they run its calls); the next thread takes it with cpu_take(), which also takes it online.  0 or
 * MACHINE_OFFLINE. */
/* call: modelled; fence */
int cpu_idle(struct machine *m, uint32_t cpu);
/* call: modelled */
int cpu_take(struct machine *m, uint32_t cpu);
/* end api */

/* Decide whether this CPU may wait now: 0, or MACHINE_MISUSE with a message.  `what` names the wait. */
int cpu_may_wait(struct machine *m, uint32_t cpu, const char *what);

/* Write the message of a MACHINE_MISUSE for machine_error_text(); returns MACHINE_MISUSE. */
int cpu_misuse(struct machine *m, uint32_t cpu, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* One turn of a wait: serve calls, spin a little, then sleep until event != seq.  The caller loops:
 *     struct wait w = wait_begin(m, cpu);
 *     while (!condition) { int r = wait_turn(&w); if (r) return r; }
 * wait_turn reads the event before the caller tests the condition again (P1). */
struct wait {
	struct machine *m;
	uint32_t cpu;
	uint32_t seq;
	uint64_t started;  /* monotonic ns of the first turn; 0: none yet */
	uint64_t counted;  /* time up to which COUNT_WAIT_NANOSECONDS includes it */
	uint64_t sleep_ns; /* longest single sleep; 0: no limit */
	bool sleeps;       /* the next turn sleeps: a waiter that must request its wake-up does so now */
	bool ignore_stop;  /* for waits that must finish while the machine stops */
	bool idle;         /* idle, not waiting for another CPU: not counted */
};
struct wait wait_begin(struct machine *m, uint32_t cpu);
int wait_turn(struct wait *w);

/* Going offline (offline.h).  cpu_seize() takes the CPU from its thread, which runs or sleeps, with its interrupts
 * on; false: it is offline already.  cpu_retire() then runs its queue and marks it offline: its waits return
 * MACHINE_OFFLINE. */
bool cpu_seize(struct machine *m, uint32_t cpu);
void cpu_retire(struct machine *m, uint32_t cpu);

/* HLT in guest mode, without an exit: sleep until attention is set, at most until `until` (monotonic ns).
 * Senders do not service this CPU's calls but wake it: it must leave guest mode to acknowledge. */
void cpu_guest_halt(struct machine *m, uint32_t cpu, uint64_t until);

#endif
