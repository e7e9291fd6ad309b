/* SPTE steps against each other, against hardware's A and D, and against a checker of the ledger. */
#include <string.h>

#include "ept.h"
#include "harness.h"
#include "oracle.h"

enum { PAGES = 512, THREADS = 4 };

static struct machine *m;
static uint32_t root, path[5]; /* path[level]: the table of that level, all for gfn 0 */
static _Atomic uint32_t stop;
static uint32_t scale = 1;

static void machine_begin(uint32_t chaos)
{
	struct machine_config config = {
		.pcpus = THREADS, .housekeeping = 2, .vms = 1, .vcpus = 1,
		.root_frames = 2, .table_frames = 64, .guest_frames = PAGES, .guest_blocks = 1,
		.l1_ways = 4, .l2_entries = 64, .l2_ways = 4, .psc_entries = 16, .chaos = chaos, .seed = 1,
	};
	char error[200] = "";

	m = machine_create(&config, error, sizeof(error));
	CHECK(m && vm_create(m, PAGES) == 0);
	root = path[4] = (uint32_t)ept_table_alloc(m, THREADS, FRAME_ROOT);
	for (uint32_t level = 4; level > 1; level--) {
		path[level - 1] = (uint32_t)ept_table_alloc(m, THREADS, FRAME_TABLE);
		CHECK(!tdp_mmu_set_spte_atomic(m, THREADS, 0, path[level], 0, level, 0, 0,
					       make_nonleaf_spte(m, path[level - 1])));
	}
	atomic_store(&stop, 0);
}

static void machine_end(void)
{
	machine_destroy(m);
}

static uint32_t frame_of(uint64_t gfn)
{
	return m->frames->pool[FRAME_GUEST].first + (uint32_t)gfn;
}

static void check_no_right(void)
{
	struct ledger_entry e;

	for (uint64_t gfn = 0; gfn < PAGES; gfn++) {
		ledger_copy(m, 0, gfn, &e);
		CHECK(!e.live_read && !e.live_write);
	}
}

static uint32_t next_random(uint32_t *state)
{
	*state = *state * 1664525 + 1013904223;
	return *state >> 8;
}

static void run(uint32_t n, void *(*const *bodies)(void *), uint32_t rounds)
{
	struct actor actors[THREADS];

	for (uint32_t i = 0; i < n; i++) {
		actors[i] = (struct actor){ .m = m, .cpu = i, .rounds = rounds };
		actor_start(&actors[i], bodies[i]);
	}
	actor_join(&actors[0]);
	atomic_store(&stop, 1);
	for (uint32_t i = 1; i < n; i++)
		actor_join(&actors[i]);
}

/* --- a present SPTE has its rights in the ledger ------------------------------------------------------- */

static _Atomic uint32_t seen;

/* Each SPTE value is new (custody counts up), so that a checker knows that it looked at one life of it. */
static void *maps_and_zaps(void *argument)
{
	struct actor *a = argument;
	uint32_t random = 1;

	for (uint32_t i = 1; i <= a->rounds || atomic_load(&seen) < a->rounds / 16; i++) {
		uint64_t gfn = next_random(&random) % 8;
		uint64_t spte = make_spte(frame_of(gfn), i, PG_LEVEL_4K, 1, 1);

		CHECK(!tdp_mmu_set_spte_atomic(m, a->cpu, 0, path[1], (uint32_t)gfn, 1, gfn, 0, spte));
		if (i & 1)
			CHECK(tdp_mmu_set_spte(m, a->cpu, 0, path[1], (uint32_t)gfn, 1, gfn, 0) == spte);
		else
			CHECK(!tdp_mmu_set_spte_atomic(m, a->cpu, 0, path[1], (uint32_t)gfn, 1, gfn, spte, 0));
	}
	return NULL;
}

static void *checks_grants(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	while (!atomic_load(&stop)) {
		uint64_t gfn = next_random(&random) % 8, spte = spte_read(m, path[1], (uint32_t)gfn);
		struct ledger_entry e;

		if (!spte_present(spte))
			continue;
		ledger_copy(m, 0, gfn, &e);
		if (spte_read(m, path[1], (uint32_t)gfn) != spte)
			continue;
		CHECK(e.hfn == spte_hfn(spte) && e.live_read && e.live_write);
		atomic_fetch_add(&seen, 1);
	}
	return NULL;
}

static void test_grants_cover_sptes(uint32_t chaos)
{
	void *(*const bodies[])(void *) = { maps_and_zaps, checks_grants, checks_grants };

	harness_begin("a present SPTE has its rights in the ledger", 120);
	machine_begin(chaos);
	atomic_store(&seen, 0);
	run(3, bodies, (chaos ? 5000 : 100000) * scale);
	check_no_right();
	machine_end();
}

/* --- handle_removed_pt() against faults ---------------------------------------------------------------- */

static _Atomic uint32_t removed_round, fillers_done;

/* Faults that found the table before it was unlinked: they map whatever they can until it is frozen. */
static void *fills(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	for (uint32_t round = 1; round <= a->rounds; round++) {
		uint32_t table, index = next_random(&random) % PAGES;

		while (atomic_load(&removed_round) < round)
			sched_yield();
		table = path[1];
		for (uint32_t i = 0; i < PAGES; i++, index = (index + 1) % PAGES) {
			uint64_t spte = make_spte(frame_of(index), 0, PG_LEVEL_4K, 1, 1);

			tdp_mmu_set_spte_atomic(m, a->cpu, 0, table, index, 1, index, 0, spte);
			tdp_mmu_set_spte_atomic(m, a->cpu, 0, table, index, 1, index, spte, 0);
			tdp_mmu_set_spte_atomic(m, a->cpu, 0, table, index, 1, index, 0, spte);
		}
		atomic_fetch_add(&fillers_done, 1);
	}
	return NULL;
}

