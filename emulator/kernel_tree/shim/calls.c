/* Functions that call a tree's TDP MMU on the machine, compiled in one unit with tdp_mmu.c, tdp_iter.c and spte.c.
 *
 * tree.h says which functions the tree has and how many arguments they take; no version is tested.
 */
#include "machine_internal.h"
#include "tree.h"

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
#ifdef TREE_ARGS_spte_permission_fault
/* Do update_permission_bitmask() for EPT: by the fault's error code, a bit for each set of rights that forbids the
 * access. */
static void set_permissions(struct kvm_mmu *mmu)
{
	unsigned int n = sizeof(mmu->fmt.permissions) / sizeof(mmu->fmt.permissions[0]);

	for (unsigned int i = 0; i < n; i++) {
		bool write = i << 1 & PFERR_WRITE_MASK, fetch = i << 1 & PFERR_FETCH_MASK;

		for (unsigned int access = 0; access < 8 * sizeof(mmu->fmt.permissions[0]); access++)
			if ((write && !(access & ACC_WRITE_MASK)) || (fetch && !(access & ACC_EXEC_MASK)) ||
			    (!write && !fetch && !(access & ACC_READ_MASK)))
				mmu->fmt.permissions[i] |= 1u << access;
	}
}
#else
static void set_permissions(struct kvm_mmu *mmu) { (void)mmu; }
#endif

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
#ifdef TREE_ARGS_kvm_mmu_spte_module_init
	kvm_mmu_spte_module_init();
#endif
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
	kvm_mmu_reset_all_pte_masks();
#if TREE_ARGS_kvm_mmu_set_ept_masks == 1
	kvm_mmu_set_ept_masks(ad_bits);
#else
	kvm_mmu_set_ept_masks(ad_bits, true);
#endif
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

/* --- requests and kicks --------------------------------------------------------------------------------------------- */
unsigned int glue_vcpu_at(const volatile void *p, unsigned int *field)
{
	unsigned long at = (unsigned long)p - shim_vcpus, inside = at % sizeof(*all_vcpus);

	*field = inside == offsetof(struct kvm_vcpu, mode)     ? FIELD_MODE :
		 inside == offsetof(struct kvm_vcpu, requests) ? FIELD_REQUESTS :
		 inside == offsetof(struct kvm_vcpu, cpu)      ? FIELD_CPU :
								 FIELD_NONE;
	return (unsigned int)(at / sizeof(*all_vcpus));
}

/* Called for each access that is logged, so its own accesses must not be. */
__attribute__((no_sanitize_thread)) bool glue_is_statistic(const volatile void *p)
{
	const struct kvm *kvm = vms[here->api.vm];

	return kvm && (unsigned long)p - (unsigned long)&kvm->stat < sizeof(kvm->stat);
}

bool glue_exits_guest(u64 old, u64 value)
{
	return old == IN_GUEST_MODE && value == EXITING_GUEST_MODE;
}

bool glue_is_kick(void (*function)(void *argument))
{
	return function == ack_kick;
}

int tree_set_vcpus(unsigned int number, const unsigned int *numbers, unsigned int n)
{
	struct kvm *kvm = vms[number];
	void **entries = calloc(n + 1, sizeof(*entries));

	if (!entries)
		return core.nomem;
	for (unsigned int i = 0; i < n; i++) {
		entries[i] = &all_vcpus[numbers[i]];
		all_vcpus[numbers[i]].kvm = kvm;
	}
	free(kvm->vcpu_array.shim_entries);
	kvm->vcpu_array.shim_entries = entries;
	atomic_set(&kvm->online_vcpus, (int)n);
	return 0;
}

int tree_make_all_cpus_request(unsigned int cpu, unsigned int request)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = kvm_make_all_cpus_request(vm(), request));

	return error ? error : r;
}

int tree_flush_remote_tlbs(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_OTHER, kvm_flush_remote_tlbs(vm()));
}

unsigned long long tree_take_flushes(unsigned int number)
{
	return __atomic_exchange_n(&vms[number]->stat.generic.remote_tlb_flush, 0, __ATOMIC_RELAXED);
}

/* --- roots ------------------------------------------------------------------------------------------------------------ */
static struct kvm_mmu_page *root_at(unsigned long long hpa)
{
	return (void *)shim_page_of((unsigned long)hpa >> PAGE_SHIFT)->private;
}

