/* Many SPTEs of one table at once: splitting a huge page, and mapping around a fault. */
#include "ept/tdp_map.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "ept/tdp_mmu.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "oracle/ledger.h"
#include "sync/cpu.h"
#include "vm/vm.h"

enum { NO_FRAME = 0xffffffff };

int tdp_mmu_fill_split_table(struct machine *m, uint32_t cpu, uint32_t table, uint64_t huge_spte, uint32_t level)
{
	uint64_t child = huge_spte, step = kvm_pages_per_hpage(level - 1);
	bool single = level - 1 == PG_LEVEL_4K;

	if (level <= PG_LEVEL_4K || !is_last_spte(huge_spte, level))
		return cpu_misuse(m, cpu, "a table for an SPTE of level %u, which is no huge page", level);
	if (single)
		child &= ~((uint64_t)SPTE_PAGE_SIZE | (uint64_t)FRAME_TAG_MASK << SPTE_CUSTODY_SHIFT);
	/* Relaxed: the page is invisible until it is linked, with release. */
	for (uint32_t i = 0; i < FRAME_WORDS; i++, child += step << SPTE_HFN_SHIFT) {
		uint64_t custody = single ? frame_custody_of_one(m->frames, spte_hfn(child),
								 spte_leaf_custody(huge_spte, level)) : 0;

		atomic_store_explicit(&ept_table(m, table)[i], child | custody << SPTE_CUSTODY_SHIFT,
				      memory_order_relaxed);
	}
	return 0;
}

/* spte_try_change() from nothing to a 4K leaf of this frame and custody, without its checks.  bits: all others of the
 * SPTE. */
static inline bool install(struct machine *m, struct ledger_cursor *c, _Atomic uint64_t *sptep, uint64_t gfn,
			   uint64_t bits, uint32_t hfn, uint32_t custody)
{
	uint64_t spte = bits | (uint64_t)hfn << SPTE_HFN_SHIFT | (uint64_t)custody << SPTE_CUSTODY_SHIFT, old = 0;
	uint32_t host;

	/* Only into empty entries: frozen SPTEs and mappings of another fault are not touched. */
	if (atomic_load_explicit(sptep, memory_order_relaxed))
		return false;
	host = frame_host(m->frames, hfn);
	/* A custody has no FRAME_HOST_READONLY. */
	ledger_grant_one(c, gfn, hfn, custody == (host & FRAME_TAG_MASK), bits & SPTE_WRITABLE, custody == host);
	/* Orders as in spte_try_change(). */
	if (atomic_compare_exchange_strong_explicit(sptep, &old, spte, memory_order_acq_rel, memory_order_relaxed))
		return true;
	spte_ungrant_at(c, m->frames, gfn, spte, PG_LEVEL_4K, true, spte & SPTE_WRITABLE);
	return false;
}

int tdp_mmu_map_around(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index, uint64_t gfn,
		       uint32_t n, const uint32_t *hfns, const uint32_t *tags, const uint32_t *writable)
{
	int error = tdp_check_index(m, cpu, index, PG_LEVEL_4K, gfn);
	_Atomic uint64_t *sptep = ept_table(m, table) + (index & 511);
	uint32_t room = FRAME_WORDS - (index & 511);
	struct ledger_cursor c = ledger_cursor(m, vm);
	/* All bits of an SPTE but frame and custody, by `writable`. */
	const uint64_t bits[2] = { make_spte(0, 0, PG_LEVEL_4K, 0, 0), make_spte(0, 0, PG_LEVEL_4K, 1, 1) };
	uint32_t first = 0, mapped = 0;

	if (error)
		return error;
	if (n > room)
		n = room;
	if (gfn + n > m->vms[vm].gfns)
		n = gfn < m->vms[vm].gfns ? (uint32_t)(m->vms[vm].gfns - gfn) : 0;
	for (uint32_t i = 0; i < n; i++) {
		if (hfns[i] == NO_FRAME || !install(m, &c, &sptep[i], gfn + i, bits[writable[i] != 0], hfns[i],
						    tags[i] & FRAME_TAG_MASK))
			continue;
		if (!mapped++)
			first = i;
	}
	ledger_release(&c);
	if (mapped) {
		count(m->cpus[cpu].counters, COUNT_SPTES_MAPPED, mapped);
		event_record_more(m, cpu, event_of(vm, EVENT_MAP), gfn + first, hfns[first], n - first);
	}
	return (int)mapped;
}
