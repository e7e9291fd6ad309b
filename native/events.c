/* Event rings: the last things that each CPU did.  The owner writes, anyone reads: an event that is being
 * overwritten while it is read may come out mixed, which the story around a violation tolerates; each word is
 * whole. */
#include <stdlib.h>

#include "events.h"

uint32_t events_read(struct machine *m, uint32_t cpu, struct event *events, uint32_t max)
{
	const struct event_ring *ring = &m->oracle->rings[cpu];
	uint64_t next = atomic_load_explicit(&ring->next, memory_order_acquire);
	uint64_t n = next < EVENT_RING ? next : EVENT_RING;

	if (n > max)
		n = max;
	for (uint64_t i = 0; i < n; i++) {
		const struct event_slot *slot = &ring->slot[(next - n + i) % EVENT_RING];

		events[i].time = atomic_load_explicit(&slot->time, memory_order_relaxed);
		events[i].kind = (uint32_t)atomic_load_explicit(&slot->kind, memory_order_relaxed);
		events[i].cpu = cpu;
		events[i].a = atomic_load_explicit(&slot->a, memory_order_relaxed);
		events[i].b = atomic_load_explicit(&slot->b, memory_order_relaxed);
	}
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
