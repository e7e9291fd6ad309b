/* Event rings: the last things that each CPU did.  The owner writes, anyone reads: an event that is being
 * overwritten while it is read may come out mixed, which the story around a violation tolerates; each word is
 * whole. */
#include "events.h"

static struct event event_at(const struct event_ring *ring, uint64_t position, uint32_t cpu)
{
	const struct event_slot *slot = &ring->slot[position % EVENT_RING];

	return (struct event){
		.time = atomic_load_explicit(&slot->time, memory_order_relaxed),
		.kind = (uint32_t)atomic_load_explicit(&slot->kind, memory_order_relaxed),
		.cpu = cpu,
		.a = atomic_load_explicit(&slot->a, memory_order_relaxed),
		.b = atomic_load_explicit(&slot->b, memory_order_relaxed),
	};
}

uint32_t events_read(struct machine *m, uint32_t cpu, struct event *events, uint32_t max)
{
	const struct event_ring *ring = &m->oracle->rings[cpu];
	uint64_t next = atomic_load_explicit(&ring->next, memory_order_acquire);
	uint64_t n = next < EVENT_RING ? next : EVENT_RING;

	if (n > max)
		n = max;
	for (uint64_t i = 0; i < n; i++)
		events[i] = event_at(ring, next - n + i, cpu);
	return (uint32_t)n;
}

void event_record(struct machine *m, uint32_t cpu, uint32_t kind, uint64_t a, uint64_t b)
{
	struct event_ring *ring = &m->oracle->rings[cpu];
	uint64_t next = atomic_load_explicit(&ring->next, memory_order_relaxed);
	struct event_slot *slot = &ring->slot[next % EVENT_RING];

	atomic_store_explicit(&slot->time, monotonic_ns(), memory_order_relaxed);
	atomic_store_explicit(&slot->kind, kind, memory_order_relaxed);
	atomic_store_explicit(&slot->a, a, memory_order_relaxed);
	atomic_store_explicit(&slot->b, b, memory_order_relaxed);
	/* Release: pairs with the acquire in events_read, the slot is whole once it is counted. */
	atomic_store_explicit(&ring->next, next + 1, memory_order_release);
}

static bool same_table(uint64_t gfn, uint64_t other)
{
	return gfn >> 9 == other >> 9;
}

/* Faults and entries flood the rings; of them only what touches the page, or the vCPU's last ones, is telling. */
static bool concerns(const struct violation_report *r, const struct event *e, uint32_t kept)
{
	switch (e->kind) {
	case EVENT_NONE:
		return false;
	case EVENT_MAP:
	case EVENT_ZAP:
	case EVENT_PROTECT:
		return same_table(e->a, r->gfn);
	case EVENT_FREE:
		return e->a == r->hfn;
	case EVENT_ENTRY:
	case EVENT_EXIT:
		return e->a == r->vcpu && kept < 2;
	case EVENT_REQUEST:
		return e->a == r->vcpu;
	case EVENT_GUEST_INVALIDATE:
		return e->a == r->vcpu && e->b == r->entry.page;
	default:
		return true;
	}
}

/* Newest first; a CPU that is not involved has half as much to say. */
static void copy_cpu(struct machine *m, uint32_t cpu, const struct violation_report *r, struct story *story)
{
	const struct event_ring *ring = &m->oracle->rings[cpu];
	uint64_t next = atomic_load_explicit(&ring->next, memory_order_acquire);
	uint64_t n = next < EVENT_RING ? next : EVENT_RING;
	bool involved = cpu == r->cpu || cpu == r->promise_cpu;
	uint32_t most = involved ? EVENTS_OF_CPU : EVENTS_OF_CPU / 2, kept = 0;

	for (uint64_t i = 1; i <= n && kept < most && story->events < EVENTS_KEPT; i++) {
		struct event e = event_at(ring, next - i, cpu);

		if (concerns(r, &e, kept)) {
			story->event[story->events++] = e;
			kept++;
		}
	}
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
