#include "machine/offline.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "sync/cpu.h"
#include "sync/rcu.h"
#include "vm/mmu_lock.h"

void cpu_offline(struct machine *m, uint32_t cpu)
{
	if (!cpu_seize(m, cpu))
		return;
	rcu_cpu_offline(&m->cpus[cpu]);
	mmu_locks_abandon(m, cpu);
	cpu_retire(m, cpu);
}
