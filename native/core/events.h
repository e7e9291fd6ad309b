/* Event rings: the last events of each CPU.  The owner writes, any thread reads: an event that is overwritten
 * during the read may come out mixed, which the report of a violation tolerates; each word is whole.
 */
#ifndef FLUSHLAB_EVENTS_H
#define FLUSHLAB_EVENTS_H

#include "core/machine_types.h"

/* api */
/* Events: a ring per CPU, for the story around a violation. */
enum event_kind {
	EVENT_NONE,
	EVENT_ENTRY,     /* VM entry: vcpu, root, above it (EVENT_ENTRY_GUEST) the number of the nested guest, 0: L1; more: the
			  * guest's clock */
	EVENT_EXIT,      /* VM exit: vcpu, reason; more: the guest's clock */
	EVENT_LOAD,      /* VMCS loaded: vcpu, cpu it was on before */
	EVENT_FLUSH,     /* scope and reason, argument of the instruction */
	EVENT_ELIDED,    /* a flush that the policy elided: reason, argument */
	EVENT_ZAP,       /* gfn, pages; more: gfns between the first and the last */
	EVENT_PROTECT,   /* gfn, pages; more: gfns between the first and the last */
	EVENT_MAP,       /* gfn, frame; more: pages */
	EVENT_REQUEST,   /* vcpu, request */
	EVENT_IPI,       /* mask of 64 pCPUs that were called, the number of all called; more: function,
			  * EVENT_IPI_WAITS if the sender waits, and above it the index of the 64: a call to pCPUs
			  * far apart leaves several events */
	EVENT_PROMISE,   /* promise, first gfn; more: gfns */
	EVENT_FREE,      /* frame */
	EVENT_ROOT_LOAD, /* vcpu, root */
	EVENT_ROOT_FREE, /* root */
	EVENT_ROOT_INVALID, /* root that is obsolete from now on: vCPUs do not find it any more */
	EVENT_GUEST_INVALIDATE, /* vcpu, linear page, UINT64_MAX: all */
	EVENT_YIELD,     /* vm, flushed */
	EVENT_UNLOAD,    /* VMCLEAR by IPI: vcpu */
	EVENT_SPECULATE, /* a translation filled without an access: vcpu, linear page (gfn without paging) */
	EVENT_EVICT,     /* cached mappings that were dropped by no flush: page, or their number; enum evicted */
	EVENT_STORE,     /* a store of a guest program: vcpu, gfn; more: the guest's clock, which is the value stored */
	EVENT_LOG_ARM,   /* user space has begun to log a VM's slots, and has copied them whole: slots */
	EVENT_LOG_GET,   /* user space has read a dirty log: first gfn of the slot, pages that the log named */
	EVENT_LOG_CLEAR, /* user space has cleared marks in a dirty log: first gfn, pages asked for as bits */
	EVENT_LOG_END,   /* user space has aborted its migration */
	EVENT_COPY,      /* user space has copied pages: first page, mask */
	EVENT_VMFAIL,    /* an INVEPT or INVVPID that failed and invalidated nothing: scope and reason, operand */
	EVENT_HYPERCALL, /* a hypercall flushes an EPT on all pCPUs: root, first gfn; more: gfns, 0 for all */
	EVENT_LOST,      /* in stories: older events of this CPU are unknown; the number that its ring has lost */
	EVENTS
};
enum { EVENT_IPI_WAITS = 1 << 15, EVENT_IPI_WORD = 16, EVENT_ENTRY_GUEST = 32 };
enum evicted { EVICT_PAGE, EVICT_TABLES, EVICT_PHYSICAL };

struct event {
	uint64_t time;
	uint32_t kind;
	uint32_t cpu;
	uint32_t vm;   /* 0xffff: none, or not given */
	uint32_t more; /* low 32 bits */
	uint64_t a;
	uint64_t b;
};

/* call: local; keeps-gil */
void event_record(struct machine *m, uint32_t cpu, uint32_t kind, uint64_t a, uint64_t b);
/* Return the number of events that a CPU has recorded so far. */
/* call: anything */
uint64_t events_count(struct machine *m, uint32_t cpu);
/* Copy the last events of a CPU, oldest first; returns their number (the ring holds 1024). */
/* call: anything */
uint32_t events_read(struct machine *m, uint32_t cpu, struct event *events, uint32_t max);
/* end api */

enum { EVENT_NO_VM = 0xffff, EVENT_RING = 1024 };

/* Return the kind of an event that belongs to a VM, for event_record() and event_record_more(). */
static inline uint32_t event_of(uint32_t vm, uint32_t kind)
{
	return (vm + 1) << 16 | kind;
}

void event_record_more(struct machine *m, uint32_t cpu, uint32_t kind, uint64_t a, uint64_t b, uint64_t more);

struct event_slot {
	_Atomic uint64_t time;
	_Atomic uint64_t kind; /* bits 0-15 kind, 16-31 VM + 1, 32-63 more */
	_Atomic uint64_t a;
	_Atomic uint64_t b;
};

struct event_ring {
	alignas(CACHELINE) _Atomic uint64_t next;
	struct event_slot slot[EVENT_RING];
};

/* Return the event at this position of a ring. */
struct event event_at(const struct event_ring *ring, uint64_t position, uint32_t cpu);
/* Start the rings over.  No CPU may act meanwhile. */
void events_forget(struct machine *m);

int events_create(struct machine *m);
void events_destroy(struct machine *m);

#endif
