/* Map and zap per SPTE, beside a bare walk of the same tables from the root to each leaf, and beside such a walk
 * with one locked instruction a leaf.  Neither can do with fewer locked instructions: a fault that maps races other
 * faults, hence the kernel's cmpxchg in tdp_mmu_set_spte_atomic(), and a zap tells every pCPU through the frame's tag.
 *
 *   spte REPEATS
 */
#include "bench.h"

#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/tdp_map.h"
#include "ept/tdp_walk.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/frame.h"
#include "memory/mm.h"
#include "sync/rcu.h"

enum { GFNS = 1 << 16, TABLE = 512, CHUNK = 1024 };

static uint32_t hfns[GFNS], tags[GFNS], writable[GFNS];

/* Walk to each leaf: four dependent loads a gfn and, with `words`, a compare-and-swap of the gfn's own word. */
static inline __attribute__((always_inline)) double walk_leafs(struct machine *m, uint32_t root,
							       _Atomic uint16_t *words)
{
	uint64_t start = now_ns(), sum = 0;

	for (uint64_t gfn = 0; gfn < GFNS; gfn++) {
		uint32_t table = root;

		for (uint32_t level = 4; level > 1; level--)
			table = spte_hfn(atomic_load_explicit(
				&ept_table(m, table)[gfn >> 9 * (level - 1) & 511], memory_order_relaxed));
		sum += atomic_load_explicit(&ept_table(m, table)[gfn & 511], memory_order_relaxed);
		if (words) {
			uint16_t old = atomic_load_explicit(&words[gfn], memory_order_relaxed);

			REQUIRE(atomic_compare_exchange_strong_explicit(&words[gfn], &old, (uint16_t)(old + 1),
									memory_order_release,
									memory_order_relaxed));
		}
	}
	start = now_ns() - start;
	REQUIRE(sum != 1);
	return (double)start / GFNS;
}

static double bare_walk(struct machine *m, uint32_t root)
{
	return walk_leafs(m, root, NULL);
}

static double locked_walk(struct machine *m, uint32_t root)
{
	static _Atomic uint16_t words[GFNS];

	return walk_leafs(m, root, words);
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
		REQUIRE(tdp_mmu_map_around(m, 1, 0, leaf_table(m, root, gfn), gfn & 511, gfn, TABLE, hfns + gfn, tags + gfn,
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
	double walk[REPEATS_MAX], locked[REPEATS_MAX], map[REPEATS_MAX], zap[REPEATS_MAX];
	struct figure figure = { .unit = "ns", .ratio_of = "value/reference", .wanted = "ratio <= 2" };
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
		locked[i] = locked_walk(m, root);
		zap[i] = zap_all(m, root);
	}
	for (int with_lock = 0; with_lock < 2; with_lock++) {
		figure.reference_name = with_lock ? "bare walk and a compare-and-swap per leaf" : "bare walk per leaf";
		figure.references = with_lock ? locked : walk;
		figure.name = "map per SPTE";
		figure.what = "with its right in the ledger";
		figure.values = map;
		emit(&figure);
		figure.name = "zap per SPTE";
		figure.what = "with its right and the frame's tag";
		figure.values = zap;
		emit(&figure);
	}
	machine_destroy(m);
	return 0;
}
