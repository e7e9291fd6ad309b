/* The rings behind event_record() and events_read() (oracle.h), and what else the oracle owns. */
#ifndef FLUSHLAB_EVENTS_H
#define FLUSHLAB_EVENTS_H

#include "oracle.h"

enum { EVENT_RING = 256, REPORTS_KEPT = 1024 };

struct event_slot {
	_Atomic uint64_t time;
	_Atomic uint64_t kind;
	_Atomic uint64_t a;
	_Atomic uint64_t b;
};

struct event_ring {
	alignas(CACHELINE) _Atomic uint64_t next;
	struct event_slot slot[EVENT_RING];
};

struct report_slot {
	_Atomic uint32_t complete;
	struct violation_report report;
};

struct oracle {
	struct event_ring *rings;
	_Atomic uint64_t count[VIOLATIONS];
	_Atomic uint32_t reports; /* taken; may exceed REPORTS_KEPT */
	struct report_slot report[REPORTS_KEPT];
};

#endif
