#include "vm/mmu_invalidate.h"

#include "core/machine_types.h"
#include "vm/vm.h"

/* kvm_mmu_invalidate_start().  Writers exclude each other by mmu_lock; the orders are for readers without it,
 * as mmu_invalidate_retry_gfn_unsafe() is: a reader that sees in_progress sees this range or a later one. */
void mmu_invalidate_begin(struct machine *m, uint32_t vm)
{
	struct vm *v = &m->vms[vm];
	uint32_t in_progress = atomic_load_explicit(&v->invalidate_in_progress, memory_order_relaxed);

	if (!in_progress) {
		atomic_store_explicit(&v->invalidate_start, UINT64_MAX, memory_order_relaxed);
		atomic_store_explicit(&v->invalidate_end, UINT64_MAX, memory_order_relaxed);
	}
	atomic_store_explicit(&v->invalidate_in_progress, in_progress + 1, memory_order_release);
}

/* kvm_mmu_invalidate_range_add(): one range that covers all invalidations in progress, until there is none. */
void mmu_invalidate_range_add(struct machine *m, uint32_t vm, uint64_t start, uint64_t end)
{
	struct vm *v = &m->vms[vm];
	uint64_t old_start = atomic_load_explicit(&v->invalidate_start, memory_order_relaxed);
	uint64_t old_end = atomic_load_explicit(&v->invalidate_end, memory_order_relaxed);

	if (old_start != UINT64_MAX) {
		start = old_start < start ? old_start : start;
		end = old_end > end ? old_end : end;
	}
	/* end first: a reader that sees the new start without the lock sees an end that belongs to it */
	atomic_store_explicit(&v->invalidate_end, end, memory_order_release);
	atomic_store_explicit(&v->invalidate_start, start, memory_order_release);
}

int mmu_invalidate_overlaps(struct machine *m, uint32_t vm, uint64_t start, uint64_t end)
{
	struct vm *v = &m->vms[vm];
	uint64_t first = atomic_load_explicit(&v->invalidate_start, memory_order_relaxed);

	/* Relaxed: the caller holds mmu_lock for write, as every writer of these fields does. */
	return atomic_load_explicit(&v->invalidate_in_progress, memory_order_relaxed) > 1 && first != UINT64_MAX &&
	       first < end && start < atomic_load_explicit(&v->invalidate_end, memory_order_relaxed);
}

/* kvm_mmu_invalidate_end(): seq first, so that a reader that sees no invalidation in progress sees the new seq. */
void mmu_invalidate_end(struct machine *m, uint32_t vm)
{
	struct vm *v = &m->vms[vm];

	atomic_fetch_add_explicit(&v->invalidate_seq, 1, memory_order_release);
	atomic_fetch_sub_explicit(&v->invalidate_in_progress, 1, memory_order_release);
}

void mmu_invalidate_seq_init(struct machine *m, uint32_t vm, uint64_t seq)
{
	/* Relaxed: the VM's first vCPU is handed to its thread later. */
	atomic_store_explicit(&m->vms[vm].invalidate_seq, seq, memory_order_relaxed);
}

/* acquire: the pfn is looked up after seq was sampled */
uint64_t mmu_invalidate_seq(struct machine *m, uint32_t vm)
{
	return atomic_load_explicit(&m->vms[vm].invalidate_seq, memory_order_acquire);
}

int mmu_invalidate_retry_range(struct machine *m, uint32_t vm, uint64_t seq, uint64_t first, uint64_t last)
{
	struct vm *v = &m->vms[vm];

	/* acquire: pairs with the release in mmu_invalidate_end */
	if (atomic_load_explicit(&v->invalidate_in_progress, memory_order_acquire)) {
		uint64_t start = atomic_load_explicit(&v->invalidate_start, memory_order_acquire);
		uint64_t end = atomic_load_explicit(&v->invalidate_end, memory_order_relaxed);

		/* begun, but the range is not known yet */
		if (start == UINT64_MAX || (last > start && first < end))
			return 1;
	}
	return mmu_invalidate_seq(m, vm) != seq;
}

int mmu_invalidate_retry_gfn(struct machine *m, uint32_t vm, uint64_t seq, uint64_t gfn)
{
	return mmu_invalidate_retry_range(m, vm, seq, gfn, gfn + 1);
}

/* Before the last end its invalidation was in progress, and the merged range, which an end leaves as it is, was this
 * one.  After the next end the sequence has moved past the sample, which is no later than now. */
int mmu_invalidate_retry_stays(struct machine *m, uint32_t vm, uint64_t seq, uint64_t gfn)
{
	struct vm *v = &m->vms[vm];
	/* Relaxed: no other thread runs. */
	uint64_t start = atomic_load_explicit(&v->invalidate_start, memory_order_relaxed);
	uint64_t end = atomic_load_explicit(&v->invalidate_end, memory_order_relaxed);

	return mmu_invalidate_seq(m, vm) >= seq && (start == UINT64_MAX || (gfn >= start && gfn < end));
}

uint32_t mmu_invalidate_in_progress(struct machine *m, uint32_t vm)
{
	/* acquire: pairs with the release in mmu_invalidate_end; what the host took meanwhile is gone from its tables */
	return atomic_load_explicit(&m->vms[vm].invalidate_in_progress, memory_order_acquire);
}
