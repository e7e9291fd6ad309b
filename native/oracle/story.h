/* The story of a report: the events that led to it, copied when it is made, because the rings are overwritten
 * within milliseconds.
 */
#ifndef FLUSHLAB_STORY_H
#define FLUSHLAB_STORY_H

#include "core/events.h"
#include "core/machine_types.h"

struct violation_report;

enum { EVENTS_KEPT = 512, EVENTS_OF_CPU = 128 };

struct story {
	uint32_t events;
	struct event event[EVENTS_KEPT];
};

/* Fill the story of a report: events that concern it, CPU by CPU, beginning with the CPUs involved. */
void story_copy(struct machine *m, const struct violation_report *report, struct story *story);

#endif