static void call_alloc_root(int level, int as_id, int guest_mode)
{
	struct kvm_vcpu *vcpu = vcpu_with(0);

	vcpu->arch.mmu->root_role.level = (unsigned int)level & 15;
	vcpu->arch.mmu->root_role.smm = (unsigned int)as_id & 1;
	vcpu->arch.mmu->root_role.guest_mode = (unsigned int)guest_mode & 1;
#ifdef TREE_ARGS_kvm_tdp_mmu_get_vcpu_root_hpa
	write_lock(&vm()->mmu_lock);
	vcpu->arch.mmu->root.hpa = kvm_tdp_mmu_get_vcpu_root_hpa(vcpu);
	write_unlock(&vm()->mmu_lock);
#elif TREE_ARGS_kvm_tdp_mmu_alloc_root == 1
	kvm_tdp_mmu_alloc_root(vcpu);
#else
	kvm_tdp_mmu_alloc_root(vcpu, false);
#endif
}

unsigned long long tree_alloc_root(unsigned int cpu, int level, int as_id, int guest_mode)
{
	if (OPERATION(cpu, OPERATION_ALLOC_ROOT, call_alloc_root(level, as_id, guest_mode)))
		return 0;
	return vcpus[cpu].arch.mmu->root.hpa;
}

static void call_put_root(struct kvm_mmu_page *root)
{
#if TREE_ARGS_kvm_tdp_mmu_put_root == 2
	kvm_tdp_mmu_put_root(vm(), root);
#else
	kvm_tdp_mmu_put_root(vm(), root, here->api.lock == SHIM_READ);
#endif
}

int tree_put_root(unsigned int cpu, unsigned long long root)
{
	return OPERATION(cpu, OPERATION_OTHER, call_put_root(root_at(root)));
}

const unsigned int *tree_root_role(unsigned long long root)
{
	return &root_at(root)->role.word;
}

const int *tree_root_count(unsigned long long root)
{
	return &root_at(root)->tdp_mmu_root_count.refs;
}

const unsigned char *tree_root_scheduled(unsigned long long root)
{
	(void)root;
#ifdef TREE_MEMBER_kvm_mmu_page_tdp_mmu_scheduled_root_to_zap
	return (const unsigned char *)&root_at(root)->tdp_mmu_scheduled_root_to_zap;
#else
	return NULL;
#endif
}

unsigned int tree_role_invalid(void)
{
	union kvm_mmu_page_role role = { .word = 0 };

	role.invalid = 1;
	return role.word;
}

unsigned int tree_roots(unsigned int number, unsigned long long *roots, unsigned int most)
{
	struct kvm_mmu_page *root;
	unsigned int n = 0;

	list_for_each_entry_rcu(root, &vms[number]->arch.tdp_mmu_roots, link)
		if (n < most)
			roots[n++] = __pa(root->spt);
	return n;
}

/* --- faults ----------------------------------------------------------------------------------------------------------- */
static int call_map(unsigned long long root, unsigned long long gfn, unsigned long long pfn, int write, int exec, int level,
	       int max_level, int map_writable, int prefetch)
{
	struct kvm_memory_slot slot = slot_of();
	struct kvm_vcpu *vcpu = vcpu_with(root);
	struct kvm_page_fault fault = {
		.addr = gfn << PAGE_SHIFT,
		.error_code = write ? PFERR_WRITE_MASK : exec ? PFERR_FETCH_MASK : 0,
		.prefetch = prefetch,
		.write = write,
		.exec = exec,
		.is_tdp = true,
		.max_level = (u8)max_level,
		.req_level = (u8)level,
		.goal_level = (u8)level,
		.gfn = gfn,
		.pfn = pfn,
		.map_writable = map_writable,
		.slot = &slot,
	};
	int r = kvm_tdp_mmu_map(vcpu, &fault);

	if (r == RET_PF_RETRY && glue_frozen(here->last_value))
		here->api.frozen++;
	switch (r) {
	case RET_PF_RETRY:
		return 1;
	case RET_PF_FIXED:
		return 4;
	case RET_PF_SPURIOUS:
		return 5;
	default:
		return 100 + r;
	}
}

int tree_map(unsigned int cpu, unsigned long long root, unsigned long long gfn, unsigned long long pfn, int write, int exec,
	     int level, int max_level, int map_writable, int prefetch)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_FAULT,
			      r = call_map(root, gfn, pfn, write, exec, level, max_level, map_writable, prefetch));

	return error ? error : r;
}

