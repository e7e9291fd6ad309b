/* The tree's functions that have changed from version to version, as one function each, for all uses of a tree.
 *
 * Compiled in one unit behind tdp_mmu.c, tdp_iter.c and spte.c, and before the files that call them.  tree.h says which
 * functions the tree has and how many arguments they take; no version is tested.
 */
#include "tree.h"

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

static void init_spte_module(void)
{
#ifdef TREE_ARGS_kvm_mmu_spte_module_init
	kvm_mmu_spte_module_init();
#endif
}

static void set_ept_masks(int ad_bits)
{
	kvm_mmu_reset_all_pte_masks();
#if TREE_ARGS_kvm_mmu_set_ept_masks == 1
	kvm_mmu_set_ept_masks(ad_bits);
#else
	kvm_mmu_set_ept_masks(ad_bits, true);
#endif
}

/* --- roots ------------------------------------------------------------------------------------------------------------ */
static struct kvm_mmu_page *root_at(unsigned long long hpa)
{
	return (void *)shim_page_of((unsigned long)hpa >> PAGE_SHIFT)->private;
}

/* Allocate a root of the vCPU's root_role, or find one, and load it. */
static void alloc_root(struct kvm *kvm, struct kvm_vcpu *vcpu)
{
#ifdef TREE_ARGS_kvm_tdp_mmu_get_vcpu_root_hpa
	write_lock(&kvm->mmu_lock);
	vcpu->arch.mmu->root.hpa = kvm_tdp_mmu_get_vcpu_root_hpa(vcpu);
	write_unlock(&kvm->mmu_lock);
#else
	(void)kvm;
#if TREE_ARGS_kvm_tdp_mmu_alloc_root == 1
	kvm_tdp_mmu_alloc_root(vcpu);
#else
	kvm_tdp_mmu_alloc_root(vcpu, false);
#endif
#endif
}

/* shared: mmu_lock is held for read. */
static void put_root(struct kvm *kvm, struct kvm_mmu_page *root, bool shared)
{
#if TREE_ARGS_kvm_tdp_mmu_put_root == 2
	(void)shared;
	kvm_tdp_mmu_put_root(kvm, root);
#else
	kvm_tdp_mmu_put_root(kvm, root, shared);
#endif
}

static void invalidate_roots(struct kvm *kvm)
{
#ifdef TREE_ARGS_kvm_tdp_mmu_invalidate_roots
	kvm_tdp_mmu_invalidate_roots(kvm, KVM_VALID_ROOTS);
#else
	kvm_tdp_mmu_invalidate_all_roots(kvm);
#endif
}

static void zap_invalidated_roots(struct kvm *kvm, bool shared)
{
#if TREE_ARGS_kvm_tdp_mmu_zap_invalidated_roots == 2
	kvm_tdp_mmu_zap_invalidated_roots(kvm, shared);
#else
	(void)shared;
	kvm_tdp_mmu_zap_invalidated_roots(kvm);
#endif
}

/* --- faults and huge pages ---------------------------------------------------------------------------------------- */
/* Return the result of a fault as the model numbers it. */
static int fault_result(int r)
{
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

static void recover_huge_pages(struct kvm *kvm, struct kvm_memory_slot *slot)
{
#ifdef TREE_ARGS_kvm_tdp_mmu_recover_huge_pages
	kvm_tdp_mmu_recover_huge_pages(kvm, slot);
#else
	kvm_tdp_mmu_zap_collapsible_sptes(kvm, slot);
#endif
}
