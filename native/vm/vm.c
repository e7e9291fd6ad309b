#include "vm/vm.h"

#include <string.h>

#include "guest/guest.h"
#include "memory/mm.h"
#include "oracle/oracle.h"

enum slot_state { SLOT_FREE, SLOT_BUSY, SLOT_LIVE };

/* Claim a free slot for the caller to fill; it is public when its state is SLOT_LIVE (release). */
static bool slot_claim(_Atomic uint32_t *state)
{
	uint32_t expected = SLOT_FREE;

	return atomic_compare_exchange_strong_explicit(state, &expected, SLOT_BUSY, memory_order_acquire,
						       memory_order_relaxed);
}

static void slot_set(_Atomic uint32_t *state, enum slot_state to)
{
	atomic_store_explicit(state, to, memory_order_release);
}

static bool slot_is_live(_Atomic uint32_t *state)
{
	return atomic_load_explicit(state, memory_order_acquire) == SLOT_LIVE;
}

struct vm *vm_get(struct machine *m, uint32_t cpu, uint32_t vm)
{
	if (vm < m->config.vms && slot_is_live(&m->vms[vm].live))
		return &m->vms[vm];
	cpu_misuse(m, cpu, "CPU %u: there is no VM %u", cpu, vm);
	return NULL;
}

/* --- VMs -------------------------------------------------------------------------------------------- */

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
}

/* Undo vm_fill(), however far it got; each step is recognised by its result. */
static void vm_empty(struct machine *m, struct vm *vm)
{
	if (vm->mm)
		mm_destroy(m, vm);
	if (vm->ledger)
		ledger_destroy(m, vm);
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
	if (vm >= m->config.vms || !slot_is_live(&m->vms[vm].live))
		return;
	slot_set(&m->vms[vm].live, SLOT_BUSY);
	vm_empty(m, &m->vms[vm]);
	slot_set(&m->vms[vm].live, SLOT_FREE);
}

void vm_stat_add(struct machine *m, uint32_t vm, uint32_t stat, uint64_t n)
{
	/* relaxed: a statistic */
	if (stat < VM_STATS)
		atomic_fetch_add_explicit(&m->vms[vm].stat[stat], n, memory_order_relaxed);
}

uint64_t vm_stat(struct machine *m, uint32_t vm, uint32_t stat)
{
	if (stat >= VM_STATS)
		return 0;
	return atomic_load_explicit(&m->vms[vm].stat[stat], memory_order_relaxed);
}

void vm_stats_read(struct machine *m, uint32_t vms, uint64_t *values)
{
	for (uint32_t vm = 0; vm < vms; vm++)
		for (uint32_t stat = 0; stat < VM_STATS; stat++)
			*values++ = vm_stat(m, vm, stat);
}

/* --- mmu_notifier ----------------------------------------------------------------------------------- */

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

/* --- vCPUs ------------------------------------------------------------------------------------------ */

static void vcpu_reset(struct vcpu *vcpu, uint32_t id, uint32_t vm, uint32_t vpid)
{
	atomic_init(&vcpu->mode, OUTSIDE_GUEST_MODE);
	atomic_init(&vcpu->requests, 0);
	atomic_init(&vcpu->cpu, -1);
	atomic_init(&vcpu->flush_reasons, 0);
	vcpu->id = id;
	vcpu->vm = vm;
	vcpu->vpid = vpid;
	vcpu->left_guest_at = 0;
	vcpu->guest = NULL;
}

int vcpu_create(struct machine *m, uint32_t vm, uint32_t vpid)
{
	if (vm >= m->config.vms || !slot_is_live(&m->vms[vm].live))
		return MACHINE_MISUSE;
	for (uint32_t id = 0; id < m->config.vcpus; id++) {
		struct vcpu *vcpu = &m->vcpus[id];
		int r;

		if (!slot_claim(&vcpu->live))
			continue;
		vcpu_reset(vcpu, id, vm, vpid);
		r = guest_create(m, vcpu);
		slot_set(&vcpu->live, r ? SLOT_FREE : SLOT_LIVE);
		return r ? r : (int)id;
	}
	return MACHINE_NOMEM;
}

void vcpu_destroy(struct machine *m, uint32_t vcpu)
{
	if (vcpu >= m->config.vcpus || !slot_is_live(&m->vcpus[vcpu].live))
		return;
	slot_set(&m->vcpus[vcpu].live, SLOT_BUSY);
	guest_destroy(m, &m->vcpus[vcpu]);
	m->vcpus[vcpu].guest = NULL;
	slot_set(&m->vcpus[vcpu].live, SLOT_FREE);
}

/* mode and requests are a Dekker pair (vcpu-requests.rst): the vCPU stores mode, then reads requests; the
 * requester sets a request, then reads mode.  Both sequentially consistent. */
uint32_t vcpu_mode(struct machine *m, uint32_t vcpu)
{
	return atomic_load_explicit(&m->vcpus[vcpu].mode, memory_order_seq_cst);
}

void vcpu_set_mode(struct machine *m, uint32_t vcpu, uint32_t mode)
{
	atomic_store_explicit(&m->vcpus[vcpu].mode, mode, memory_order_seq_cst);
}

uint32_t vcpu_exiting_guest_mode(struct machine *m, uint32_t vcpu)
{
	uint32_t old = IN_GUEST_MODE;

	atomic_compare_exchange_strong_explicit(&m->vcpus[vcpu].mode, &old, EXITING_GUEST_MODE,
						memory_order_seq_cst, memory_order_seq_cst);
	return old;
}

static uint64_t request_bit(uint32_t request)
{
	return 1ull << (request & 63);
}

/* Also releases the data that the request is about; kvm_check_request acquires it. */
void kvm_make_request(struct machine *m, uint32_t vcpu, uint32_t request)
{
	atomic_fetch_or_explicit(&m->vcpus[vcpu].requests, request_bit(request), memory_order_seq_cst);
}

int kvm_check_request(struct machine *m, uint32_t vcpu, uint32_t request)
{
	if (!kvm_test_request(m, vcpu, request))
		return 0;
	atomic_fetch_and_explicit(&m->vcpus[vcpu].requests, ~request_bit(request), memory_order_seq_cst);
	return 1;
}

int kvm_test_request(struct machine *m, uint32_t vcpu, uint32_t request)
{
	return (kvm_requests(m, vcpu) & request_bit(request)) != 0;
}

uint64_t kvm_requests(struct machine *m, uint32_t vcpu)
{
	return atomic_load_explicit(&m->vcpus[vcpu].requests, memory_order_seq_cst);
}

/* Read once by a CPU that kicks; a stale value is harmless, because the vCPU was outside in between. */
int vcpu_cpu(struct machine *m, uint32_t vcpu)
{
	return atomic_load_explicit(&m->vcpus[vcpu].cpu, memory_order_seq_cst);
}

void vcpu_set_cpu(struct machine *m, uint32_t vcpu, int cpu)
{
	atomic_store_explicit(&m->vcpus[vcpu].cpu, cpu, memory_order_seq_cst);
}

/* Called before the request is made, which releases it. */
void vcpu_add_flush_reason(struct machine *m, uint32_t vcpu, uint32_t reason)
{
	atomic_fetch_or_explicit(&m->vcpus[vcpu].flush_reasons, 1u << (reason & 31), memory_order_release);
}

/* Called after kvm_check_request, which acquired it. */
uint32_t vcpu_take_flush_reasons(struct machine *m, uint32_t vcpu)
{
	return atomic_exchange_explicit(&m->vcpus[vcpu].flush_reasons, 0, memory_order_acquire);
}