/* Map the neighbours of a fault, each as by a prefetching fault.  The kernel itself maps one page. */
static void call_map_around(unsigned long long root, u64 gfn, unsigned int n, const unsigned int *hfns,
			    const unsigned int *tags, const unsigned int *writable)
{
	for (unsigned int i = 0; i < n; i++)
		if (hfns[i] != 0xffffffff)
			call_map(root, gfn + i, (u64)tags[i] << 24 | hfns[i], 0, 0, PG_LEVEL_4K, PG_LEVEL_4K,
				 (int)writable[i], 1);
}

int tree_map_around(unsigned int cpu, unsigned long long root, unsigned long long gfn, unsigned int n,
		    const unsigned int *hfns, const unsigned int *tags, const unsigned int *writable)
{
	return OPERATION(cpu, OPERATION_FAULT, call_map_around(root, gfn, n, hfns, tags, writable));
}

static bool allows(u64 spte, int write, int exec)
{
	return spte & (write ? PT_WRITABLE_MASK : exec ? VMX_EPT_EXECUTABLE_MASK : VMX_EPT_READABLE_MASK);
}

/* Do fast_page_fault(); the tree's code walks, and interprets the SPTE's bits. */
static int call_fast_fault(unsigned long long root, unsigned long long gfn, int write, int exec)
{
	struct kvm_vcpu *vcpu = vcpu_with(root);
	int r = FAST_INVALID;

	rcu_read_lock();
	for (int tries = 0; tries < 5; tries++) {
		u64 spte = 0, new_spte, *sptep;

#if TREE_ARG_kvm_tdp_mmu_fast_pf_get_last_sptep_addr == 1
		sptep = kvm_tdp_mmu_fast_pf_get_last_sptep(vcpu, gfn << PAGE_SHIFT, &spte);
#else
		sptep = kvm_tdp_mmu_fast_pf_get_last_sptep(vcpu, gfn, &spte);
#endif
		if (!sptep || !is_shadow_present_pte(spte) || !is_last_spte(spte, (int)here->at.level))
			break;
		r = FAST_SPURIOUS;
		if (allows(spte, write, exec))
			break;
		r = FAST_INVALID;
		new_spte = is_access_track_spte(spte) ? restore_acc_track_spte(spte) : spte;
		if (write && is_mmu_writable_spte(spte)) {
			new_spte |= PT_WRITABLE_MASK;
			/* Leave a huge page of a logged slot to the slow path, which splits it. */
			if (here->at.level > PG_LEVEL_4K && here->api.slot_flags & KVM_MEM_LOG_DIRTY_PAGES)
				break;
		}
		if (new_spte == spte || !allows(new_spte, write, exec))
			break;
		if (cmpxchg64(sptep, spte, new_spte) == spte) {
			r = new_spte & ~spte & PT_WRITABLE_MASK ? FAST_MADE_WRITABLE : FAST_FIXED;
			break;
		}
	}
	rcu_read_unlock();
	return r;
}

int tree_fast_fault(unsigned int cpu, unsigned long long root, unsigned long long gfn, int write, int exec)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_FAULT, r = call_fast_fault(root, gfn, write, exec));

	return error ? error : r;
}

/* --- zaps ------------------------------------------------------------------------------------------------------------- */
static int call_zap_leafs(u64 start, u64 end, bool flush)
{
	int r = kvm_tdp_mmu_zap_leafs(vm(), start, end, flush);

	shim_passed(start, end, (const void *)kvm_tdp_mmu_zap_leafs);
	return r;
}

int tree_zap_leafs(unsigned int cpu, unsigned long long start, unsigned long long end, int flush)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = call_zap_leafs(start, end, flush));

	return error ? error : r;
}

static struct kvm_gfn_range range_of(struct kvm_memory_slot *slot, u64 start, u64 end, bool may_block)
{
	struct kvm_gfn_range range;

	memset(&range, 0, sizeof(range));
	range.slot = slot;
	range.start = start;
	range.end = end;
	range.may_block = may_block;
	return range;
}

static int call_unmap(u64 start, u64 end, bool may_block, bool flush)
{
	struct kvm_memory_slot slot = slot_of();
	struct kvm_gfn_range range = range_of(&slot, start, end, may_block);

	int r = kvm_tdp_mmu_unmap_gfn_range(vm(), &range, flush);

	shim_passed(start, end, (const void *)kvm_tdp_mmu_unmap_gfn_range);
	return r;
}

