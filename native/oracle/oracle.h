/* The oracle: judges every use of a translation, never its presence.
 *
 * Right: (VM, gfn, host frame, read or write).  Granted by a leaf SPTE, ungranted when that SPTE goes or loses
 * write access, revoked when the operation that removed it *completes*: the moment at which KVM promises that
 * it is not used any more.  A use is a violation iff the right was valid at no moment since the last completed
 * revocation.
 *
 * The ledger holds the state of the rights of each gfn; it is exact.  Frame tags (frame.h) only tell that a
 * change happened: the fast check of an access compares one word, and a mismatch comes here.
 *
 * Order: SPTE, then ledger, then tag.  A checker reads the tag first, so that a change that it misses in the
 * ledger makes its refreshed tag old again.
 */
#ifndef FLUSHLAB_ORACLE_H
#define FLUSHLAB_ORACLE_H

#include "sync/cpu.h"
#include "tlb/tlb.h"

/* api */
/* Most specific first. */
enum violation {
	VIOLATION_CROSS_VM,
	VIOLATION_FOREIGN_ROOT,
	VIOLATION_WALK_AFTER_FREE,
	VIOLATION_USE_AFTER_FREE,
	VIOLATION_STALE_AFTER_REVOKE,
	VIOLATION_GUEST_STALE,
	VIOLATION_LOST_DIRTY,
	VIOLATION_IPI_STALL,
	VIOLATION_RCU_STALL,
	VIOLATION_DEADLOCK,
	VIOLATIONS
};

/* KVM's promises, and the moment at which each is made: see kvm_mmu_notifier_invalidate_range_start,
 * kvm_set_memslot, kvm_vm_ioctl_get_dirty_log, kvm_zap_gfn_range. */
enum promise {
	PROMISE_NONE,
	PROMISE_NOTIFIER,       /* invalidate_range_start returned: the range is not used */
	PROMISE_NOTIFIER_WRITE, /* invalidate_range_start returned: the range is not written (mprotect,
				 * copy-on-write, KSM) */
	PROMISE_MEMSLOT,        /* the slot is gone */
	PROMISE_ZAP_RANGE,      /* kvm_zap_gfn_range returned */
	PROMISE_DIRTY_LOG,      /* every later write is logged */
	PROMISE_FREE,           /* the frame was freed */
	PROMISE_GUEST,          /* the guest invalidated its own mapping on this vCPU */
	PROMISES
};

/* Take a ticket, a moment in the history of a VM's rights, after an operation has changed SPTEs and before its
 * flush. */
uint64_t oracle_ticket(struct machine *m, uint32_t vm);
/* The operation behind `promise` on gfns [start, end) is complete.  Its flush has covered the rights that were
 * removed before `ticket`; a notifier's and a memslot's promise need none (0), because nothing is granted while
 * they are under way.  Returns the number of rights revoked. */
uint64_t oracle_revoke(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end,
		       uint32_t promise, uint64_t ticket);
/* oracle_revoke() for single gfns: bit i of mask is gfn base + i (dirty log). */
uint64_t oracle_revoke_mask(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t base, uint64_t mask,
			    uint32_t promise, uint64_t ticket);

struct violation_report {
	uint32_t kinds;    /* all kinds that apply, a bit per violation */
	uint32_t cpu;      /* pCPU of the access */
	uint32_t vm;
	uint32_t vcpu;
	uint32_t access;   /* access_type */
	uint32_t promise;  /* the promise that revoked the right */
	uint32_t promise_cpu; /* CPU that made it */
	uint32_t hfn;      /* frame accessed */
	uint64_t linear;   /* linear address of the guest access under way, or gpa with paging off */
	uint64_t gfn;      /* guest frame accessed */
	uint64_t time;     /* monotonic ns */
	uint64_t promise_time;
	uint64_t guest_clock; /* the vCPU's clock at the access */
	struct tlb_entry entry;
	uint32_t walk_level; /* reference of a walk: level of the entry read; 0: the access itself */
	uint32_t tag_now;    /* host tag of the frame now */
	uint32_t live;       /* leaf SPTEs that still map the page to the frame and allow the access */
};

/* Return totals by kind, each report counted once under its most specific kind. */
void oracle_counts(struct machine *m, uint64_t *counts);
/* Copy reports from number `from` on (the first 1024 of a run are kept); returns their number. */
uint32_t oracle_reports(struct machine *m, uint32_t from, struct violation_report *reports, uint32_t max);
/* Start reports and events over; counts go on.  No CPU may act meanwhile. */
void oracle_forget(struct machine *m);
/* Report a violation found outside guests: lost-dirty, stalls, deadlock. */
void oracle_report(struct machine *m, uint32_t cpu, const struct violation_report *report);
/* Return the state of one right, for tests and reports: bit 0 readable granted, 1 writable granted, 2 read
 * revoked, 3 write revoked; frame in *hfn. */
