/* Calls a tree's TDP MMU.  Compiled in one unit behind tdp_mmu.c, tdp_iter.c, spte.c and versions.c. */
#include "shim.h"

#include <string.h>

enum { STATES = 1 << 20 };

static struct kvm kvm;
static struct kvm_vcpu vcpu;
static struct kvm_mmu mmu;
static struct kvm_memory_slot slots[2];
static struct workqueue_struct zap_queue;
static u64 watched[MAX_WATCHED];
static unsigned int n_watched;
static unsigned long long states[STATES];
static unsigned int n_states;

struct cpuinfo_x86 boot_cpu_data = { .x86_phys_bits = 46, .x86_cache_bits = 46 };
bool tdp_enabled = true;

void *kvm_mmu_memory_cache_alloc(struct kvm_mmu_memory_cache *cache)
{
	if (cache == &vcpu.arch.mmu_shadow_page_cache)
		return (void *)shim_page_alloc(0);
	return shim_object_alloc();
}

void kvm_mmu_hugepage_adjust(struct kvm_vcpu *v, struct kvm_page_fault *fault)
{
	(void)v;
	if (fault->max_level > PG_LEVEL_4K)
		fault->pfn &= -KVM_PAGES_PER_HPAGE(fault->max_level);
	fault->req_level = fault->goal_level = fault->max_level;
}

/* --- states ---------------------------------------------------------------------------------------------------- */
static unsigned long long normal(u64 spte, int level)
{
	unsigned long long state = (unsigned long long)level * STATE_LEVEL;

#ifdef FROZEN_SPTE
	if (spte == FROZEN_SPTE)
		return state | STATE_FROZEN;
#else
	if (spte == REMOVED_SPTE)
		return state | STATE_FROZEN;
#endif
	if (!is_shadow_present_pte(spte))
		return state;
	state |= STATE_PRESENT;
	state |= spte & VMX_EPT_READABLE_MASK ? STATE_R : 0;
	state |= spte & PT_WRITABLE_MASK ? STATE_W : 0;
	state |= spte & VMX_EPT_EXECUTABLE_MASK ? STATE_X : 0;
	if (!is_last_spte(spte, level))
		return state;
	state |= STATE_LEAF;
	state |= spte & shadow_accessed_mask ? STATE_A : 0;
	state |= spte & shadow_dirty_mask ? STATE_D : 0;
	state |= spte & shadow_host_writable_mask ? STATE_HOST_WRITABLE : 0;
	state |= spte & shadow_mmu_writable_mask ? STATE_MMU_WRITABLE : 0;
	state |= is_access_track_spte(spte) ? STATE_TRACKED : 0;
	return state | (spte >> 12 & 0xffffffffff) * STATE_PFN;
}

/* The deepest existing SPTE for gfn. */
static u64 *walk(struct kvm_mmu_page *root, u64 gfn, int *level)
{
	u64 *table = root->spt;

	for (*level = root->role.level;; (*level)--) {
		u64 *sptep = &table[gfn >> 9 * (*level - 1) & 511];

		if (!is_shadow_present_pte(*sptep) || is_last_spte(*sptep, *level) || *level == 1)
			return sptep;
		table = shim_va(*sptep & 0xffffffffff000);
	}
}

int glue_record(void)
{
	struct kvm_mmu_page *root;
	unsigned int begin = n_states;

	list_for_each_entry(root, &kvm.arch.tdp_mmu_roots, link) {
		if (n_states + n_watched + 1 > STATES)
			return -1;
		states[n_states++] = (unsigned long long)root->role.smm | (unsigned long long)root->role.invalid << 1 |
				     (unsigned long long)refcount_read(&root->tdp_mmu_root_count) << 8;
		for (unsigned int i = 0; i < n_watched; i++) {
			int level;
			u64 *sptep = walk(root, watched[i], &level);

			states[n_states++] = normal(*sptep, level);
		}
	}
	states[n_states++] = n_states - begin;
	return (int)(n_states - 1);
}

