/* Guest accesses per second, oracle on, beside a bare loop that looks up a direct-mapped array.
 *
 *   guest_loop NAME RECORDS PAGES REPEATS
 *
 * RECORDS and PAGES are files of 64-bit words (a trace).  One pCPU; then, where there are two cores, two pCPUs,
 * each with its own guest.  Every record takes one poll, one look-up and one check, or the program fails.
 */
#include "bench.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "guest/guest.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/frame.h"
#include "sync/cpu.h"
#include "vm/guest_state.h"

enum { DIRECT = 4096, LOOPS_PER_REPEAT = 4 };

struct direct {
	uint64_t page;
	uint64_t value;
};

struct guest_thread {
	struct machine *m;
	uint32_t cpu;
	struct bench_guest guest;
	uint64_t accesses;
	uint64_t started;
	uint64_t ended;
	pthread_barrier_t *start;
};

static pthread_mutex_t faults = PTHREAD_MUTEX_INITIALIZER;
static uint64_t *records, *pages, record_count, page_count;

/* The reference: load a record, look its page up, use the value in the array.  A missing page is inserted, since a page
 * that shares its place with another would never be found again otherwise: four records in five of `shuf`. */
static double bare_rate(void)
{
	static struct direct table[DIRECT];
	uint64_t start, sum = 0, misses = 0;

	pin(0);
	for (uint64_t i = 0; i < page_count; i++)
		table[pages[i] % DIRECT] = (struct direct){ pages[i], i };
	start = now_ns();
	for (int loop = 0; loop < LOOPS_PER_REPEAT; loop++) {
		for (uint64_t i = 0; i < record_count; i++) {
			uint64_t page = records[i] >> 12 & ((1ull << 36) - 1);
			struct direct *d = &table[page % DIRECT];

			if (__builtin_expect(d->page != page, 0)) {
				*d = (struct direct){ page, i };
				misses++;
			}
			sum += d->value;
		}
	}
	start = now_ns() - start;
	unpin();
	/* The sum is used, so the loop stays. */
	REQUIRE(sum + misses != 1);
	return (double)record_count * LOOPS_PER_REPEAT * 1e9 / (double)start;
}

static struct bench_guest make_guest(struct machine *m, uint32_t vm, uint32_t root, uint32_t index)
{
	uint64_t gfns = page_count + 4096;
	struct guest_config config = { .first_gfn = index * gfns, .end_gfn = (index + 1) * gfns, .paging = 1,
				       .pcid = 1, .seed = index + 1 };
	struct bench_guest guest = bench_guest(m, vm, root, index + 1);

	REQUIRE(!guest_configure(m, guest.vcpu, &config));
	REQUIRE(!guest_add_process(m, guest.vcpu, records, record_count, pages, page_count));
	return guest;
}

/* The first rounds, which are not counted, fault all pages in: an access that meets an EPT violation takes a second
 * poll and look-up.  The guests run these rounds one after the other, because bench_map() allows no concurrency. */
static void *run_guest(void *argument)
{
	struct guest_thread *t = argument;
	uint64_t before[COUNTERS], after[COUNTERS];

	pin(t->cpu);
	cpu_online(t->m, t->cpu);
	pthread_mutex_lock(&faults);
	bench_run(t->m, t->cpu, &t->guest, record_count * 2);
	pthread_mutex_unlock(&faults);
	counters_read(t->m, t->cpu, before);
	pthread_barrier_wait(t->start);
	t->started = now_ns();
	bench_run(t->m, t->cpu, &t->guest, t->accesses);
	t->ended = now_ns();
	counters_read(t->m, t->cpu, after);
	REQUIRE(after[COUNT_ACCESSES] - before[COUNT_ACCESSES] == t->accesses);
	REQUIRE(after[COUNT_POLLS] - before[COUNT_POLLS] == t->accesses);
	REQUIRE(after[COUNT_LOOKUPS] - before[COUNT_LOOKUPS] == t->accesses);
	REQUIRE(after[COUNT_CHECKS] - before[COUNT_CHECKS] == t->accesses);
	return NULL;
}

/* Return the accesses per second of `n` pCPUs together, from the first start to the last end. */
static double guest_rate(uint32_t n)
{
	struct machine *m = bench_machine(2, (uint32_t)(page_count + 4096) * 2);
	uint32_t vm = (uint32_t)vm_create(m, (page_count + 4096) * 2);
	uint32_t root = (uint32_t)ept_table_alloc(m, 0, FRAME_ROOT);
	uint64_t first = UINT64_MAX, last = 0, accesses = 0;
	struct guest_thread t[2];
	pthread_t threads[2];
	pthread_barrier_t start;

	pthread_barrier_init(&start, NULL, n);
	for (uint32_t i = 0; i < n; i++) {
		t[i] = (struct guest_thread){ .m = m, .cpu = i, .guest = make_guest(m, vm, root, i),
					      .accesses = record_count * LOOPS_PER_REPEAT, .start = &start };
		REQUIRE(!pthread_create(&threads[i], NULL, run_guest, &t[i]));
	}
	for (uint32_t i = 0; i < n; i++) {
		pthread_join(threads[i], NULL);
		accesses += t[i].accesses;
		first = t[i].started < first ? t[i].started : first;
		last = t[i].ended > last ? t[i].ended : last;
	}
	pthread_barrier_destroy(&start);
	machine_destroy(m);
	return (double)accesses * 1e9 / (double)(last - first);
}

int main(int argc, char **argv)
{
	double bare[REPEATS_MAX], one[REPEATS_MAX], two[REPEATS_MAX];
	char name[80];
	bool two_cores;
	size_t repeats;

	REQUIRE(argc == 5);
	repeats = bench_number(argv[4], REPEATS_MAX);
	records = bench_words(argv[2], &record_count);
	pages = bench_words(argv[3], &page_count);
	two_cores = bench_cores() > 1;
	for (size_t i = 0; i < repeats; i++) {
		bare[i] = bare_rate() / 1e6;
		one[i] = guest_rate(1) / 1e6;
		two[i] = two_cores ? guest_rate(2) / 1e6 : 0;
	}
	snprintf(name, sizeof(name), "guest accesses, %s", argv[1]);
	emit(&(struct figure){ .name = name, .what = "one pCPU, oracle on: a poll, a look-up and a check each",
			       .unit = "M/s", .values = one, .reference_name = "bare direct-mapped loop",
			       .references = bare, .ratio_of = "value/reference", .wanted = "ratio >= 0.5",
			       .repeats = repeats });
	if (!two_cores)
		return 0;
	snprintf(name, sizeof(name), "guest accesses of two pCPUs, %s", argv[1]);
	emit(&(struct figure){ .name = name, .what = "together, each with its own guest on its own core",
			       .unit = "M/s", .values = two, .reference_name = "one pCPU", .references = one,
			       .ratio_of = "value/reference", .wanted = "ratio >= 1.8", .repeats = repeats });
	return 0;
}
