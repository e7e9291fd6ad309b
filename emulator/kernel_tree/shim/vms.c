/* The VMs and vCPUs of a tree's code on the machine, and its structures as the rest of the shim sees them.
 *
 * Compiled in one unit with tdp_mmu.c, tdp_iter.c, spte.c and versions.c; requests_calls.c, faults.c and zaps.c follow it
 * there.
 */
#include "machine_internal.h"

#include <stdlib.h>
#include <string.h>

/* The tree's struct kvm of each VM, by the VM's number. */
enum { MOST_VMS = 4096 };
static struct kvm *vms[MOST_VMS];
/* By CPU of the machine, the vCPU that is passed to the tree's functions, which keep nothing in it. */
static struct kvm_vcpu *vcpus;
static struct kvm_mmu *mmus;

/* The VMs' vCPUs by the machine's numbers, of which the functions of kvm_main.c read the fields. */
static struct kvm_vcpu *all_vcpus;

struct cpuinfo_x86 boot_cpu_data = { .x86_phys_bits = 52, .x86_cache_bits = 52 };
bool tdp_enabled = true;

void *shim_rcu_function(void);

static struct kvm *vm(void)
{
	return vms[here->api.vm];
}

void *kvm_mmu_memory_cache_alloc(struct kvm_mmu_memory_cache *cache)
{
	if (cache == &vcpus[here->api.id].arch.mmu_shadow_page_cache)
		return (void *)shim_page_alloc(GFP_KERNEL);
	return shim_object_alloc();
}

/* Do nothing: the model of mmu.c has adjusted the fault before it calls the tree. */
void kvm_mmu_hugepage_adjust(struct kvm_vcpu *v, struct kvm_page_fault *fault)
{
	(void)v;
	(void)fault;
}

struct place glue_place(const void *page, unsigned int index)
{
	const struct kvm_mmu_page *sp = page;

	if (!sp)
		return (struct place){ .level = PG_LEVEL_4K };
	return (struct place){ sp->role.level, sp->gfn + ((u64)index << 9 * (sp->role.level - 1)) };
}

u64 glue_name_of(const void *lock)
{
	unsigned long in_vm = (unsigned long)lock - (unsigned long)vm();

	/* A lock of the VM's by its place there; a variable, which a patch may add, by its place in the object. */
	return in_vm < sizeof(struct kvm) ? (u64)here->api.vm << 32 | in_vm : (unsigned long)lock - shim_base;
}

bool glue_root_invalid(const void *page)
{
	const struct kvm_mmu_page *sp = page;

	for (int level = 0; sp->ptep && level < PT64_ROOT_MAX_LEVEL; level++)
		sp = sptep_to_sp((u64 *)rcu_dereference(sp->ptep));
	return sp->role.invalid;
}

bool glue_frozen(u64 spte)
{
#ifdef TREE_ARGS_is_frozen_spte
	return is_frozen_spte(spte);
#else
	return is_removed_spte(spte);
#endif
}

bool glue_present(u64 spte)
{
	return is_shadow_present_pte(spte) && !glue_frozen(spte);
}

unsigned int glue_table_of(const struct rcu_head *head)
{
	const struct kvm_mmu_page *sp = container_of(head, const struct kvm_mmu_page, rcu_head);
	unsigned int hfn;

	return shim_is_object(head) && shim_in_frames(sp->spt, &hfn) ? hfn : 0;
}

bool glue_keep(void)
{
	bool kept = shim_keep(vcpus, core.cpus * sizeof(*vcpus)) && shim_keep(mmus, core.cpus * sizeof(*mmus)) &&
		    shim_keep(all_vcpus, core.vcpus * sizeof(*all_vcpus));

	for (unsigned int i = 0; i < MOST_VMS; i++)
		kept = kept && (!vms[i] || shim_keep(vms[i], sizeof(*vms[i])));
	return kept;
}

/* --- setting up ------------------------------------------------------------------------------------------------------ */
int tree_attach(const struct tree_core *given, int report_fd)
{
	static struct kvm_mmu_page nothing;
	int r = shim_attach(given, sizeof(struct kvm_mmu_page), report_fd);

	if (r)
		return r;
	shim_page_of(0)->private = (unsigned long)&nothing;
	nothing.role.level = PG_LEVEL_4K;
	free(vcpus);
	free(mmus);
	free(all_vcpus);
	vcpus = calloc(core.cpus, sizeof(*vcpus));
	mmus = calloc(core.cpus, sizeof(*mmus));
	all_vcpus = calloc(core.vcpus + 1, sizeof(*all_vcpus));
	if (!vcpus || !mmus || !all_vcpus)
		return core.nomem;
	shim_vcpus = (unsigned long)all_vcpus;
	shim_vcpus_bytes = core.vcpus * sizeof(*all_vcpus);
	here = shim_cpu_of(0);
	init_spte_module();
	for (unsigned int i = 0; i < core.cpus; i++) {
		vcpus[i].arch.mmu = &mmus[i];
		mmus[i].root_role.direct = 1;
		mmus[i].root_role.access = ACC_ALL;
		set_permissions(&mmus[i]);
	}
	return 0;
}

static void set_masks(int ad_bits)
{
	set_ept_masks(ad_bits);
	for (unsigned int i = 0; i < core.cpus; i++)
		mmus[i].root_role.ad_disabled = !ad_bits;
}

int tree_vm_create(unsigned int cpu, unsigned int number, int ad_bits)
{
	if (number >= MOST_VMS)
		return core.nomem;
	if (vms[number])
		free(vms[number]->vcpu_array.shim_entries);
	free(vms[number]);
	vms[number] = calloc(1, sizeof(struct kvm));
	if (!vms[number])
		return core.nomem;
	set_masks(ad_bits);
	shim_cpu_of(cpu)->api.vm = number;
	/* In older trees it returns an error if memory runs out, which is ignored. */
	return OPERATION(cpu, OPERATION_OTHER, (void)kvm_mmu_init_tdp_mmu(vm()));
}

static struct kvm_vcpu *vcpu_with(unsigned long long root)
{
	struct kvm_vcpu *vcpu = &vcpus[here->api.id];

	vcpu->kvm = vm();
	vcpu->arch.mmu->root.hpa = root;
	return vcpu;
}

/* Return the slot of the operation in the form that the tree's code reads. */
static struct kvm_memory_slot slot_of(void)
{
	struct kvm_memory_slot slot;

	memset(&slot, 0, sizeof(slot));
	slot.base_gfn = here->api.slot_base;
	slot.npages = here->api.slot_npages;
	slot.flags = here->api.slot_flags;
	slot.as_id = (u16)here->api.slot_as_id;
	return slot;
}