u64 glue_gfn_of(const volatile void *sptep)
{
	unsigned long at = (unsigned long)sptep;
	struct kvm_mmu_page *sp = (void *)virt_to_page((void *)(at & PAGE_MASK))->private;

	return sp ? sp->gfn + ((at & ~PAGE_MASK) / 8 << 9 * (sp->role.level - 1)) : 0;
}

int tree_record(void)
{
	return glue_record();
}

const unsigned long long *tree_state(int place, unsigned int *n)
{
	*n = (unsigned int)states[place];
	return &states[place - (int)*n];
}

/* --- setting up ------------------------------------------------------------------------------------------------- */
void tree_start(unsigned long long npages, int ad_bits, const unsigned long long *gfns, unsigned int n,
		void (*other)(void))
{
	shim_reset();
	memset(&kvm, 0, sizeof(kvm));
	memset(&vcpu, 0, sizeof(vcpu));
	memset(&mmu, 0, sizeof(mmu));
	memset(slots, 0, sizeof(slots));
	n_watched = n < MAX_WATCHED ? n : MAX_WATCHED;
	memcpy(watched, gfns, n_watched * sizeof(watched[0]));
	n_states = 0;
	init_spte_module();
	set_ept_masks(ad_bits);
	for (int i = 0; i < 2; i++) {
		slots[i].npages = npages;
		slots[i].as_id = (u16)i;
		shim.slots[i] = &slots[i];
	}
	shim.other = other;
	vcpu.kvm = &kvm;
	vcpu.arch.mmu = &mmu;
	/* The return value of older trees says whether there is memory for it. */
	(void)kvm_mmu_init_tdp_mmu(&kvm);
	mmu.root_role.level = 4;
	mmu.root_role.direct = 1;
	mmu.root_role.access = ACC_ALL;
	mmu.root_role.ad_disabled = !ad_bits;
	set_permissions(&mmu);
}

void tree_set_logging(int as_id, int on)
{
	shim.slots_logging[as_id] = on;
	slots[as_id].flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
}

void tree_set_levels(int as_id, const unsigned char *levels, unsigned int n)
{
	memcpy(shim.levels[as_id], levels, n < sizeof(shim.levels[0]) ? n : sizeof(shim.levels[0]));
}

void tree_set_points(const struct shim_point *points, unsigned int n)
{
	shim.n_points = n < MAX_POINTS ? n : MAX_POINTS;
	shim.next_point = 0;
	memcpy(shim.points, points, shim.n_points * sizeof(points[0]));
}

void tree_clear(void)
{
	shim.n_events = 0;
	n_states = 0;
}

unsigned int tree_events(const struct shim_event **events)
{
	*events = shim.events;
	return shim.n_events;
}

/* --- operations ------------------------------------------------------------------------------------------------ */
unsigned long long tree_alloc_root(int as_id)
{
	mmu.root_role.smm = (unsigned int)as_id & 1;
	alloc_root(&kvm, &vcpu);
	return mmu.root.hpa;
}

int tree_root_invalid(unsigned long long root)
{
	return root_at(root)->role.invalid;
}

void tree_put_root(unsigned long long root)
{
	read_lock(&kvm.mmu_lock);
	put_root(&kvm, root_at(root), true);
	read_unlock(&kvm.mmu_lock);
}

int tree_map(unsigned long long root, unsigned long long gfn, unsigned long long pfn, int write, int exec, int level,
	     int map_writable)
{
	struct kvm_page_fault fault = {
		.addr = gfn << PAGE_SHIFT,
		.error_code = write ? PFERR_WRITE_MASK : exec ? PFERR_FETCH_MASK : 0,
		.write = write,
		.exec = exec,
		.is_tdp = true,
		.max_level = (u8)level,
		.gfn = gfn,
		.pfn = pfn,
		.map_writable = map_writable,
		.slot = &slots[root_at(root)->role.smm],
	};
	int r;

	mmu.root.hpa = root;
	read_lock(&kvm.mmu_lock);
	r = kvm_tdp_mmu_map(&vcpu, &fault);
	read_unlock(&kvm.mmu_lock);
	return fault_result(r);
}

