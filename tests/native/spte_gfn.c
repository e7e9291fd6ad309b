/* The gfn of an SPTE is its caller's: an entry of a table that shadows a guest's may map any gfn, and two entries may
 * map the same one.  The ledger keeps the rights of the gfn that the caller names, wherever the SPTE stands. */
#include "spte_machine.h"

enum { CPU = THREADS, GFN = 77 };

static struct ledger_entry right_of(uint64_t gfn)
{
	struct ledger_entry e;

	ledger_copy(m, 0, gfn, &e);
	return e;
}

static struct spte_place place(uint32_t index, uint64_t gfn)
{
	return (struct spte_place){ .table = path[1], .index = index, .level = 1, .gfn = gfn };
}

static uint64_t leaf(int writable)
{
	return make_spte(frame_of(GFN), frame_host_tag(m->frames, frame_of(GFN)), 1, writable, 1);
}

static void grants_the_gfn_of_the_caller(void)
{
	struct spte_place first = place(5, GFN), second = place(6, GFN);
	uint64_t read_only = leaf(1) & ~(uint64_t)SPTE_WRITABLE;

	CHECK(!spte_set_atomic(m, CPU, 0, &first, 0, leaf(1)));
	CHECK(right_of(GFN).live_read == 1 && right_of(GFN).live_write == 1);
	CHECK(!right_of(first.index).live_read);
	CHECK(spte_set(m, CPU, 0, &second, leaf(1)) == 0);
	CHECK(right_of(GFN).live_read == 2 && right_of(GFN).live_write == 2);
	CHECK(!spte_set_atomic(m, CPU, 0, &first, leaf(1), read_only));
	CHECK(right_of(GFN).live_read == 2 && right_of(GFN).live_write == 1);
	CHECK(spte_set(m, CPU, 0, &second, 0) == leaf(1));
	CHECK(right_of(GFN).live_read == 1 && !right_of(GFN).live_write);
	CHECK(spte_set(m, CPU, 0, &first, 0) == read_only);
	check_no_right();
}

static void refuses_what_is_no_entry_or_no_gfn(void)
{
	struct spte_place beyond = place(512, GFN), huge = { path[2], 1, 2, GFN }, outside = place(5, PAGES);

	CHECK(spte_set_atomic(m, CPU, 0, &beyond, 0, leaf(1)) == MACHINE_MISUSE);
	CHECK(spte_set(m, CPU, 0, &huge, leaf(1) | SPTE_PAGE_SIZE) == UINT64_MAX);
	CHECK(spte_set_atomic(m, CPU, 0, &outside, 0, leaf(1)) == MACHINE_MISUSE);
	check_no_right();
}

static void the_tdp_mmu_refuses_a_gfn_of_another_place(void)
{
	CHECK(tdp_mmu_set_spte_atomic(m, CPU, 0, path[1], 5, 1, GFN, 0, leaf(1)) == MACHINE_MISUSE);
	CHECK(tdp_mmu_set_spte(m, CPU, 0, path[1], 5, 1, GFN, leaf(1)) == UINT64_MAX);
	check_no_right();
	CHECK(!tdp_mmu_set_spte_atomic(m, CPU, 0, path[1], GFN, 1, GFN, 0, leaf(1)));
	CHECK(tdp_mmu_set_spte(m, CPU, 0, path[1], GFN, 1, GFN, 0) == leaf(1));
	check_no_right();
}

int main(void)
{
	machine_begin(0);
	harness_begin("rights are those of the gfn that the caller names", 60);
	grants_the_gfn_of_the_caller();
	harness_begin("no entry, no gfn", 60);
	refuses_what_is_no_entry_or_no_gfn();
	harness_begin("in the TDP MMU, index and gfn agree", 60);
	the_tdp_mmu_refuses_a_gfn_of_another_place();
	machine_end();
	return 0;
}
