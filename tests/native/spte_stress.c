/* Single SPTE steps against each other, against hardware's A and D, and against a checker of the ledger. */
#include "spte_machine.h"

#include <string.h>

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_remove.h"
#include "memory/frame.h"
#include "oracle/ledger.h"

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

/* --- tdp_removal_step() against faults ---------------------------------------------------------------- */

static _Atomic uint32_t removed_round, fillers_done;

/* Faults that found the table before it was unlinked: they map and unmap right where it is about to be frozen. */
static void *fills(void *argument)
{
	struct actor *a = argument;

	for (uint32_t round = 1; round <= a->rounds; round++) {
		uint32_t index = 0, table;

		while (atomic_load(&removed_round) < round)
			sched_yield();
		table = path[1];
		while (index < PAGES) {
			uint64_t old = spte_read(m, table, index);
			uint64_t spte = make_spte(frame_of(index), 0, PG_LEVEL_4K, 1, 1);

			if (old == FROZEN_SPTE)
				index++;
			else
				tdp_mmu_set_spte_atomic(m, a->cpu, 0, table, index, 1, index, old, old ? 0 : spte);
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
		struct tdp_removal removal;

		path[1] = (uint32_t)ept_table_alloc(m, a->cpu, FRAME_TABLE);
		atomic_store(&fillers_done, 0);
		atomic_store(&removed_round, round);
		for (uint32_t i = 0; i < round % 4; i++)
			sched_yield();
		CHECK(!tdp_removal_begin(m, a->cpu, 0, &removal, make_nonleaf_spte(m, path[1]), 2, 0, 1));
		while (removal.level)
			CHECK(!tdp_removal_step(m, a->cpu, 0, &removal, 1 + round % 512));
		page = removal.page;
		CHECK(page == path[1]);
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
	run(3, bodies, (chaos ? 10 : 300) * scale);
	machine_end();
}

/* --- exclusive writers against fast page faults and hardware ------------------------------------------- */

/* The value that hardware and fast page faults left in each SPTE, for its writer to find. */
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

int main(int argc, char **argv)
{
	if (argc > 1)
		scale = (uint32_t)strtoul(argv[1], NULL, 10);
	for (uint32_t chaos = 0; chaos <= 16; chaos += 16) {
		test_grants_cover_sptes(chaos);
		test_removed_table(chaos);
		test_exclusive(chaos);
	}
	return 0;
}
