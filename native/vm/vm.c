#include "vm/vm.h"

#include <string.h>

#include "core/machine_types.h"
#include "sync/cpu.h"

struct vm *vm_get(struct machine *m, uint32_t cpu, uint32_t vm)
{
	if (vm < m->config.vms && vm_is_live(&m->vms[vm]))
		return &m->vms[vm];
	cpu_misuse(m, cpu, "CPU %u: there is no VM %u", cpu, vm);
	return NULL;
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
