/* The selection of the events that concern a report. */
#include "oracle/story.h"

#include "core/events.h"
#include "core/machine_types.h"
#include "oracle/ledger.h"
#include "oracle/oracle.h"
#include "sync/ipi.h"
#include "vm/guest_state.h"

/* Return whether an event about [gfn, gfn + pages) concerns the page or, if a table is at stake, its
 * neighbours. */
static bool covers(const struct violation_report *r, uint64_t gfn, uint64_t pages)
{
	if (r->kinds & (1u << VIOLATION_WALK_AFTER_FREE))
		return gfn >> 9 <= r->gfn >> 9 && r->gfn >> 9 <= (gfn + (pages ? pages - 1 : 0)) >> 9;
	return gfn <= r->gfn && r->gfn - gfn < (pages ? pages : 1);
}

static bool of_vcpus(const struct violation_report *r, uint64_t vcpu)
{
	return vcpu == r->vcpu || vcpu == r->entry.vcpu;
}

/* Return whether an event concerns the report.  Faults, entries and exits flood the rings; tell_entry() selects
 * among entries and exits. */
static bool concerns(const struct violation_report *r, const struct event *e)
{
	bool lost = r->kinds & 1u << VIOLATION_LOST_DIRTY;
	uint32_t function = e->more & (EVENT_IPI_WAITS - 1);

	if (e->kind == EVENT_ROOT_FREE || e->kind == EVENT_ROOT_INVALID)
		return e->a == r->entry.ep4ta;
	if (e->vm != EVENT_NO_VM && e->vm != r->vm && e->vm != r->entry.vm)
		return e->kind == EVENT_FLUSH && e->cpu == r->cpu;
	switch (e->kind) {
	case EVENT_NONE:
	case EVENT_ENTRY:
	case EVENT_EXIT:
		return false;
	case EVENT_MAP:
	case EVENT_ZAP:
	case EVENT_PROTECT:
		return covers(r, e->a, e->more);
	case EVENT_PROMISE:
		return covers(r, e->b, e->more);
	case EVENT_FREE:
		return e->a == r->hfn;
	case EVENT_LOAD:
	case EVENT_UNLOAD:
	case EVENT_REQUEST:
	case EVENT_ROOT_LOAD:
		return of_vcpus(r, e->a);
	case EVENT_ELIDED:
		/* Freeing a table promises nothing, so the CPU that removed the table is not known. */
		return e->cpu == r->cpu || e->cpu == r->promise_cpu || r->promise == PROMISE_FREE;
	case EVENT_IPI:
		return e->cpu == r->promise_cpu || function == IPI_INVEPT_SINGLE || function == IPI_INVEPT_GLOBAL;
	case EVENT_STORE:
		return lost && e->b == r->gfn;
	case EVENT_COPY:
	case EVENT_LOG_CLEAR:
		return lost && r->gfn - e->a < 64 && e->b >> (r->gfn - e->a) & 1;
	case EVENT_LOG_ARM:
	case EVENT_LOG_GET:
	case EVENT_LOG_END:
		return lost;
	case EVENT_SPECULATE:
		return e->cpu == r->cpu && e->b == r->entry.page;
	case EVENT_GUEST_INVALIDATE:
		return e->a == r->vcpu && (e->b == r->entry.page || e->b == UINT64_MAX);
	default:
		return true;
	}
}

/* Return whether a request before and one after the event are of different operations of the CPU. */
static bool divides(const struct event *e)
{
	return e->kind == EVENT_ZAP || e->kind == EVENT_PROTECT || e->kind == EVENT_PROMISE;
}

/* The selection of one CPU's events, from the newest on. */
struct telling {
	struct story *story;
	uint32_t kept;
	uint32_t most;
	bool asked;  /* the event before the last request told is due: it shows which operation made the request */
	bool fill_told;
	bool mapped; /* the last event told was a mapping, that is, a fault */
	struct event entry; /* the last VM entry seen, not told yet; kind 0: none */
};