int tree_unmap(unsigned int cpu, unsigned long long start, unsigned long long end, int may_block, int flush)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = call_unmap(start, end, may_block, flush));

	return error ? error : r;
}

static int call_age(u64 start, u64 end)
{
	struct kvm_memory_slot slot = slot_of();
	struct kvm_gfn_range range = range_of(&slot, start, end, false);

	return kvm_tdp_mmu_age_gfn_range(vm(), &range);
}

int tree_age(unsigned int cpu, unsigned long long start, unsigned long long end)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = call_age(start, end));

	return error ? error : r;
}

int tree_zap_all(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_OTHER, kvm_tdp_mmu_zap_all(vm()));
}

static void call_invalidate_roots(void)
{
#ifdef TREE_ARGS_kvm_tdp_mmu_invalidate_roots
	kvm_tdp_mmu_invalidate_roots(vm(), KVM_VALID_ROOTS);
#else
	kvm_tdp_mmu_invalidate_all_roots(vm());
#endif
}

int tree_invalidate_roots(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_INVALIDATE, call_invalidate_roots());
}

static void call_zap_invalidated_roots(bool shared)
{
#if TREE_ARGS_kvm_tdp_mmu_zap_invalidated_roots == 2
	kvm_tdp_mmu_zap_invalidated_roots(vm(), shared);
#else
	(void)shared;
	kvm_tdp_mmu_zap_invalidated_roots(vm());
#endif
}

int tree_zap_invalidated_roots(unsigned int cpu, int shared)
{
	return OPERATION(cpu, OPERATION_OTHER, call_zap_invalidated_roots(shared));
}

int tree_uninit(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_OTHER, kvm_mmu_uninit_tdp_mmu(vm()));
}

/* --- dirty logging ---------------------------------------------------------------------------------------------------- */
static int call_wrprot_slot(int min_level)
{
	struct kvm_memory_slot slot = slot_of();

	int r = kvm_tdp_mmu_wrprot_slot(vm(), &slot, min_level);

	shim_passed(slot.base_gfn, slot.base_gfn + slot.npages, (const void *)kvm_tdp_mmu_wrprot_slot);
	return r;
}

int tree_wrprot_slot(unsigned int cpu, int min_level)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = call_wrprot_slot(min_level));

	return error ? error : r;
}

static int call_write_protect_gfn(u64 gfn, int min_level)
{
	struct kvm_memory_slot slot = slot_of();

	return kvm_tdp_mmu_write_protect_gfn(vm(), &slot, gfn, min_level);
}

int tree_write_protect_gfn(unsigned int cpu, unsigned long long gfn, int min_level)
{
	volatile int r = 0;
	int error = OPERATION(cpu, OPERATION_OTHER, r = call_write_protect_gfn(gfn, min_level));

	return error ? error : r;
}

static void call_clear_dirty(u64 gfn, unsigned long mask)
{
	struct kvm_memory_slot slot = slot_of();

	kvm_tdp_mmu_clear_dirty_pt_masked(vm(), &slot, gfn, mask, true);
}

int tree_clear_dirty(unsigned int cpu, unsigned long long gfn, unsigned long long mask)
{
	int error = OPERATION(cpu, OPERATION_OTHER, call_clear_dirty(gfn, mask));

	return error ? error : (int)here->api.changed;
}

static void call_split(u64 start, u64 end, int level, bool shared)
{
	struct kvm_memory_slot slot = slot_of();

	kvm_tdp_mmu_try_split_huge_pages(vm(), &slot, start, end, level, shared);
}

int tree_split(unsigned int cpu, unsigned long long start, unsigned long long end, int level, int shared)
{
	return OPERATION(cpu, OPERATION_SPLIT, call_split(start, end, level, shared));
}

static void call_recover(void)
{
	struct kvm_memory_slot slot = slot_of();

#ifdef TREE_ARGS_kvm_tdp_mmu_recover_huge_pages
	kvm_tdp_mmu_recover_huge_pages(vm(), &slot);
#else
	kvm_tdp_mmu_zap_collapsible_sptes(vm(), &slot);
#endif
}

int tree_recover(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_RECOVER, call_recover());
}
