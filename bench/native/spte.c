/* Map and zap per SPTE, beside a bare walk of the same tables from the root to each leaf.
 *
 *   spte REPEATS
 */
#include "bench.h"

enum { GFNS = 1 << 16, TABLE = 512, CHUNK = 1024 };

static uint32_t hfns[GFNS], tags[GFNS], writable[GFNS];

/* Four dependent loads a gfn, nothing else. */
static double bare_walk(struct machine *m, uint32_t root)
{
	uint64_t start = now_ns(), sum = 0;

	for (uint64_t gfn = 0; gfn < GFNS; gfn++) {
		uint32_t table = root;

		for (uint32_t level = 4; level > 1; level--)
			table = spte_hfn(atomic_load_explicit(
				&ept_table(m, table)[gfn >> 9 * (level - 1) & 511], memory_order_relaxed));
		sum += atomic_load_explicit(&ept_table(m, table)[gfn & 511], memory_order_relaxed);
	}
	start = now_ns() - start;
	REQUIRE(sum != 1);
	return (double)start / GFNS;
}

static uint32_t leaf_table(struct machine *m, uint32_t root, uint64_t gfn)
{
	uint64_t sptes[6];
	uint32_t tables[6];

	REQUIRE(tdp_mmu_get_walk(m, root, 4, gfn, sptes, tables) == 1);
	return tables[1];
}

static double map_all(struct machine *m, uint32_t root)
{
	uint64_t start = now_ns();

	rcu_read_lock(m, 1);
	for (uint64_t gfn = 0; gfn < GFNS; gfn += TABLE)
		REQUIRE(tdp_mmu_map_around(m, 1, 0, leaf_table(m, root, gfn), gfn, TABLE, hfns + gfn, tags + gfn,
					   writable + gfn) == TABLE);
	rcu_read_unlock(m, 1);
	return (double)(now_ns() - start) / GFNS;
}

static double zap_all(struct machine *m, uint32_t root)
{
	struct tdp_chunk chunk = { .root = root, .root_level = 4, .walk = TDP_ZAP_LEAFS, .end_gfn = GFNS };
	uint64_t start = now_ns(), zapped = 0;

	while (!chunk.done) {
		REQUIRE(tdp_walk_chunk(m, 1, 0, &chunk, CHUNK) >= 0);
		zapped += chunk.changed;
	}
	start = now_ns() - start;
	REQUIRE(zapped == GFNS);
	return (double)start / GFNS;
}

int main(int argc, char **argv)
{
	double walk[REPEATS_MAX], map[REPEATS_MAX], zap[REPEATS_MAX];
	struct figure figure = { .unit = "ns", .reference_name = "bare walk per leaf",
				 .ratio_of = "value/reference", .wanted = "ratio <= 2" };
	struct machine *m;
	uint32_t root;

	REQUIRE(argc == 2);
	figure.repeats = bench_number(argv[1], REPEATS_MAX);
	m = bench_machine(1, GFNS + 16);
	pin(0);
	REQUIRE(vm_create(m, GFNS) == 0);
	root = (uint32_t)ept_table_alloc(m, 1, FRAME_ROOT);
	for (uint64_t gfn = 0; gfn < GFNS; gfn++)
		bench_map(m, 1, 0, root, gfn);
	REQUIRE(mm_fault_range(m, 1, 0, 0, GFNS, 0, hfns, tags, writable) == GFNS);
	zap_all(m, root);
	for (size_t i = 0; i < figure.repeats; i++) {
		map[i] = map_all(m, root);
		walk[i] = bare_walk(m, root);
		zap[i] = zap_all(m, root);
	}
	figure.references = walk;
	figure.name = "map per SPTE";
	figure.what = "with its right in the ledger";
	figure.values = map;
	emit(&figure);
	figure.name = "zap per SPTE";
	figure.what = "with its right and the frame's tag";
	figure.values = zap;
	emit(&figure);
	machine_destroy(m);
	return 0;
}