static void *removes(void *argument)
{
	struct actor *a = argument;
	uint32_t page;

	for (uint32_t round = 1; round <= a->rounds; round++) {
		path[1] = (uint32_t)ept_table_alloc(m, a->cpu, FRAME_TABLE);
		atomic_store(&fillers_done, 0);
		atomic_store(&removed_round, round);
		sched_yield();
		CHECK(handle_removed_pt(m, a->cpu, 0, path[1], 1, 0, 1, 0, &page, 1) == 1 && page == path[1]);
		while (atomic_load(&fillers_done) < 2)
			sched_yield();
		for (uint32_t i = 0; i < PAGES; i++)
			CHECK(spte_read(m, page, i) == FROZEN_SPTE);
		check_no_right();
		ept_table_free(m, a->cpu, page);
	}
	return NULL;
}

static void test_removed_table(uint32_t chaos)
{
	void *(*const bodies[])(void *) = { removes, fills, fills };

	harness_begin("no right survives a removed table", 120);
	machine_begin(chaos);
	atomic_store(&removed_round, 0);
	run(3, bodies, (chaos ? 10 : 150) * scale);
	machine_end();
}

/* --- exclusive writers against fast page faults and hardware ------------------------------------------- */

/* What hardware and fast page faults did to each SPTE, for its writer to find: the value that they left. */
static _Atomic uint64_t left[8];

static void *hardware(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	while (!atomic_load(&stop)) {
		uint32_t i = next_random(&random) % 8;
		uint64_t spte = spte_read(m, path[1], i), next = spte | SPTE_ACCESSED | SPTE_DIRTY;

		if (!(spte & SPTE_WRITABLE) || next == spte)
			continue;
		if (atomic_compare_exchange_strong(&ept_table(m, path[1])[i], &spte, next))
			atomic_store(&left[i], next);
	}
	return NULL;
}

static void *fast_page_faults(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	while (!atomic_load(&stop)) {
		uint32_t i = next_random(&random) % 8;
		uint64_t spte = spte_read(m, path[1], i);

		if (spte_present(spte) && !(spte & SPTE_WRITABLE))
			tdp_mmu_set_spte_atomic(m, a->cpu, 0, path[1], i, 1, i, spte, spte | SPTE_WRITABLE);
	}
	return NULL;
}

/* Maps without W and D, lets the others at it, takes it away: whatever Dirty they managed to set is in what the
 * writer is told was there, and no right stays behind. */
static void *replaces(void *argument)
{
	struct actor *a = argument;

	for (uint32_t round = 1; round <= a->rounds; round++) {
		uint32_t i = round % 8;
		uint64_t spte = make_spte(frame_of(i), round, PG_LEVEL_4K, 1, 1), old, by_others;

		spte &= ~(uint64_t)(SPTE_WRITABLE | SPTE_DIRTY | SPTE_ACCESSED);
		atomic_store(&left[i], UINT64_MAX);
		tdp_mmu_set_spte(m, a->cpu, 0, path[1], i, 1, i, spte);
		for (uint32_t spin = round % 64; spin; spin--)
			cpu_relax();
		if (round % 32 == 0)
			sched_yield();
		if (round & 1) {
			/* Write-protect and give back, in place. */
			tdp_mmu_set_spte(m, a->cpu, 0, path[1], i, 1, i, spte);
			tdp_mmu_set_spte(m, a->cpu, 0, path[1], i, 1, i, spte | SPTE_WRITABLE);
		}
		old = tdp_mmu_set_spte(m, a->cpu, 0, path[1], i, 1, i, 0);
		CHECK(spte_custody(old) == (round & FRAME_TAG_MASK));
		by_others = atomic_load(&left[i]);
		if (!(round & 1) && by_others != UINT64_MAX && spte_custody(by_others) == (round & FRAME_TAG_MASK))
			CHECK(old & SPTE_DIRTY);
	}
	return NULL;
}

static void test_exclusive(uint32_t chaos)
{
	void *(*const bodies[])(void *) = { replaces, hardware, fast_page_faults };

	harness_begin("exclusive writers lose neither Dirty nor rights", 120);
	machine_begin(chaos);
	memset(left, 0xff, sizeof(left));
	run(3, bodies, (chaos ? 5000 : 100000) * scale);
	check_no_right();
	machine_end();
}

/* --- chunked walks against each other ------------------------------------------------------------------ */

static _Atomic uint64_t mapped, zapped;

static void *walks(void *argument, uint32_t walk, uint32_t *passes)
{
	struct actor *a = argument;

	do {
		struct tdp_chunk c = { .root = root, .root_level = 4, .walk = walk, .shared = 1, .end_gfn = PAGES };

		while (!c.done) {
			rcu_read_lock(m, a->cpu);
			CHECK(!tdp_walk_chunk(m, a->cpu, 0, &c, 7));
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
	/* Once more when nobody maps any longer. */
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
		uint32_t gfn = next_random(&random) % PAGES, n = 1 + next_random(&random) % 32;

		atomic_fetch_add(&mapped, (uint64_t)tdp_mmu_map_around(m, a->cpu, 0, path[1], gfn, n, hfns + gfn,
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

int main(int argc, char **argv)
{
	if (argc > 1)
		scale = (uint32_t)strtoul(argv[1], NULL, 10);
	for (uint32_t chaos = 0; chaos <= 16; chaos += 16) {
		test_grants_cover_sptes(chaos);
		test_removed_table(chaos);
		test_exclusive(chaos);
		test_shared_walks(chaos);
	}
	return 0;
}
