/* What the benchmark programs share: time, medians, one JSON object per figure, a machine, a hypervisor that maps
 * what a guest misses.
 *
 * Each program is linked with the whole core and prints one line of JSON per figure; `python -m bench` compiles,
 * runs and tabulates them.
 */
#ifndef FLUSHLAB_BENCH_H
#define FLUSHLAB_BENCH_H

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ept.h"
#include "flush.h"
#include "frame.h"
#include "guest.h"
#include "ipi.h"
#include "mm.h"
#include "oracle.h"
#include "vm.h"

#define REQUIRE(condition)                                                                        \
	do {                                                                                      \
		if (!(condition)) {                                                               \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
			exit(1);                                                                  \
		}                                                                                 \
	} while (0)

static inline uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static inline int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/* Sorts. */
static inline double quantile(double *values, size_t n, double q)
{
	qsort(values, n, sizeof(*values), by_value);
	return values[(size_t)((double)(n - 1) * q)];
}

/* One figure beside its reference.  ratio: how to read it is in `what`. */
static inline void emit(const char *name, const char *what, double value, const char *unit,
			const char *reference_name, double reference, double ratio)
{
	printf("{\"name\": \"%s\", \"what\": \"%s\", \"value\": %.6g, \"unit\": \"%s\", "
	       "\"reference_name\": \"%s\", \"reference\": %.6g, \"ratio\": %.4g}\n",
	       name, what, value, unit, reference_name, reference, ratio);
	fflush(stdout);
}

static inline void pin(unsigned cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu % (unsigned)sysconf(_SC_NPROCESSORS_ONLN), &set);
	sched_setaffinity(0, sizeof(set), &set);
}

static inline struct machine *bench_machine(uint32_t pcpus, uint32_t frames)
{
	struct machine_config config = { .pcpus = pcpus, .housekeeping = 2, .vms = 2, .vcpus = 4,
					 .root_frames = 8, .table_frames = 4096, .guest_frames = frames,
					 .guest_blocks = 1, .l1_ways = 4, .l2_entries = 1536, .l2_ways = 12,
					 .psc_entries = 32, .seed = 1 };
	char error[200] = "";
	struct machine *m = machine_create(&config, error, sizeof(error));

	if (!m)
		fprintf(stderr, "%s\n", error);
	REQUIRE(m);
	return m;
}

/* Map one 4K page, tables included.  No concurrency. */
static inline void bench_map(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn)
{
	struct mm_page page;
	uint64_t sptes[6];
	uint32_t tables[6];
	int level;

	REQUIRE(mm_fault(m, cpu, vm, gfn, 1, &page) == 0);
	while ((level = tdp_mmu_get_walk(m, root, 4, gfn, sptes, tables)) > 1) {
		int64_t child = ept_table_alloc(m, cpu, FRAME_TABLE);

		REQUIRE(child >= 0);
		REQUIRE(!tdp_mmu_set_spte_atomic(m, cpu, vm, tables[level], gfn >> 9 * (level - 1) & 511,
						 (uint32_t)level, gfn, sptes[level],
						 make_nonleaf_spte(m, (uint32_t)child)));
	}
	REQUIRE(!tdp_mmu_set_spte_atomic(m, cpu, vm, tables[1], gfn & 511, 1, gfn, sptes[1],
					 make_spte(page.hfn, page.tag, 1, 1, 1)));
}

/* Run a guest for n accesses, serving its EPT violations. */
static inline void bench_run(struct machine *m, uint32_t cpu, uint32_t vcpu, uint32_t vm, uint32_t root,
			     uint64_t n)
{
	struct vcpu_exit out;

	while (n) {
		int r;

		local_irq_disable(m, cpu, "bench");
		vcpu_set_mode(m, vcpu, IN_GUEST_MODE);
		r = guest_run(m, cpu, vcpu, n, &out);
		REQUIRE(r >= 0 && r != EXIT_TRIPLE_FAULT);
		n -= out.accesses;
		if (r == EXIT_EPT_VIOLATION)
			bench_map(m, cpu, vm, root, out.gpa >> 12);
	}
}

/* A file of 64-bit words. */
static inline uint64_t *bench_words(const char *path, uint64_t *n)
{
	FILE *file = fopen(path, "rb");
	uint64_t *words;
	long size;

	if (!file) {
		perror(path);
		exit(1);
	}
	fseek(file, 0, SEEK_END);
	size = ftell(file);
	rewind(file);
	words = aligned_alloc(64, ((size_t)size + 63) / 64 * 64);
	REQUIRE(words && fread(words, 1, (size_t)size, file) == (size_t)size);
	fclose(file);
	*n = (uint64_t)size / 8;
	return words;
}

#endif
