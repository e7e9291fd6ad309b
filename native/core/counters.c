#define _POSIX_C_SOURCE 200809L
#include "core/counters.h"

#include <string.h>
#include <time.h>

#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"

uint64_t monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static size_t flush_cells(const struct machine *m)
{
	return (size_t)m->config.vms * SCOPES * REASONS;
}

struct counters *counters_create(const struct machine *m)
{
	struct counters *c = heap_zalloc_lines(m->heap, 1, sizeof(*c));

	if (!c)
		return NULL;
	c->flushes = heap_zalloc(m->heap, flush_cells(m), sizeof(*c->flushes));
	c->necessary = heap_zalloc(m->heap, flush_cells(m), sizeof(*c->necessary));
	c->flushed = heap_zalloc(m->heap, m->config.vms, sizeof(*c->flushed));
	if (flush_cells(m) && (!c->flushes || !c->necessary || !c->flushed)) {
		counters_destroy(m, c);
		return NULL;
	}
	return c;
}

void counters_destroy(const struct machine *m, struct counters *c)
{
	if (!c)
		return;
	heap_free(m->heap, c->flushes);
	heap_free(m->heap, c->necessary);
	heap_free(m->heap, c->flushed);
	heap_free(m->heap, c);
}

/* Relaxed: each value is whole by itself, and no reader infers one value from another. */
static void add_values(uint64_t *sums, _Atomic uint64_t *values, size_t n)
{
	for (size_t i = 0; i < n; i++)
		sums[i] += atomic_load_explicit(&values[i], memory_order_relaxed);
}

void counters_read(struct machine *m, uint32_t cpu, uint64_t *values)
{
	memset(values, 0, COUNTERS * sizeof(*values));
	add_values(values, m->cpus[cpu].counters->value, COUNTERS);
}

void counters_sum(struct machine *m, uint64_t *values)
{
	memset(values, 0, COUNTERS * sizeof(*values));
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++)
		add_values(values, m->cpus[cpu].counters->value, COUNTERS);
}

uint64_t counter_sum(struct machine *m, uint32_t counter)
{
	uint64_t sum = 0;

	for (uint32_t cpu = 0; counter < COUNTERS && cpu < m->cpu_count; cpu++)
		add_values(&sum, &m->cpus[cpu].counters->value[counter], 1);
	return sum;
}

void histogram_sum(struct machine *m, uint32_t histogram, uint64_t *buckets, uint64_t *sum)
{
	memset(buckets, 0, HISTOGRAM_BUCKETS * sizeof(*buckets));
	*sum = 0;
	if (histogram >= HISTOGRAMS)
		return;
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++) {
		struct counters *c = m->cpus[cpu].counters;

		add_values(buckets, c->bucket[histogram], HISTOGRAM_BUCKETS);
		add_values(sum, &c->nanoseconds[histogram], 1);
	}
}

void flushes_sum(struct machine *m, uint64_t *flushes, uint64_t *necessary)
{
	memset(flushes, 0, flush_cells(m) * sizeof(*flushes));
	memset(necessary, 0, flush_cells(m) * sizeof(*necessary));
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++) {
		struct counters *c = m->cpus[cpu].counters;

		for (uint32_t vm = 0; vm < m->config.vms; vm++) {
			size_t row = (size_t)vm * SCOPES * REASONS;

			/* relaxed: a flush counted concurrently is in this sum or in the next */
			if (!atomic_load_explicit(&c->flushed[vm], memory_order_relaxed))
				continue;
			add_values(&flushes[row], &c->flushes[row], SCOPES * REASONS);
			add_values(&necessary[row], &c->necessary[row], SCOPES * REASONS);
		}
	}
}

void counter_add(struct machine *m, uint32_t cpu, uint32_t counter, uint64_t n)
{
	if (counter < COUNTERS)
		count(m->cpus[cpu].counters, counter, n);
}

/* Bucket i holds values below 2^i and not below 2^(i-1). */
static uint32_t histogram_bucket(uint64_t nanoseconds)
{
	uint32_t bits = nanoseconds ? 64 - (uint32_t)__builtin_clzll(nanoseconds) : 0;

	return bits < HISTOGRAM_BUCKETS ? bits : HISTOGRAM_BUCKETS - 1;
}

/* Relaxed load, add, store by the owner, as count(). */
static void add_owned(_Atomic uint64_t *cell, uint64_t n)
{
	uint64_t v = atomic_load_explicit(cell, memory_order_relaxed);

	atomic_store_explicit(cell, v + n, memory_order_relaxed);
}

void histogram_record(struct machine *m, uint32_t cpu, uint32_t histogram, uint64_t nanoseconds)
{
	struct counters *c = m->cpus[cpu].counters;

	if (histogram >= HISTOGRAMS)
		return;
	add_owned(&c->bucket[histogram][histogram_bucket(nanoseconds)], 1);
	add_owned(&c->nanoseconds[histogram], nanoseconds);
}
