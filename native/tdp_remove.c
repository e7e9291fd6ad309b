/* Tables that are no longer linked: handle_removed_pt().  See ept.h. */
#include "counters.h"
#include "cpu.h"
#include "ipi.h"
#include "spin.h"
#include "spte.h"

struct removal {
	struct machine *m;
	struct ledger_cursor ledger;
	uint32_t cpu;
	uint32_t vm;
	bool shared;
	bool deferred;
	uint32_t *pages;
	uint32_t max;
	uint32_t removed;  /* table pages */
	uint64_t leafs;    /* 4 KiB pages unmapped */
};

/* Freeze one child so that nobody installs anything in it any more; *old is what it was.
 *
 * The link above is gone already, but CPUs set A and D through what they have cached until the flush, and threads
 * that hold mmu_lock for read may be in the page: only an exchange knows what was there last.  Somebody else's
 * FROZEN is waited for: that one will still write here, and it may need this pCPU's answer to its flush first. */
static int freeze(struct removal *r, _Atomic uint64_t *sptep, uint32_t level, uint64_t *old)
{
	uint32_t spins = 0;

	if (!r->shared) {
		*old = atomic_load_explicit(sptep, memory_order_acquire);
		if (spte_present(*old))
			*old = kvm_tdp_mmu_write_spte(sptep, *old, FROZEN_SPTE, level);
		return 0;
	}
	/* acq_rel: what the last writer published is ours to take apart, and nobody's after. */
	while (is_frozen_spte(*old = atomic_exchange_explicit(sptep, FROZEN_SPTE, memory_order_acq_rel))) {
		ledger_release(&r->ledger);
		if (atomic_load_explicit(&r->m->stopping, memory_order_relaxed))
			return MACHINE_STOPPED;
		ipi_drain(r->m, r->cpu);
		if (++spins > SPINS_BEFORE_YIELD)
			sched_yield();
		else
			cpu_relax();
	}
	return 0;
}

static int queue_page(struct removal *r, uint32_t table)
{
	r->removed++;
	if (!r->deferred && r->removed <= r->max) {
		r->pages[r->removed - 1] = table;
		return 0;
	}
	return ept_table_free_rcu(r->m, r->cpu, table);
}

static int remove_pt(struct removal *r, uint32_t table, uint32_t level, uint64_t gfn)
{
	uint64_t pages = kvm_pages_per_hpage(level), old;
	int error;

	for (uint32_t i = 0; i < FRAME_WORDS; i++, gfn += pages) {
		error = freeze(r, &ept_table(r->m, table)[i], level, &old);
		if (error) /* it waited, and holds nothing */
			return error;
		if (!spte_present(old))
			continue;
		if (spte_leaf(old, level)) {
			spte_ungrant_at(&r->ledger, r->m->frames, gfn, old, level, true, old & SPTE_WRITABLE);
			r->leafs += pages;
			continue;
		}
		ledger_release(&r->ledger);
		if (spte_child_holds(r->m, r->cpu, r->vm, old, level, gfn)) {
			error = remove_pt(r, spte_hfn(old), level - 1, gfn);
			if (error)
				return error;
		}
	}
	ledger_release(&r->ledger);
	return queue_page(r, table);
}

int handle_removed_pt(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t level,
		      uint64_t gfn, int shared, int deferred, uint32_t *pages, uint32_t max)
{
	struct removal r = { .m = m, .ledger = ledger_cursor(m, vm), .cpu = cpu, .vm = vm, .shared = shared,
			     .deferred = deferred, .pages = pages, .max = max };
	int error = remove_pt(&r, table, level, gfn & ~(kvm_pages_per_hpage(level + 1) - 1));

	count(m->cpus[cpu].counters, COUNT_SPTES_ZAPPED, r.leafs);
	if (r.leafs)
		event_record(m, cpu, EVENT_ZAP, gfn, r.leafs);
	if (error)
		return error;
	return !deferred && r.removed > max ? MACHINE_NOMEM : (int)r.removed;
}

int spte_remove_table(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t spte, uint32_t level, uint64_t gfn,
		      bool shared, uint64_t *leafs)
{
	struct removal r = { .m = m, .ledger = ledger_cursor(m, vm), .cpu = cpu, .vm = vm, .shared = shared,
			     .deferred = true };
	int error;

	if (!spte_child_holds(m, cpu, vm, spte, level, gfn))
		return 0;
	error = remove_pt(&r, spte_hfn(spte), level - 1, gfn);
	*leafs += r.leafs;
	return error ? error : (int)r.removed;
}
