/* Guest accesses per second, oracle on, beside a bare loop that looks up a direct-mapped array.
 *
 *   guest_loop NAME RECORDS PAGES REPEATS
 *
 * RECORDS and PAGES are files of 64-bit words (a trace).  One pCPU; then two pCPUs, each with its own guest, on
 * two cores.  Every record takes one poll, one look-up and one check, or the program fails.
 */
#include "bench.h"

enum { DIRECT = 4096, LOOPS_PER_REPEAT = 4 };

struct direct {
	uint64_t page;
	uint64_t value;
};

struct guest_thread {
	struct machine *m;
	uint32_t cpu;
	uint32_t vcpu;
	uint32_t root;
	uint64_t accesses;
	uint64_t ns;
	pthread_barrier_t *start;
};

static uint64_t *records, *pages, record_count, page_count;

/* The reference: load a record, look its page up, use what is there. */
static double bare_rate(void)
{
	static struct direct table[DIRECT];
	uint64_t start, sum = 0, misses = 0;

	for (uint64_t i = 0; i < page_count; i++)
		table[pages[i] % DIRECT] = (struct direct){ pages[i], i };
	start = now_ns();
	for (int loop = 0; loop < LOOPS_PER_REPEAT; loop++) {
		for (uint64_t i = 0; i < record_count; i++) {
			uint64_t page = records[i] >> 12 & ((1ull << 36) - 1);
			const struct direct *d = &table[page % DIRECT];

			if (__builtin_expect(d->page != page, 0))
				misses++;
			else
				sum += d->value;
		}
	}
	start = now_ns() - start;
	/* The sum is used, so the loop stays. */
	REQUIRE(sum + misses != 1);
	return (double)record_count * LOOPS_PER_REPEAT * 1e9 / (double)start;
}

static uint32_t make_guest(struct machine *m, uint32_t vm, uint32_t root, uint32_t index)
{
	uint64_t gfns = page_count + 4096;
	struct guest_config config = { .first_gfn = index * gfns, .end_gfn = (index + 1) * gfns, .paging = 1,
				       .pcid = 1, .seed = index + 1 };
	int vcpu = vcpu_create(m, vm, index + 1);

	REQUIRE(vcpu >= 0);
	REQUIRE(!guest_configure(m, (uint32_t)vcpu, &config));
	REQUIRE(!guest_add_process(m, (uint32_t)vcpu, records, record_count, pages, page_count));
	vcpu_set_eptp(m, (uint32_t)vcpu, root, 4);
	return (uint32_t)vcpu;
}

static void *run_guest(void *argument)
{
	struct guest_thread *t = argument;

	pin(t->cpu);
	cpu_online(t->m, t->cpu);
	bench_run(t->m, t->cpu, t->vcpu, 0, t->root, record_count * 2);
	pthread_barrier_wait(t->start);
	t->ns = now_ns();
	bench_run(t->m, t->cpu, t->vcpu, 0, t->root, t->accesses);
	t->ns = now_ns() - t->ns;
	return NULL;
}

/* Accesses per second of `n` pCPUs together. */
static double guest_rate(uint32_t n)
{
	struct machine *m = bench_machine(2, (uint32_t)(page_count + 4096) * 2);
	uint32_t vm = (uint32_t)vm_create(m, (page_count + 4096) * 2);
	uint32_t root = (uint32_t)ept_table_alloc(m, 0, FRAME_ROOT);
	struct guest_thread t[2];
	uint64_t before[COUNTERS], after[COUNTERS];
	pthread_t threads[2];
	pthread_barrier_t start;
	double rate = 0;

	pthread_barrier_init(&start, NULL, n);
	counters_sum(m, before);
	for (uint32_t i = 0; i < n; i++) {
		t[i] = (struct guest_thread){ .m = m, .cpu = i, .vcpu = make_guest(m, vm, root, i), .root = root,
					      .accesses = record_count * LOOPS_PER_REPEAT, .start = &start };
		REQUIRE(!pthread_create(&threads[i], NULL, run_guest, &t[i]));
	}
	for (uint32_t i = 0; i < n; i++) {
		pthread_join(threads[i], NULL);
		rate += (double)t[i].accesses * 1e9 / (double)t[i].ns;
	}
	counters_sum(m, after);
	/* Records that met an EPT violation were polled and looked up again: first rounds only. */
	REQUIRE(after[COUNT_ACCESSES] == n * record_count * (LOOPS_PER_REPEAT + 2));
	REQUIRE(after[COUNT_POLLS] == after[COUNT_LOOKUPS] && after[COUNT_LOOKUPS] == after[COUNT_CHECKS]);
	REQUIRE(after[COUNT_CHECKS] - after[COUNT_ACCESSES] <= 4 * (page_count + 4096) * n);
	machine_destroy(m);
	return rate;
}

int main(int argc, char **argv)
{
	double bare[64], one[64], two[64], ratio[64], scale[64];
	char name[64], reference[64];
	int repeats;

	REQUIRE(argc == 5);
	repeats = atoi(argv[4]);
	REQUIRE(repeats > 0 && repeats <= 64);
	records = bench_words(argv[2], &record_count);
	pages = bench_words(argv[3], &page_count);
	pin(0);
	for (int i = 0; i < repeats; i++) {
		bare[i] = bare_rate();
		one[i] = guest_rate(1);
		two[i] = guest_rate(2);
		ratio[i] = one[i] / bare[i];
		scale[i] = two[i] / one[i];
	}
	snprintf(name, sizeof(name), "guest accesses, %s", argv[1]);
	snprintf(reference, sizeof(reference), "bare direct-mapped loop");
	emit(name, "one pCPU, oracle on; ratio to the reference, at least 0.5 wanted",
	     quantile(one, (size_t)repeats, 0.5) / 1e6, "M/s", reference,
	     quantile(bare, (size_t)repeats, 0.5) / 1e6, quantile(ratio, (size_t)repeats, 0.5));
	snprintf(name, sizeof(name), "two pCPUs, %s", argv[1]);
	emit(name, "two cores; ratio to one pCPU, at least 1.8 wanted",
	     quantile(two, (size_t)repeats, 0.5) / 1e6, "M/s", "one pCPU",
	     quantile(one, (size_t)repeats, 0.5) / 1e6, quantile(scale, (size_t)repeats, 0.5));
	return 0;
}
