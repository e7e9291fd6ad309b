/* A working set beyond the TLB, beside a bare two-dimensional walk of the same tables.
 *
 *   walk REPEATS
 *
 * Random accesses over 16384 pages: nine in ten miss the 1536-entry second level.  The reference walks the four
 * guest levels, each through the four EPT levels: 24 loads, no caches, no checks.
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
#include "vm/vm.h"

enum { PAGES = 16384, RECORDS = 1 << 20 };

static uint64_t records[RECORDS], pages[PAGES];

static uint64_t ept_walk(const struct machine *m, uint32_t root, uint64_t gfn)
{
	uint32_t table = root;
	uint64_t spte = 0;

	for (uint32_t level = 4; level; level--) {
		spte = atomic_load_explicit(&ept_table(m, table)[gfn >> 9 * (level - 1) & 511],
					    memory_order_relaxed);
		table = spte_hfn(spte);
	}
	return spte;
}

static uint64_t walk_2d(const struct machine *m, uint32_t root, uint64_t cr3_gfn, uint64_t page)
{
	uint64_t gfn = cr3_gfn;

	for (uint32_t level = 4; level; level--) {
		uint32_t hfn = spte_hfn(ept_walk(m, root, gfn));
		const _Atomic uint64_t *table = (const void *)frame_memory(m->frames, hfn);

		gfn = (atomic_load_explicit(&table[page >> 9 * (level - 1) & 511], memory_order_relaxed) &
		       GPTE_ADDRESS) >> 12;
	}
	return ept_walk(m, root, gfn);
}

static double bare(const struct machine *m, uint32_t root, uint64_t cr3_gfn)
{
	uint64_t start = now_ns(), sum = 0;

	for (uint32_t i = 0; i < RECORDS; i++)
		sum += walk_2d(m, root, cr3_gfn, records[i] >> 12 & GUEST_PAGE_MASK);
	start = now_ns() - start;
	REQUIRE(sum != 1);
	return (double)start / RECORDS;
}

static struct bench_guest make_guest(struct machine *m)
{
	struct guest_config config = { .end_gfn = PAGES + 4096, .paging = 1, .pcid = 1, .seed = 1 };
	uint64_t random = 1;
	struct bench_guest guest;

	for (uint64_t i = 0; i < PAGES; i++)
		pages[i] = 0x5000 + i;
	for (uint32_t i = 0; i < RECORDS; i++) {
		random = random * 6364136223846793005u + 1442695040888963407u;
		records[i] = pages[(random >> 33) % PAGES] << 12 | (random >> 20 & 0xff8);
	}
	REQUIRE(vm_create(m, PAGES + 4096) == 0);
	guest = bench_guest(m, 0, (uint32_t)ept_table_alloc(m, 1, FRAME_ROOT), 1);
	REQUIRE(!guest_configure(m, guest.vcpu, &config));
	REQUIRE(!guest_add_process(m, guest.vcpu, records, RECORDS, pages, PAGES));
	return guest;
}

int main(int argc, char **argv)
{
	double reference[REPEATS_MAX], ns[REPEATS_MAX];
	struct figure figure = { .name = "access beyond the TLB", .unit = "ns", .ratio_of = "value/reference",
				 .what = "nine in ten miss both levels; oracle on",
				 .reference_name = "bare two-dimensional walk, 24 loads",
				 .values = ns, .references = reference };
	uint64_t before[COUNTERS], after[COUNTERS], records_run;
	struct machine *m;
	struct bench_guest guest;

	REQUIRE(argc == 2);
	figure.repeats = bench_number(argv[1], REPEATS_MAX);
	records_run = figure.repeats * RECORDS;
	m = bench_machine(1, PAGES + 4096);
	pin(0);
	cpu_online(m, 0);
	guest = make_guest(m);
	bench_run(m, 0, &guest, RECORDS * 2);
	counters_sum(m, before);
	for (size_t i = 0; i < figure.repeats; i++) {
		uint64_t start = now_ns();

		bench_run(m, 0, &guest, RECORDS);
		ns[i] = (double)(now_ns() - start) / RECORDS;
		reference[i] = bare(m, guest.root, m->vcpus[guest.vcpu].guest->cr3_gfn);
	}
	counters_sum(m, after);
	REQUIRE(after[COUNT_POLLS] - before[COUNT_POLLS] == records_run);
	REQUIRE(after[COUNT_LOOKUPS] - before[COUNT_LOOKUPS] == records_run);
	REQUIRE(after[COUNT_CHECKS] - before[COUNT_CHECKS] == records_run);
	REQUIRE((after[COUNT_L2_MISSES] - before[COUNT_L2_MISSES]) * 10 > records_run * 8);
	emit(&figure);
	machine_destroy(m);
	return 0;
}
