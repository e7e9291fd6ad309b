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

#include "core/machine_types.h"
#include "oracle/story.h"
#include "tlb/tlb.h"

/* api */
/* calls: anything */
/* Most specific first. */
enum violation {
	VIOLATION_CROSS_VM,
	VIOLATION_CROSS_GUEST, /* L2 used what L1 or another L2 had filled, or L1 what L2 had */
	VIOLATION_FOREIGN_ROOT,
	VIOLATION_WALK_AFTER_FREE,
	VIOLATION_USE_AFTER_FREE,
	VIOLATION_STALE_AFTER_REVOKE,
	VIOLATION_GUEST_STALE,
	VIOLATION_LOST_DIRTY,
	VIOLATION_MISSED_GUEST_WRITE,
	VIOLATION_L1_STALE, /* L2 used what L1 had invalidated */
	VIOLATION_APIC_STALE, /* an access to the APIC reached memory, or one to memory the APIC */
	VIOLATION_IPI_STALL,
	VIOLATION_RCU_STALL,
	VIOLATION_DEADLOCK,
	VIOLATIONS
};

/* The parties that promise that a translation is used no more.  Each has a record of its promises, and kinds of
 * violation that break them. */
enum promiser {
	PROMISER_KVM,   /* to the host and to user space (enum promise): recorded in the ledger, by gfn */
	PROMISER_GUEST, /* to itself, by changing and invalidating a mapping: recorded in the vCPU's guest, by linear page */
	PROMISER_L1,    /* to its nested guest, by INVVPID or a VM entry or exit that invalidates: recorded in the nested
			 * guest, by linear page; by INVEPT: in L1's EPT, by guest-physical page (ept12.h) */
	PROMISERS
};

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
	uint32_t nested;     /* the vCPU's guest that accessed, as tlb_entry.nested */
};

/* Return totals by kind, each report counted once under its most specific kind. */
/* call: aside; keeps-gil */
void oracle_counts(struct machine *m, uint64_t *counts);
/* Copy reports from number `from` on (the first 1024 of a run are kept); returns their number. */
/* call: aside */
uint32_t oracle_reports(struct machine *m, uint32_t from, struct violation_report *reports, uint32_t max);
/* Start reports and events over; counts go on.  No CPU may act meanwhile. */
void oracle_forget(struct machine *m);
/* Report a violation found outside guests: lost-dirty, stalls, deadlock. */
void oracle_report(struct machine *m, uint32_t cpu, const struct violation_report *report);

/* Copy the events that led to a report, unordered: those that concern it, of all CPUs, as they were when it was
 * made.  Kept for the first 6 reports of each kind, and for 24 in a run; at most 512 events. */
uint32_t oracle_report_events(struct machine *m, uint32_t report, struct event *events, uint32_t max);
/* end api */

enum { REPORTS_KEPT = 1024, STORIES = 24, STORIES_OF_KIND = 6 };

struct report_slot {
	_Atomic uint32_t complete;
	uint32_t story; /* its number + 1; 0: none */
	struct violation_report report;
};

struct oracle {
	_Atomic uint64_t count[VIOLATIONS];
	_Atomic uint32_t reports; /* slots taken; may exceed REPORTS_KEPT */
	struct report_slot report[REPORTS_KEPT];
	_Atomic uint32_t told[VIOLATIONS]; /* reports of a kind, with or without a story */
	_Atomic uint32_t stories;  /* slots taken; may exceed STORIES */
	struct story story[STORIES];
};

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

/* Return the kinds of violation that break this promiser's promises: a bit per violation. */
uint32_t oracle_kinds_of(enum promiser promiser);
/* The slow, exact check: judge whether `vcpu`, running with root life `life`, may use `entry` for an access of
 * `type` to `page` (4 KiB units, within the entry).  Has no effects. */
void oracle_judge(struct machine *m, const struct vcpu *vcpu, uint32_t life, const struct tlb_entry *entry,
		  uint64_t page, uint32_t type, struct judgement *j);
/* Add to a judgement that the translation was filled by the guest `nested`, and may be another one's than that in
 * use. */
void oracle_judge_guest(const struct vcpu *vcpu, uint32_t nested, struct judgement *j);
/* Judge a walk that was about to read a table page through an outdated link; kinds hold the reasons. */
void oracle_judge_table(struct judgement *j, uint32_t kinds);
/* Record a violation found by oracle_judge. */
void oracle_violation(struct machine *m, struct cpu *cpu, const struct vcpu *vcpu,
		      const struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t walk_level,
		      uint64_t linear, const struct judgement *j);

int oracle_create(struct machine *m);
void oracle_destroy(struct machine *m);

#endif