int tree_zap_leafs(unsigned long long start, unsigned long long end, int flush)
{
	int r;

	write_lock(&kvm.mmu_lock);
	r = kvm_tdp_mmu_zap_leafs(&kvm, start, end, flush);
	write_unlock(&kvm.mmu_lock);
	return r;
}

static struct kvm_gfn_range range_of(int as_id, u64 start, u64 end, bool may_block)
{
	struct kvm_gfn_range range;

	memset(&range, 0, sizeof(range));
	range.slot = &slots[as_id];
	range.start = start;
	range.end = end;
	range.may_block = may_block;
	return range;
}

int tree_unmap(int as_id, unsigned long long start, unsigned long long end, int may_block, int flush)
{
	struct kvm_gfn_range range = range_of(as_id, start, end, may_block);
	int r;

	write_lock(&kvm.mmu_lock);
	r = kvm_tdp_mmu_unmap_gfn_range(&kvm, &range, flush);
	write_unlock(&kvm.mmu_lock);
	return r;
}

int tree_age(int as_id, unsigned long long start, unsigned long long end, int lock)
{
	struct kvm_gfn_range range = range_of(as_id, start, end, false);
	int r;

	if (lock)
		write_lock(&kvm.mmu_lock);
	r = kvm_tdp_mmu_age_gfn_range(&kvm, &range);
	if (lock)
		write_unlock(&kvm.mmu_lock);
	return r;
}

int tree_wrprot_slot(int as_id, int min_level)
{
	int r;

	read_lock(&kvm.mmu_lock);
	r = kvm_tdp_mmu_wrprot_slot(&kvm, &slots[as_id], min_level);
	read_unlock(&kvm.mmu_lock);
	return r;
}

int tree_write_protect_gfn(int as_id, unsigned long long gfn, int min_level)
{
	int r;

	write_lock(&kvm.mmu_lock);
	r = kvm_tdp_mmu_write_protect_gfn(&kvm, &slots[as_id], gfn, min_level);
	write_unlock(&kvm.mmu_lock);
	return r;
}

void tree_clear_dirty(int as_id, unsigned long long gfn, unsigned long long mask)
{
	write_lock(&kvm.mmu_lock);
	kvm_tdp_mmu_clear_dirty_pt_masked(&kvm, &slots[as_id], gfn, mask, true);
	write_unlock(&kvm.mmu_lock);
}

void tree_split(int as_id, unsigned long long start, unsigned long long end, int level, int shared)
{
	if (shared)
		read_lock(&kvm.mmu_lock);
	else
		write_lock(&kvm.mmu_lock);
	kvm_tdp_mmu_try_split_huge_pages(&kvm, &slots[as_id], start, end, level, shared);
	if (shared)
		read_unlock(&kvm.mmu_lock);
	else
		write_unlock(&kvm.mmu_lock);
}

void tree_recover(int as_id)
{
	read_lock(&kvm.mmu_lock);
	recover_huge_pages(&kvm, &slots[as_id]);
	read_unlock(&kvm.mmu_lock);
}

void tree_invalidate_roots(void)
{
	write_lock(&kvm.mmu_lock);
	invalidate_roots(&kvm);
	write_unlock(&kvm.mmu_lock);
}

void tree_zap_invalidated_roots(int shared)
{
	zap_invalidated_roots(&kvm, shared);
}

int tree_touch(unsigned long long root, unsigned long long gfn, int write)
{
	int level;
	u64 *sptep = walk(root_at(root), gfn, &level);

	if (!is_shadow_present_pte(*sptep) || !is_last_spte(*sptep, level))
		return 0;
	if (!(*sptep & (write ? PT_WRITABLE_MASK : VMX_EPT_READABLE_MASK)))
		return 0;
	*sptep |= shadow_accessed_mask | (write ? shadow_dirty_mask : 0);
	return 1;
}
