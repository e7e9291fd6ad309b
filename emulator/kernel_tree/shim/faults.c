/* Functions that call a tree's TDP MMU for roots and for page faults.  Follows vms.c in the unit of the tree's files. */
/* --- roots ------------------------------------------------------------------------------------------------------------ */
static void call_alloc_root(int level, int as_id, int guest_mode)
{
	struct kvm_vcpu *vcpu = vcpu_with(0);

	vcpu->arch.mmu->root_role.level = (unsigned int)level & 15;
	vcpu->arch.mmu->root_role.smm = (unsigned int)as_id & 1;
	vcpu->arch.mmu->root_role.guest_mode = (unsigned int)guest_mode & 1;
	alloc_root(vm(), vcpu);
}

unsigned long long tree_alloc_root(unsigned int cpu, int level, int as_id, int guest_mode)
{
	if (OPERATION(cpu, OPERATION_ALLOC_ROOT, call_alloc_root(level, as_id, guest_mode)))
		return 0;
	return vcpus[cpu].arch.mmu->root.hpa;
}

int tree_put_root(unsigned int cpu, unsigned long long root)
{
	return OPERATION(cpu, OPERATION_OTHER, put_root(vm(), root_at(root), here->api.lock == SHIM_READ));
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
	return fault_result(r);
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
