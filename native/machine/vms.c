#include "machine/vms.h"

#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "memory/mm.h"
#include "oracle/ledger.h"
#include "oracle/tracking.h"
#include "vm/mmu_lock.h"
#include "vm/slot.h"
#include "vm/srcu.h"
#include "vm/vm.h"

static void vm_reset(struct vm *vm, uint32_t id, uint64_t gfns)
{
	vm->id = id;
	vm->gfns = gfns;
	atomic_init(&vm->invalidate_seq, 0);
	atomic_init(&vm->invalidate_in_progress, 0);
	atomic_init(&vm->invalidate_start, UINT64_MAX);
	atomic_init(&vm->invalidate_end, UINT64_MAX);
	for (uint32_t i = 0; i < VM_STATS; i++)
		atomic_init(&vm->stat[i], 0);
	vm->ledger = NULL;
	vm->mm = NULL;
	atomic_init(&vm->tracked, NULL);
}

/* Undo vm_fill(), however far it got; each step is recognised by its result. */
static void vm_empty(struct machine *m, struct vm *vm)
{
	if (vm->mm)
		mm_destroy(m, vm);
	if (vm->ledger)
		ledger_destroy(m, vm);
	tracking_destroy(m, vm);
	vm->mm = NULL;
	vm->ledger = NULL;
	if (vm->srcu.queue.mask)
		srcu_fini(&vm->srcu, m);
	if (vm->mmu_lock.readers)
		mmu_lock_fini(&vm->mmu_lock, m);
}

static int vm_fill(struct machine *m, struct vm *vm)
{
	int r = mmu_lock_init(&vm->mmu_lock, m);

	if (!r)
		r = srcu_init(&vm->srcu, m);
	if (!r)
		r = ledger_create(m, vm);
	if (!r)
		r = mm_create(m, vm);
	return r;
}

int vm_create(struct machine *m, uint64_t gfns)
{
	for (uint32_t id = 0; id < m->config.vms; id++) {
		struct vm *vm = &m->vms[id];
		int r;

		if (!slot_claim(&vm->live))
			continue;
		vm_reset(vm, id, gfns);
		r = vm_fill(m, vm);
		if (r)
			vm_empty(m, vm);
		slot_set(&vm->live, r ? SLOT_FREE : SLOT_LIVE);
		return r ? r : (int)id;
	}
	return MACHINE_NOMEM;
}

void vm_destroy(struct machine *m, uint32_t vm)
{
	if (vm >= m->config.vms || !vm_is_live(&m->vms[vm]))
		return;
	slot_set(&m->vms[vm].live, SLOT_BUSY);
	vm_empty(m, &m->vms[vm]);
	slot_set(&m->vms[vm].live, SLOT_FREE);
}

/* --- vCPUs ------------------------------------------------------------------------------------------ */

static void vcpu_reset(struct vcpu *vcpu, uint32_t id, uint32_t vm)
{
	atomic_init(&vcpu->mode, OUTSIDE_GUEST_MODE);
	atomic_init(&vcpu->requests, 0);
	atomic_init(&vcpu->cpu, -1);
	atomic_init(&vcpu->flush_reasons, 0);
	vcpu->id = id;
	vcpu->vm = vm;
	vcpu->left_guest_at = 0;
	vcpu->guest = NULL;
}

int vcpu_create(struct machine *m, uint32_t vm)
{
	if (vm >= m->config.vms || !vm_is_live(&m->vms[vm]))
		return MACHINE_MISUSE;
	for (uint32_t id = 0; id < m->config.vcpus; id++) {
		struct vcpu *vcpu = &m->vcpus[id];
		int r;

		if (!slot_claim(&vcpu->live))
			continue;
		vcpu_reset(vcpu, id, vm);
		r = guest_create(m, vcpu);
		slot_set(&vcpu->live, r ? SLOT_FREE : SLOT_LIVE);
		return r ? r : (int)id;
	}
	return MACHINE_NOMEM;
}

void vcpu_destroy(struct machine *m, uint32_t vcpu)
{
	if (vcpu >= m->config.vcpus || !vcpu_is_live(&m->vcpus[vcpu]))
		return;
	slot_set(&m->vcpus[vcpu].live, SLOT_BUSY);
	guest_destroy(m, &m->vcpus[vcpu]);
	m->vcpus[vcpu].guest = NULL;
	slot_set(&m->vcpus[vcpu].live, SLOT_FREE);
}

/* --- all of them ------------------------------------------------------------------------------------- */

int vms_create(struct machine *m)
{
	m->vms = heap_zalloc_lines(m->heap, m->config.vms, sizeof(*m->vms));
	m->vcpus = heap_zalloc_lines(m->heap, m->config.vcpus, sizeof(*m->vcpus));
	return m->vms && m->vcpus ? 0 : MACHINE_NOMEM;
}

void vms_destroy(struct machine *m)
{
	for (uint32_t vcpu = 0; m->vcpus && vcpu < m->config.vcpus; vcpu++)
		vcpu_destroy(m, vcpu);
	for (uint32_t vm = 0; m->vms && vm < m->config.vms; vm++)
		vm_destroy(m, vm);
	heap_free(m->heap, m->vcpus);
	heap_free(m->heap, m->vms);
	m->vcpus = NULL;
	m->vms = NULL;
}
