/* Chunked walks over the same SPTEs by several threads. */
#include "spte_machine.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/tdp_map.h"
#include "ept/tdp_walk.h"
#include "memory/frame.h"
#include "sync/rcu.h"

/* --- chunked walks against each other ------------------------------------------------------------------ */

static _Atomic uint64_t mapped, zapped;

static void *walks(void *argument, uint32_t walk, uint32_t *passes)
{
	struct actor *a = argument;

	do {
		struct tdp_chunk c = { .root = root, .root_level = 4, .walk = walk, .shared = 1, .end_gfn = NARROW };

		while (!c.done) {
			rcu_read_lock(m, a->cpu);
			CHECK(!tdp_walk_chunk(m, a->cpu, 0, &c, 5));
			rcu_read_unlock(m, a->cpu);
			if (walk == TDP_ZAP_LEAFS)
				atomic_fetch_add(&zapped, c.pages);
		}
		++*passes;
	} while (!atomic_load(&stop));
	return NULL;
}

static void *zaps(void *argument)
{
	uint32_t passes = 0;

	walks(argument, TDP_ZAP_LEAFS, &passes);
	/* Once more when no thread maps any longer. */
	return walks(argument, TDP_ZAP_LEAFS, &passes);
}

static void *protects(void *argument)
{
	uint32_t passes = 0;

	return walks(argument, TDP_WRPROT, &passes);
}

static void *maps_around(void *argument)
{
	struct actor *a = argument;
	uint32_t hfns[PAGES], tags[PAGES], writable[PAGES], random = 5;

	for (uint32_t i = 0; i < PAGES; i++) {
		hfns[i] = frame_of(i);
		tags[i] = frame_host_tag(m->frames, hfns[i]);
		writable[i] = 1;
	}
	for (uint32_t round = 0; round < a->rounds; round++) {
		uint32_t gfn = next_random(&random) % NARROW, n = 1 + next_random(&random) % (NARROW - gfn);

		atomic_fetch_add(&mapped, (uint64_t)tdp_mmu_map_around(m, a->cpu, 0, path[1], gfn, gfn, n, hfns + gfn,
								       tags + gfn, writable + gfn));
	}
	return NULL;
}

static void test_shared_walks(uint32_t chaos)
{
	void *(*const bodies[])(void *) = { maps_around, zaps, zaps, protects };

	harness_begin("each mapping is zapped once, whoever does it", 120);
	machine_begin(chaos);
	atomic_store(&mapped, 0);
	atomic_store(&zapped, 0);
	run(4, bodies, (chaos ? 1000 : 20000) * scale);
	CHECK(atomic_load(&mapped) == atomic_load(&zapped) && atomic_load(&mapped));
	check_no_right();
	machine_end();
}

/* --- two walks over the same SPTEs at the same time ----------------------------------------------------- */

static _Atomic uint32_t arrived, shared_pages;

static void meet(uint32_t n)
{
	atomic_fetch_add(&arrived, 1);
	for (uint32_t turn = 1; atomic_load(&arrived) < n; turn++)
		harness_spin(turn);
}

static void walk_once(uint32_t cpu, uint32_t walk)
{
	struct tdp_chunk c = { .root = root, .root_level = 4, .walk = walk, .shared = 1, .end_gfn = PAGES };

	while (!c.done) {
		CHECK(!tdp_walk_chunk(m, cpu, 0, &c, 64));
		if (walk == TDP_ZAP_LEAFS)
			atomic_fetch_add(&shared_pages, (uint32_t)c.pages);
	}
}

