/* Hyper-V's hypercalls that flush an EPT.  See hypercall.h. */
#include "walk/hypercall.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "sync/ipi.h"
#include "sync/smp.h"
#include "walk/flush.h"

void hv_hypercall(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn, uint64_t pages)
{
	count(m->cpus[cpu].counters, COUNT_HYPERCALLS, 1);
	event_record_more(m, cpu, event_of(vm, EVENT_HYPERCALL), root, gfn, pages);
}

void hv_flush_pcpu(struct machine *m, uint32_t target, uint32_t vm, uint32_t root, uint64_t gfn, uint64_t pages,
		   uint32_t reason)
{
	struct hv_flush f = { .vm = vm, .root = root, .gfn = gfn, .pages = pages, .reason = reason };

	flush_by_hypervisor(m, target, &f);
}

/* The operands of an earlier hypercall of this CPU may be read until its targets have acknowledged, and a wait fails
 * only when the machine stops. */
int hv_flush_guest_mapping(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t root, uint64_t gfn, uint64_t pages,
			   uint32_t reason)
{
	int r;

	if (atomic_load_explicit(&m->stopping, memory_order_relaxed))
		return MACHINE_STOPPED;
	m->cpus[cpu].hv_flush =
		(struct hv_flush){ .vm = vm, .root = root, .gfn = gfn, .pages = pages, .reason = reason };
	hv_hypercall(m, cpu, vm, root, gfn, pages);
	r = on_each_cpu(m, cpu, IPI_HV_FLUSH, (uint64_t)vm << 32 | cpu, IPI_WAIT);
	return r < 0 ? r : 0;
}

static void ipi_hv_flush(struct machine *m, struct cpu *target, uint64_t argument)
{
	flush_by_hypervisor(m, target->id, &m->cpus[(uint32_t)argument].hv_flush);
}

void hypercall_register(void)
{
	ipi_register(IPI_HV_FLUSH, ipi_hv_flush);
}
