/* The rings behind event_record() and events_read() (oracle.h), and the oracle's other data. */
#ifndef FLUSHLAB_EVENTS_H
#define FLUSHLAB_EVENTS_H

#include "oracle/oracle.h"

enum { EVENT_RING = 1024, REPORTS_KEPT = 1024, STORIES = 24, STORIES_OF_KIND = 6, EVENTS_KEPT = 512, EVENTS_OF_CPU = 128 };

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

struct report_slot {
	_Atomic uint32_t complete;
	uint32_t story; /* its number + 1; 0: none */
	struct violation_report report;
};

/* The events that led to one report, copied when it is made, because the rings are overwritten within
 * milliseconds. */
struct story {
	uint32_t events;
	struct event event[EVENTS_KEPT];
};

struct oracle {
	struct event_ring *rings;
	_Atomic uint64_t count[VIOLATIONS];
	_Atomic uint32_t reports; /* slots taken; may exceed REPORTS_KEPT */
	struct report_slot report[REPORTS_KEPT];
	_Atomic uint32_t told[VIOLATIONS]; /* reports of a kind, with or without a story */
	_Atomic uint32_t stories;  /* slots taken; may exceed STORIES */
	struct story story[STORIES];
};

/* Fill the story of a report: events that concern it, CPU by CPU, beginning with the CPUs involved. */
void story_copy(struct machine *m, const struct violation_report *report, struct story *story);

#endif
