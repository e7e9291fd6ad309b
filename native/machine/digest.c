/* The fields that a machine's digest leaves out.  See digest.h.
 *
 * The digest covers all memory that is not named here, so a new field can make equal states differ, and never makes
 * different states equal.  A field may be named here if nothing of a later step depends on it but reports and
 * statistics.
 */
#include "machine/digest.h"

#include <assert.h>
#include <stddef.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "oracle/ledger.h"
#include "tlb/tlb_types.h"
#include "vm/srcu.h"
#include "vm/vm.h"

/* Leave out the TLB's statistics; the ghost's flush, which a walk reads right after the look-up that set it; and the
 * counts of cells that died, which only tell a set without known dead cells to look again: the cells are in the
 * digest. */
static int leave_out_deaths(struct heap *heap, struct store *s)
{
	/* The word's other half never changes. */
	static_assert(offsetof(struct store, deaths) / sizeof(uint64_t) ==
		      offsetof(struct store, payload_size) / sizeof(uint64_t), "one word");

	return heap_leave_out(heap, &s->payload_size, sizeof(uint64_t));
}

static int leave_out_tlb(struct heap *heap, struct tlb *t)
{
	int r = heap_leave_out(heap, &t->l1_misses, sizeof(t->l1_misses));

	r |= heap_leave_out(heap, &t->ghost_flush, sizeof(t->ghost_flush));
	r |= leave_out_deaths(heap, &t->l2);
	for (uint32_t level = 0; level < PSC_LEVELS; level++)
		r |= leave_out_deaths(heap, &t->psc[level]);
	return r;
}

static int leave_out_cpu(struct heap *heap, struct cpu *c)
{
	int r = heap_leave_out(heap, c->counters, sizeof(*c->counters));

	return c->tlb ? r | leave_out_tlb(heap, c->tlb) : r;
}

/* Leave out statistics; the times of promises, which are for reports; and SRCU's counts of entries and exits: the
 * scheduler of an explored execution knows the readers itself, and no call waits by these counts. */
static int leave_out_vm(struct heap *heap, struct vm *v)
{
	int r = heap_leave_out(heap, v->stat, sizeof(v->stat));

	for (uint64_t gfn = 0; v->ledger && gfn < v->gfns; gfn++)
		r |= heap_leave_out(heap, &v->ledger->promise[gfn].time, sizeof(v->ledger->promise[gfn].time));
	r |= heap_leave_out(heap, v->srcu.lock_count, sizeof(v->srcu.lock_count));
	return r | heap_leave_out(heap, v->srcu.unlock_count, sizeof(v->srcu.unlock_count));
}

int digest_prepare(struct machine *m)
{
	int r = heap_leave_out(m->heap, m->rings, m->cpu_count * sizeof(*m->rings));

	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++)
		r |= leave_out_cpu(m->heap, &m->cpus[cpu]);
	for (uint32_t vm = 0; vm < m->config.vms; vm++)
		r |= leave_out_vm(m->heap, &m->vms[vm]);
	/* The time of the last VM exit, for the histogram of pauses. */
	for (uint32_t vcpu = 0; vcpu < m->config.vcpus; vcpu++)
		r |= heap_leave_out(m->heap, &m->vcpus[vcpu].left_guest_at, sizeof(uint64_t));
	return r;
}
