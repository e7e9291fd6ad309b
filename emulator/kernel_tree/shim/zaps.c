/* Functions that call a tree's TDP MMU to take rights away: zaps, ageing and dirty logging.  Follows vms.c in the unit of the tree's files. */
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

int tree_invalidate_roots(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_INVALIDATE, invalidate_roots(vm()));
}

int tree_zap_invalidated_roots(unsigned int cpu, int shared)
{
	return OPERATION(cpu, OPERATION_OTHER, zap_invalidated_roots(vm(), shared));
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

	recover_huge_pages(vm(), &slot);
}

int tree_recover(unsigned int cpu)
{
	return OPERATION(cpu, OPERATION_RECOVER, call_recover());
}
