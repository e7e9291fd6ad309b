/* The rest of KVM that a tree's TDP MMU calls.  This file includes no prototypes of the tree's, because versions differ in
 * them. */
#include "linux.h"
#include "machine_internal.h"
#include "tree.h"

/* In the tree's kvm_main.c. */
void kvm_flush_remote_tlbs(void *kvm);

/* Flush a range on Hyper-V, and else by the tree's kvm_flush_remote_tlbs(). */
void kvm_flush_remote_tlbs_with_address(void *kvm, u64 gfn, u64 npages)
{
	if (shim_flush_range_on_hyperv(gfn, npages))
		kvm_flush_remote_tlbs(kvm);
}

void kvm_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	(void)slot;
	shim_python(CALL_FLUSH_SLOT, 0, 0, NULL);
	kvm_flush_remote_tlbs_with_address(kvm, here->api.slot_base, here->api.slot_npages);
}

void kvm_arch_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	kvm_flush_remote_tlbs_memslot(kvm, slot);
}

void mark_page_dirty_in_slot(void *kvm, const void *slot, u64 gfn)
{
	(void)kvm;
	(void)slot;
	shim_python(CALL_DIRTY, gfn, 0, NULL);
}

/* Do kvm_set_pfn_dirty() or kvm_set_pfn_accessed(), once for both: the pfn has the custody of the leaf that the tree's
 * code took it from, which need not be the SPTE that this CPU changed last. */
static void set_pfn(u64 pfn)
{
	if (here->pfn_set == pfn)
		return;
	here->pfn_set = pfn;
	shim_tell(CALL_SET_PFN, 0, 0);
	core.set_pfn(core.machine, here->api.id, here->api.vm, here->at.gfn, pfn << PAGE_SHIFT | RWX | ACCESSED | DIRTY,
		     here->at.level);
}

void kvm_set_pfn_dirty(u64 pfn)
{
	set_pfn(pfn);
}

void kvm_set_pfn_accessed(u64 pfn)
{
	set_pfn(pfn);
}

int mmu_try_to_unsync_pages(void)
{
	return 0;
}

int kvm_mmu_max_mapping_level(u64 kvm, u64 second, u64 third, u64 fourth)
{
	u64 arguments[] = { kvm, second, third, fourth };

	return shim_python(CALL_MAX_LEVEL, arguments[TREE_ARG_kvm_mmu_max_mapping_level_gfn], 0, NULL);
}