uint32_t oracle_right(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t *hfn);

/* Events: a ring per CPU, for the story around a violation. */
enum event_kind {
	EVENT_NONE,
	EVENT_ENTRY,     /* VM entry: vcpu, root; more: the guest's clock */
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
	EVENT_LOST,      /* in stories: older events of this CPU are unknown; the number that its ring has lost */
	EVENTS
};
enum { EVENT_IPI_WAITS = 1 << 15, EVENT_IPI_WORD = 16 };
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

void event_record(struct machine *m, uint32_t cpu, uint32_t kind, uint64_t a, uint64_t b);
/* Return the number of events that a CPU has recorded so far. */
uint64_t events_count(struct machine *m, uint32_t cpu);
/* Copy the last events of a CPU, oldest first; returns their number (the ring holds 1024). */
uint32_t events_read(struct machine *m, uint32_t cpu, struct event *events, uint32_t max);
/* Copy the events that led to a report, unordered: those that concern it, of all CPUs, as they were when it was
 * made.  Kept for the first 6 reports of each kind, and for 24 in a run; at most 512 events. */
uint32_t oracle_report_events(struct machine *m, uint32_t report, struct event *events, uint32_t max);
/* end api */

struct vm;
struct vcpu;

enum { EVENT_NO_VM = 0xffff };

/* Return the kind of an event that belongs to a VM, for event_record() and event_record_more(). */
static inline uint32_t event_of(uint32_t vm, uint32_t kind)
{
	return (vm + 1) << 16 | kind;
}

void event_record_more(struct machine *m, uint32_t cpu, uint32_t kind, uint64_t a, uint64_t b, uint64_t more);

/* The state of one right, as ledger_copy() returns it. */
struct ledger_entry {
	uint32_t hfn;
	uint8_t live_read;  /* SPTEs that grant it now, over all roots */
	uint8_t live_write;
	uint8_t revoked;    /* bit 0: read, bit 1: write */
	uint8_t promise;    /* the last one */
	uint32_t promise_cpu;
	uint64_t promise_time;
	uint64_t ungranted;   /* the VM's promise clock when a right was last taken away */
};

int ledger_create(struct machine *m, struct vm *vm);
void ledger_destroy(struct machine *m, struct vm *vm);

/* Grant n gfns from `gfn` on the frames from `hfn` on, for a leaf SPTE that is about to appear, under the
 * custody that its fault took (frame.h). */
void ledger_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, uint32_t custody,
		  bool write);
/* Grant write to an SPTE that granted read. */
void ledger_grant_write(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n,
			uint32_t custody);
/* Ungrant an SPTE's read and write, or write only; the frames' tags are advanced. */
void ledger_ungrant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, bool read, bool write);
/* Take one consistent copy. */
void ledger_copy(struct machine *m, uint32_t vm, uint64_t gfn, struct ledger_entry *out);

enum verdict { VERDICT_LEGAL, VERDICT_LEGAL_STALE, VERDICT_VIOLATION };

/* The result of a check; `right` is refreshed for the entry when legal. */
struct judgement {
	enum verdict verdict;
	uint32_t kinds;  /* a bit per violation */
	uint32_t live;   /* SPTEs that grant the right now */
	uint32_t right;
	uint32_t promise; /* promise that revoked the right, its CPU, its time (monotonic ns) */
	uint32_t promise_cpu;
	uint64_t promise_time;
};

/* The slow, exact check: judge whether `vcpu`, running with root life `life`, may use `entry` for an access of
 * `type` to `page` (4 KiB units, within the entry).  Has no effects. */
void oracle_judge(struct machine *m, const struct vcpu *vcpu, uint32_t life, const struct tlb_entry *entry,
		  uint64_t page, uint32_t type, struct judgement *j);
/* Judge a walk that was about to read a table page through an outdated link; kinds hold the reasons. */
void oracle_judge_table(struct judgement *j, uint32_t kinds);
/* Record a violation found by oracle_judge. */
void oracle_violation(struct machine *m, struct cpu *cpu, const struct vcpu *vcpu,
		      const struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t walk_level,
		      uint64_t linear, const struct judgement *j);

int oracle_create(struct machine *m);
void oracle_destroy(struct machine *m);

#endif