/* CPU 0 maps everything and zaps it; the other one zaps as well, or write-protects. */
static void *walks_together(void *argument)
{
	struct actor *a = argument;
	uint32_t hfns[PAGES], tags[PAGES] = { 0 }, writable[PAGES];

	for (uint32_t i = 0; i < PAGES; i++) {
		hfns[i] = frame_of(i);
		writable[i] = 1;
	}
	for (uint32_t round = 1; round <= a->rounds; round++) {
		if (!a->cpu) {
			CHECK(tdp_mmu_map_around(m, 0, 0, path[1], 0, 0, PAGES, hfns, tags, writable) == PAGES);
			atomic_store(&shared_pages, 0);
		}
		meet(round * 6 - 4);
		walk_once(a->cpu, a->cpu && round & 1 ? TDP_WRPROT : TDP_ZAP_LEAFS);
		meet(round * 6 - 2);
		CHECK(atomic_load(&shared_pages) == PAGES);
		if (!a->cpu)
			check_no_right();
		for (uint32_t i = 0; i < PAGES; i++)
			CHECK(!spte_read(m, path[1], i));
		meet(round * 6);
	}
	return NULL;
}

static void test_two_walks(uint32_t chaos)
{
	void *(*const bodies[])(void *) = { walks_together, walks_together };

	harness_begin("two walks over the same SPTEs", 120);
	machine_begin(chaos);
	atomic_store(&arrived, 0);
	run(2, bodies, (chaos ? 100 : 1000) * scale);
	machine_end();
}

/* --- ageing without a lock ------------------------------------------------------------------------------ */

static _Atomic uint64_t young, aged;

static void *ages(void *argument)
{
	struct actor *a = argument;

	do {
		struct tdp_chunk c = { .root = root, .root_level = 4, .walk = TDP_AGE, .shared = 1, .end_gfn = NARROW };

		rcu_read_lock(m, a->cpu);
		CHECK(!tdp_walk_chunk(m, a->cpu, 0, &c, NARROW) && c.done && c.young >= c.changed);
		rcu_read_unlock(m, a->cpu);
		atomic_fetch_add(&aged, c.changed);
		atomic_fetch_add(&young, c.young);
	} while (!atomic_load(&stop));
	return NULL;
}

/* Return whether an update was lost: agers add to `aged` first. */
static bool lost(void)
{
	uint64_t seen = atomic_load(&young);

	return seen > atomic_load(&aged);
}

/* Set A again and again, as walks do, until an ager has found an SPTE used and lost the race to clear A. */
static void *uses(void *argument)
{
	uint64_t used = 0, until = monotonic_ns() + UINT64_C(60000000000);
	bool found;

	(void)argument;
	do {
		for (uint64_t gfn = 0; gfn < NARROW; gfn++) {
			_Atomic uint64_t *sptep = &ept_table(m, path[1])[gfn];

			used += !(atomic_fetch_or(sptep, SPTE_ACCESSED) & SPTE_ACCESSED);
		}
		found = lost();
	} while (!found && monotonic_ns() < until);
	CHECK(found && used);
	return NULL;
}

/* A lost update ends the look at that SPTE: agers do not read it again, and call it young. */
static void test_agers_do_not_retry(void)
{
	void *(*const bodies[])(void *) = { uses, ages, ages };
	uint32_t hfns[NARROW], tags[NARROW] = { 0 }, writable[NARROW] = { 0 };

	harness_begin("ageing gives up SPTEs that change", 120);
	machine_begin(0);
	for (uint32_t i = 0; i < NARROW; i++)
		hfns[i] = frame_of(i);
	CHECK(tdp_mmu_map_around(m, THREADS, 0, path[1], 0, 0, NARROW, hfns, tags, writable) == NARROW);
	atomic_store(&young, 0);
	atomic_store(&aged, 0);
	run(3, bodies, 0);
	machine_end();
}

int main(int argc, char **argv)
{
	if (argc > 1)
		scale = (uint32_t)strtoul(argv[1], NULL, 10);
	for (uint32_t chaos = 0; chaos <= 16; chaos += 16) {
		test_shared_walks(chaos);
		test_two_walks(chaos);
	}
	test_agers_do_not_retry();
	return 0;
}
