/* Helpers that the benchmark programs share: time, quantiles, one JSON object per figure, a machine, and a hypervisor
 * that maps the pages on which a guest faults.
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

#include "core/machine_types.h"
#include "ept/ept_map.h"
#include "guest/run.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/mm.h"
#include "sync/cpu.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/vmcs.h"

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

/* Return a quantile of the values; sort them in place. */
static inline double quantile(double *values, size_t n, double q)
{
	qsort(values, n, sizeof(*values), by_value);
	return values[(size_t)((double)(n - 1) * q)];
}

enum { REPEATS_MAX = 64 };

/* One figure: a sample per repeat beside one of its reference, taken in turn.  bench/figures.py computes the medians
 * and the ratio, and checks the conditions in `wanted`. */
struct figure {
	const char *name;
	const char *what;
	const char *unit;
	const char *reference_name;
	const char *ratio_of; /* "value/reference" or "reference/value" */
	const char *wanted;   /* "value <= 1000 and ratio >= 5"; NULL: no condition */
	const double *values;
	const double *references;
	size_t repeats;
};

static inline void emit_samples(const char *key, const double *samples, size_t n)
{
	printf(", \"%s\": [", key);
	for (size_t i = 0; i < n; i++)
		printf("%s%.6g", i ? ", " : "", samples[i]);
	printf("]");
}

static inline void emit(const struct figure *f)
{
	printf("{\"name\": \"%s\", \"what\": \"%s\", \"unit\": \"%s\", \"reference_name\": \"%s\", "
	       "\"ratio_of\": \"%s\", \"wanted\": \"%s\"",
	       f->name, f->what, f->unit, f->reference_name, f->ratio_of, f->wanted ? f->wanted : "");
	emit_samples("values", f->values, f->repeats);
	emit_samples("references", f->references, f->repeats);
	printf("}\n");
	fflush(stdout);
}

/* Return a number of the command line, at least 1. */
static inline uint32_t bench_number(const char *text, uint32_t max)
{
	long number = strtol(text, NULL, 10);

	REQUIRE(number >= 1 && number <= (long)max);
	return (uint32_t)number;
}

/* Return the cores on which the program was started, regardless of later pinning. */
static inline const cpu_set_t *started_on(void)
{
	static cpu_set_t allowed;

	if (!CPU_COUNT(&allowed))
		REQUIRE(!sched_getaffinity(0, sizeof(allowed), &allowed));
	return &allowed;
}

static inline unsigned bench_cores(void)
{
	return (unsigned)CPU_COUNT(started_on());
}

/* Stay on the n-th of the cores that the program was started on.  The machine must exist by then: see
 * bench_machine(). */
static inline void pin(unsigned n)
{
	const cpu_set_t *allowed = started_on();
	cpu_set_t one;
	unsigned left = n % bench_cores();

	CPU_ZERO(&one);
	for (int core = 0; core < CPU_SETSIZE; core++) {
		if (CPU_ISSET(core, allowed) && !left--) {
			CPU_SET(core, &one);
			break;
		}
	}
	REQUIRE(!sched_setaffinity(0, sizeof(one), &one));
}

/* Run on every core again, as at the start. */
static inline void unpin(void)
{
	REQUIRE(!sched_setaffinity(0, sizeof(cpu_set_t), started_on()));
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
	/* The core spins before it sleeps only if it was created by a thread that may use a second core.  A program
	 * that pins itself first would measure a futex in place of every short wait. */
	REQUIRE(m->spin_ns > 0 || bench_cores() < 2);
	return m;
}

/* Map one 4K page.  No concurrency. */
static inline void bench_map(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn)
{
	struct mm_page page;

	REQUIRE(mm_fault(m, cpu, vm, gfn, 1, &page) == 0);
	REQUIRE(!ept_map_page(m, cpu, vm, root, gfn, &page));
}

struct bench_guest {
	uint32_t vm;
	uint32_t vcpu;
	uint32_t vmcs;
	uint32_t root;
};

/* Create a vCPU of a VM, with a VMCS of that root. */
static inline struct bench_guest bench_guest(struct machine *m, uint32_t vm, uint32_t root, uint32_t vpid)
{
	int vcpu = vcpu_create(m, vm), vmcs;

	REQUIRE(vcpu >= 0);
	vmcs = vmcs_create(m, (uint32_t)vcpu, vpid);
	REQUIRE(vmcs >= 0);
	vmcs_write_eptp(m, (uint32_t)vmcs, root, 4);
	return (struct bench_guest){ .vm = vm, .vcpu = (uint32_t)vcpu, .vmcs = (uint32_t)vmcs, .root = root };
}

/* Run a guest for n accesses; serve its EPT violations. */
static inline void bench_run(struct machine *m, uint32_t cpu, const struct bench_guest *g, uint64_t n)
{
	struct vcpu_exit out;

	REQUIRE(!vmptrld(m, cpu, g->vmcs));
	while (n) {
		int r;

		local_irq_disable(m, cpu, "bench");
		vcpu_set_mode(m, g->vcpu, IN_GUEST_MODE);
		r = guest_run(m, cpu, g->vcpu, n, &out);
		REQUIRE(r >= 0 && r != EXIT_TRIPLE_FAULT);
		n -= out.accesses;
		if (r == EXIT_EPT_VIOLATION)
			bench_map(m, cpu, g->vm, g->root, out.gpa >> 12);
	}
}

/* Read a file of 64-bit words. */
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
