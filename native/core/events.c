#include "core/events.h"

#include "core/counters.h"
#include "core/heap.h"
#include "core/machine_types.h"

struct event event_at(const struct event_ring *ring, uint64_t position, uint32_t cpu)
{
	const struct event_slot *slot = &ring->slot[position % EVENT_RING];
	uint64_t kind = atomic_load_explicit(&slot->kind, memory_order_relaxed);

	return (struct event){
		.time = atomic_load_explicit(&slot->time, memory_order_relaxed),
		.kind = (uint32_t)kind & 0xffff,
		.cpu = cpu,
		.vm = ((uint32_t)(kind >> 16) - 1) & EVENT_NO_VM,
		.more = (uint32_t)(kind >> 32),
		.a = atomic_load_explicit(&slot->a, memory_order_relaxed),
		.b = atomic_load_explicit(&slot->b, memory_order_relaxed),
	};
}

uint64_t events_count(struct machine *m, uint32_t cpu)
{
	return atomic_load_explicit(&m->rings[cpu].next, memory_order_acquire);
}

uint32_t events_read(struct machine *m, uint32_t cpu, struct event *events, uint32_t max)
{
	const struct event_ring *ring = &m->rings[cpu];
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
	event_record_more(m, cpu, kind, a, b, 0);
}

void event_record_more(struct machine *m, uint32_t cpu, uint32_t kind, uint64_t a, uint64_t b, uint64_t more)
{
	struct event_ring *ring = &m->rings[cpu];
	uint64_t next = atomic_load_explicit(&ring->next, memory_order_relaxed);
	struct event_slot *slot = &ring->slot[next % EVENT_RING];

	atomic_store_explicit(&slot->time, monotonic_ns(), memory_order_relaxed);
	atomic_store_explicit(&slot->kind, kind | more << 32, memory_order_relaxed);
	atomic_store_explicit(&slot->a, a, memory_order_relaxed);
	atomic_store_explicit(&slot->b, b, memory_order_relaxed);
	/* Release: pairs with the acquire in events_read, so the slot is whole once it is counted. */
	atomic_store_explicit(&ring->next, next + 1, memory_order_release);
}

void events_forget(struct machine *m)
{
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++)
		atomic_store_explicit(&m->rings[cpu].next, 0, memory_order_relaxed);
}

int events_create(struct machine *m)
{
	m->rings = heap_zalloc_lines(m->heap, m->cpu_count, sizeof(*m->rings));
	return m->rings ? 0 : MACHINE_NOMEM;
}

void events_destroy(struct machine *m)
{
	heap_free(m->heap, m->rings);
	m->rings = NULL;
}
