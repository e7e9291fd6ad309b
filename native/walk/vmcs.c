/* VMCSs.  See vmcs.h. */
#include "walk/vmcs.h"

#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "memory/frame.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "vm/slot.h"
#include "vm/vm.h"

enum { ACTIVE_NOWHERE = -1 };

static uint32_t vmcs_count(const struct machine *m)
{
	return m->config.vcpus * VMCS_PER_VCPU;
}

/* Return the VMCS, or NULL with a message on `cpu`. */
static struct vmcs *vmcs_get(struct machine *m, uint32_t cpu, uint32_t vmcs)
{
	if (vmcs < vmcs_count(m) && slot_is_live(&m->vmcss[vmcs].live))
		return &m->vmcss[vmcs];
	cpu_misuse(m, cpu, "CPU %u: there is no VMCS %u", cpu, vmcs);
	return NULL;
}

int vmcs_create(struct machine *m, uint32_t vcpu, uint32_t vpid)
{
	if (vcpu >= m->config.vcpus || !vcpu_is_live(&m->vcpus[vcpu]))
		return MACHINE_MISUSE;
	for (uint32_t id = 0; id < vmcs_count(m); id++) {
		struct vmcs *v = &m->vmcss[id];

		if (!slot_claim(&v->live))
			continue;
		atomic_init(&v->cpu, ACTIVE_NOWHERE);
		v->id = id;
		v->vcpu = vcpu;
		v->vpid = vpid;
		v->root = v->root_level = v->life = v->pcid = v->apic_page = 0;
		v->ept = true;
		v->nested_ept = false;
		/* Another number than the last owner's of this slot, and than most other slots'. */
		v->owner = (uint8_t)(v->owner + 1 + id * 2);
		slot_set(&v->live, SLOT_LIVE);
		return (int)id;
	}
	return MACHINE_NOMEM;
}

/* Return the pCPU on which the VMCS is active, or ACTIVE_NOWHERE. */
static int32_t active_on(struct machine *m, const struct vmcs *v)
{
	/* Acquire: pairs with the release of vmclear(), so that its pCPU's use of the VMCS comes before ours. */
	int32_t cpu = atomic_load_explicit(&v->cpu, memory_order_acquire);

	return cpu == ACTIVE_NOWHERE || cpu_power(m, (uint32_t)cpu) == CPU_OFFLINE ? ACTIVE_NOWHERE : cpu;
}

int vmcs_destroy(struct machine *m, uint32_t cpu, uint32_t vmcs)
{
	struct vmcs *v = vmcs_get(m, cpu, vmcs);
	int32_t on;

	if (!v)
		return MACHINE_MISUSE;
	on = active_on(m, v);
	if (on != ACTIVE_NOWHERE)
		return cpu_misuse(m, cpu, "VMCS %u of vCPU %u is destroyed while it is active on CPU %d: VMCLEAR must "
				  "run there first", vmcs, v->vcpu, (int)on);
	slot_set(&v->live, SLOT_FREE);
	return 0;
}

void vmcs_write_eptp(struct machine *m, uint32_t vmcs, uint32_t root, uint32_t root_level)
{
	struct vmcs *v = &m->vmcss[vmcs];

	v->root = root;
	v->root_level = root_level;
	v->life = frame_tag(m->frames, root);
	v->nested_ept = false;
}

void vmcs_write_nested_eptp(struct machine *m, uint32_t vmcs, uint32_t root, uint32_t root_level)
{
	vmcs_write_eptp(m, vmcs, root, root_level);
	m->vmcss[vmcs].nested_ept = true;
}

void vmcs_write_vpid(struct machine *m, uint32_t vmcs, uint32_t vpid)
{
	m->vmcss[vmcs].vpid = vpid;
}

void vmcs_enable_ept(struct machine *m, uint32_t vmcs, int on)
{
	m->vmcss[vmcs].ept = on != 0;
}

void vmcs_write_apic_page(struct machine *m, uint32_t vmcs, uint32_t hfn)
{
	m->vmcss[vmcs].apic_page = hfn;
}

void vmcs_write_guest_cr3(struct machine *m, uint32_t vmcs, uint32_t root, uint32_t pcid)
{
	vmcs_write_eptp(m, vmcs, root, PG_LEVEL_512G);
	m->vmcss[vmcs].pcid = pcid;
}

int vmptrld(struct machine *m, uint32_t cpu, uint32_t vmcs)
{
	struct vmcs *v = vmcs_get(m, cpu, vmcs);
	int32_t on;

	if (!v)
		return MACHINE_MISUSE;
	if (!cpu_is_target(m, cpu))
		return cpu_misuse(m, cpu, "VMPTRLD on CPU %u, which is no physical CPU", cpu);
	on = active_on(m, v);
	if (on != ACTIVE_NOWHERE && on != (int32_t)cpu)
		return cpu_misuse(m, cpu, "VMPTRLD on CPU %u of VMCS %u, which is active on CPU %d: VMCLEAR must run there "
				  "first", cpu, vmcs, (int)on);
	/* Release: pairs with the acquire of active_on(). */
	atomic_store_explicit(&v->cpu, (int32_t)cpu, memory_order_release);
	m->cpus[cpu].vmcs = v;
	return 0;
}

struct vmcs *vmcs_current(const struct machine *m, uint32_t cpu)
{
	struct vmcs *v = m->cpus[cpu].vmcs;

	/* Relaxed: if it is this CPU, its own thread wrote it. */
	return v && atomic_load_explicit(&v->cpu, memory_order_relaxed) == (int32_t)cpu ? v : NULL;
}

int vmptrst(struct machine *m, uint32_t cpu)
{
	const struct vmcs *v = vmcs_current(m, cpu);

	return v ? (int)v->id : -1;
}

int vmclear(struct machine *m, uint32_t cpu, uint32_t vmcs)
{
	struct vmcs *v = vmcs_get(m, cpu, vmcs);
	int32_t on;

	if (!v)
		return MACHINE_MISUSE;
	on = active_on(m, v);
	if (on != ACTIVE_NOWHERE && on != (int32_t)cpu)
		return cpu_misuse(m, cpu, "VMCLEAR on CPU %u of VMCS %u, which is active on CPU %d", cpu, vmcs,
				  (int)on);
	/* If it was current, it is not any more (vmcs_current).  Release: pairs with the acquire of active_on(). */
	atomic_store_explicit(&v->cpu, ACTIVE_NOWHERE, memory_order_release);
	return 0;
}

/* __loaded_vmcs_clear() */
static void ipi_vmcs_clear(struct machine *m, struct cpu *target, uint64_t argument)
{
	uint32_t vmcs = (uint32_t)argument;

	/* A VMCS that another pCPU holds is left alone: KVM's next VMPTRLD of it fails. */
	if (!vmclear(m, target->id, vmcs))
		event_record(m, target->id, EVENT_UNLOAD, m->vmcss[vmcs].vcpu, 0);
}

void vmcs_register(void)
{
	ipi_register(IPI_VMCS_CLEAR, ipi_vmcs_clear);
}

int vmcss_create(struct machine *m)
{
	m->vmcss = heap_zalloc_lines(m->heap, vmcs_count(m), sizeof(*m->vmcss));
	return m->vmcss ? 0 : MACHINE_NOMEM;
}

void vmcss_destroy(struct machine *m)
{
	heap_free(m->heap, m->vmcss);
	m->vmcss = NULL;
}