static void tell(struct telling *t, const struct event *e)
{
	if (t->kept >= t->most || t->story->events >= EVENTS_KEPT)
		return;
	t->story->event[t->story->events++] = *e;
	t->kept++;
}

enum { STAYS_OF_CPU = 32 };

/* Select VM entries and exits: the last ones, the first entry after any other event that is told, kicks, and
 * the entry of the stay in guest mode in which the translation was filled. */
static void tell_entry(struct telling *t, const struct violation_report *r, const struct event *e)
{
	int32_t before_fill = (int32_t)((uint32_t)r->entry.clock - e->more);
	/* The clock stands still while the guest faults: a later promise cannot be older than the entry. */
	bool lost = r->kinds & 1u << VIOLATION_LOST_DIRTY;
	bool promised = r->promise_time && !(r->kinds & oracle_kinds_of(PROMISER_GUEST)) && e->time > r->promise_time;

	if (lost) {
		/* Any vCPU's fault may have made the page writable.  Only the last few are told, because they
		 * flood the rings. */
		if (e->vm == r->vm && t->kept < STAYS_OF_CPU)
			tell(t, e);
		return;
	}
	if (promised)
		before_fill = -1;
	if (!of_vcpus(r, e->a))
		return;
	if (e->kind == EVENT_EXIT) {
		if (t->kept < 2 || e->b == EXIT_INTERRUPT || t->mapped)
			tell(t, e);
		t->mapped = false;
		return;
	}
	t->entry = *e;
	if (t->kept < 2 || (!t->fill_told && e->a == r->entry.vcpu && e->cpu == r->cpu && before_fill >= 0)) {
		t->fill_told |= before_fill >= 0;
		t->entry.kind = EVENT_NONE;
		tell(t, e);
	}
}

/* If the oldest available event is not the CPU's first, tell so in place of the lost ones. */
static void tell_lost(struct telling *t, uint64_t time, uint32_t cpu, uint64_t before)
{
	struct event e = { .time = time - 1, .kind = EVENT_LOST, .cpu = cpu, .vm = EVENT_NO_VM, .a = before };

	if (t->story->events < EVENTS_KEPT)
		t->story->event[t->story->events++] = e;
}

static void copy_cpu(struct machine *m, uint32_t cpu, const struct violation_report *r, struct story *story)
{
	const struct event_ring *ring = &m->rings[cpu];
	uint64_t next = atomic_load_explicit(&ring->next, memory_order_acquire);
	uint64_t n = next < EVENT_RING ? next : EVENT_RING;
	bool involved = cpu == r->cpu || cpu == r->promise_cpu;
	struct telling t = { .story = story, .most = involved ? EVENTS_OF_CPU : EVENTS_OF_CPU / 2 };
	uint64_t i;

	for (i = 1; i <= n && t.kept < t.most; i++) {
		struct event e = event_at(ring, next - i, cpu);

		if (e.kind == EVENT_ENTRY || e.kind == EVENT_EXIT) {
			tell_entry(&t, r, &e);
		} else if (concerns(r, &e)) {
			if (t.entry.kind)
				tell(&t, &t.entry);
			t.entry.kind = EVENT_NONE;
			t.mapped = e.kind == EVENT_MAP;
			t.asked = e.kind == EVENT_REQUEST || (t.asked && !divides(&e));
			tell(&t, &e);
		} else if (t.asked && divides(&e)) {
			/* The request is for other pages, or comes after the promise about them. */
			t.asked = false;
			tell(&t, &e);
		}
	}
	if (involved && (i <= n || next > n))
		tell_lost(&t, event_at(ring, next - i + 1, cpu).time, cpu, next - i + 1);
}

void story_copy(struct machine *m, const struct violation_report *report, struct story *story)
{
	copy_cpu(m, report->cpu, report, story);
	if (report->promise_cpu != report->cpu && report->promise_cpu < m->cpu_count)
		copy_cpu(m, report->promise_cpu, report, story);
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++)
		if (cpu != report->cpu && cpu != report->promise_cpu)
			copy_cpu(m, cpu, report, story);
}
