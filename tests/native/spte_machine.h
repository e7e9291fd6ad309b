/* Shared by the tests of SPTEs: a machine with one VM and one path of tables, and threads on it. */
#ifndef FLUSHLAB_SPTE_MACHINE_H
#define FLUSHLAB_SPTE_MACHINE_H

#include "harness.h"

#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/frame.h"
#include "oracle/ledger.h"

enum { PAGES = 512, NARROW = 16, THREADS = 4 };

static struct machine *m;
static uint32_t root, path[5]; /* path[level]: the table of that level, all for gfn 0 */
static _Atomic uint32_t stop;
__attribute__((unused)) static uint32_t scale = 1;

static inline void machine_begin(uint32_t chaos)
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

static inline void machine_end(void)
{
	machine_destroy(m);
}

static inline uint32_t frame_of(uint64_t gfn)
{
	return m->frames->pool[FRAME_GUEST].first + (uint32_t)gfn;
}

static inline void check_no_right(void)
{
	struct ledger_entry e;

	for (uint64_t gfn = 0; gfn < PAGES; gfn++) {
		ledger_copy(m, 0, gfn, &e);
		CHECK(!e.live_read && !e.live_write);
	}
}

static inline uint32_t next_random(uint32_t *state)
{
	*state = *state * 1664525 + 1013904223;
	return *state >> 8;
}

static inline void run(uint32_t n, void *(*const *bodies)(void *), uint32_t rounds)
{
	struct actor actors[THREADS] = { 0 };

	for (uint32_t i = 0; i < n; i++) {
		actors[i] = (struct actor){ .m = m, .cpu = i, .rounds = rounds };
		actor_start(&actors[i], bodies[i]);
	}
	actor_join(&actors[0]);
	atomic_store(&stop, 1);
	for (uint32_t i = 1; i < n; i++)
		actor_join(&actors[i]);
}

#endif
