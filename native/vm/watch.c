#include "vm/watch.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "vm/mmu_lock.h"
#include "vm/vm.h"

uint32_t rcu_read_depth(struct machine *m, uint32_t cpu)
{
	return m->cpus[cpu].rcu_depth;
}

int mmu_lock_held(struct machine *m, uint32_t cpu, uint32_t vm)
{
	const struct mmu_lock *lock = &m->vms[vm].mmu_lock;

	if (!vm_is_live(&m->vms[vm]))
		return 0;
	/* Relaxed: for reports only, nothing is derived from it. */
	if (atomic_load_explicit(&lock->writer, memory_order_relaxed) == cpu + 1)
		return 2;
	return atomic_load_explicit(&lock->readers[cpu], memory_order_relaxed) ? 1 : 0;
}

int ipi_pending(struct machine *m, uint32_t cpu)
{
	/* Relaxed: the pointer is only compared, never followed. */
	return atomic_load_explicit(&m->cpus[cpu].call_queue, memory_order_relaxed) ? 1 : 0;
}

int mmu_lock_holder(struct machine *m, uint32_t vm)
{
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++)
		if (mmu_lock_held(m, cpu, vm))
			return (int)cpu;
	return -1;
}

int mmu_lock_contended(struct machine *m, uint32_t vm)
{
	const struct mmu_lock *lock = &m->vms[vm].mmu_lock;

	if (!vm_is_live(&m->vms[vm]))
		return 0;
	return atomic_load_explicit(&lock->state, memory_order_relaxed) & MMU_LOCK_WAITERS ? 1 : 0;
}
