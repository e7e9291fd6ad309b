/* A small KVM without EPT, for the C tests: its shadow tables are a TLB in software, a tree for each address space.  The
 * guest's tables stay writable and unsynchronized; an SPTE goes when the guest invalidates, or the host unmaps. */
#ifndef FLUSHLAB_TEST_SHADOW_MACHINE_H
#define FLUSHLAB_TEST_SHADOW_MACHINE_H

#include "harness.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/shadow_mmu.h"
#include "ept/spte.h"
#include "guest/guest_boot.h"
#include "guest/guest_fault.h"
#include "guest/guest_insn.h"
#include "memory/mm.h"
#include "memory/mm_word.h"
#include "vm/guest_state.h"
#include "vm/mmu_invalidate.h"
#include "vm/mmu_lock.h"
#include "vm/vm.h"
#include "walk/flush.h"
#include "walk/vmcs.h"

enum { TREES = 8, LEAF_TABLES = 1024, SHADOW_GFNS = 32768, MAPPED_BY = 12 };

/* An address space of a vCPU: CR3's gfn; the first tree is that of CR0.PG = 0. */
struct tree {
	uint64_t cr3;
	uint32_t pcid;
	uint32_t root;
	uint32_t leaf_tables;
	uint32_t leaf_table[LEAF_TABLES];
};

struct shadow_vcpu {
	uint32_t vcpu, vpid, vmcs;
	uint32_t trees, current;
	struct tree tree[TREES];
	uint64_t cr3, cr0;
	bool deaf; /* INVLPG and INVPCID are not emulated */
};

/* The SPTEs that map a gfn. */
struct rmap_head {
	uint32_t count;
	uint32_t table[MAPPED_BY], index[MAPPED_BY];
};

struct shadow_vm {
	struct machine *m;
	uint32_t vm;
	uint64_t gfns;
	bool no_retry;
	struct rmap_head rmap[SHADOW_GFNS];
};

static inline void rmap_remove(struct shadow_vm *s, uint64_t gfn, uint32_t table, uint32_t index)
{
	struct rmap_head *r = &s->rmap[gfn];
	uint32_t i = 0;

	while (i < r->count && (r->table[i] != table || r->index[i] != index))
		i++;
	CHECK(i < r->count);
	r->count--;
	r->table[i] = r->table[r->count];
	r->index[i] = r->index[r->count];
}

/* drop_spte(), under mmu_lock for write. */
static inline bool shadow_drop(struct shadow_vm *s, uint32_t cpu, uint32_t table, uint32_t index)
{
	if (!is_shadow_present_pte(spte_read(s->m, table, index)))
		return false;
	rmap_remove(s, kvm_mmu_page_get_gfn(s->m, table, index), table, index);
	CHECK(shadow_mmu_set_spte(s->m, cpu, s->vm, table, index, 1, 0, 0) != UINT64_MAX);
	return true;
}

static inline bool shadow_zap_gfn(struct shadow_vm *s, uint32_t cpu, uint64_t gfn)
{
	struct rmap_head *r = &s->rmap[gfn];
	bool any = r->count;

	while (r->count)
		CHECK(shadow_drop(s, cpu, r->table[0], r->index[0]));
	return any;
}

static inline struct tree *shadow_tree(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v, uint64_t cr3)
{
	struct tree *t;
	int64_t root;

	for (uint32_t i = 0; i < v->trees; i++)
		if (v->tree[i].cr3 == cr3)
			return &v->tree[i];
	CHECK(v->trees < TREES);
	root = shadow_page_alloc(s->m, cpu, FRAME_ROOT);
	CHECK(root > 0);
	t = &v->tree[v->trees++];
	t->cr3 = cr3;
	t->root = (uint32_t)root;
	return t;
}

/* Load the root of the address space in use. */
static inline void shadow_load(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v)
{
	bool paging = v->cr0 >> 31 & 1;
	struct tree *t = shadow_tree(s, cpu, v, paging ? (v->cr3 & GPTE_ADDRESS) >> 12 : UINT64_MAX);

	v->current = (uint32_t)(t - v->tree);
	t->pcid = paging ? v->cr3 & 0xfff : 0;
	vmcs_write_guest_cr3(s->m, v->vmcs, t->root, t->pcid);
}

static inline void shadow_vcpu_create(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v, uint32_t vpid)
{
	v->vpid = vpid;
	v->vmcs = (uint32_t)vmcs_create(s->m, v->vcpu, vpid);
	vmcs_enable_ept(s->m, v->vmcs, 0);
	guest_power_on(s->m, v->vcpu);
	shadow_load(s, cpu, v);
}

/* Return the table and index of a linear page's SPTE; tables are made as needed.  Under mmu_lock for write. */
static inline uint32_t shadow_spot(struct shadow_vm *s, uint32_t cpu, struct tree *t, uint64_t page, uint32_t *index)
{
	uint64_t sptes[6];
	uint32_t tables[6];
	int level;

	while ((level = tdp_mmu_get_walk(s->m, t->root, 4, page, sptes, tables)) > PG_LEVEL_4K) {
		int64_t child = shadow_page_alloc(s->m, cpu, FRAME_TABLE);

		CHECK(child > 0);
		if (level == PG_LEVEL_2M) {
			CHECK(t->leaf_tables < LEAF_TABLES);
			t->leaf_table[t->leaf_tables++] = (uint32_t)child;
		}
		CHECK(shadow_mmu_set_spte(s->m, cpu, s->vm, tables[level], page >> 9 * (level - 1) & 511, (uint32_t)level, 0,
					  make_nonleaf_spte(s->m, (uint32_t)child)) != UINT64_MAX);
	}
	*index = page & 511;
	return tables[1];
}

static inline uint64_t guest_read(struct shadow_vm *s, uint32_t cpu, uint64_t gfn, uint32_t index)
{
	struct mm_page page;
	uint64_t value;

	while (mm_read_word(s->m, cpu, s->vm, gfn, index, &value))
		CHECK(!mm_fault(s->m, cpu, s->vm, gfn, 1, &page));
	return value;
}

static inline void guest_set_bits(struct shadow_vm *s, uint32_t cpu, uint64_t gfn, uint32_t index, uint64_t bits)
{
	uint64_t old = guest_read(s, cpu, gfn, index);
	struct mm_page page;
	int r;

	while ((old & bits) != bits && (r = mm_cmpxchg_word(s->m, cpu, s->vm, gfn, index, &old, old | bits)))
		if (r == MACHINE_AGAIN)
			CHECK(!mm_fault(s->m, cpu, s->vm, gfn, 1, &page));
}

/* FNAME(walk_addr): false: the guest's tables do not permit the access.  *gfn is beyond the guest's memory if its
 * tables are, or lead there. */
static inline bool walk_guest(struct shadow_vm *s, uint32_t cpu, const struct shadow_vcpu *v, uint64_t page, uint32_t error,
			      uint64_t *gfn, uint32_t *access)
{
	uint64_t table = (v->cr3 & GPTE_ADDRESS) >> 12, gpte, rights = GPTE_WRITABLE | GPTE_USER;
	bool write = error & PFERR_WRITE;
	uint32_t index;

	*access = SPTE_WRITABLE | SPTE_EXECUTABLE | SPTE_USER;
	*gfn = page;
	if (!(v->cr0 >> 31 & 1))
		return true;
	for (uint32_t level = 4;; level--) {
		bool leaf;

		*gfn = table;
		if (table >= s->gfns)
			return true;
		index = page >> 9 * (level - 1) & 511;
		gpte = guest_read(s, cpu, table, index);
		if (!(gpte & GPTE_PRESENT))
			return false;
		leaf = level == 1 || (gpte & GPTE_PAGE_SIZE);
		rights &= gpte;
		if (leaf && ((write && !(rights & GPTE_WRITABLE)) || ((error & PFERR_USER) && !(rights & GPTE_USER))))
			return false;
		guest_set_bits(s, cpu, table, index, GPTE_ACCESSED | (leaf && write ? GPTE_DIRTY : 0));
		if (leaf) {
			*gfn = ((gpte & GPTE_ADDRESS) >> 12) + (page & ((UINT64_C(1) << 9 * (level - 1)) - 1));
			break;
		}
		table = (gpte & GPTE_ADDRESS) >> 12;
	}
	if (!(rights & GPTE_WRITABLE) || !(write || gpte & GPTE_DIRTY))
		*access &= ~(uint32_t)SPTE_WRITABLE;
	if (!(rights & GPTE_USER))
		*access &= ~(uint32_t)SPTE_USER;
	return true;
}

/* kvm_mmu_page_fault().  Returns false if the page is not in the guest's memory. */
static inline bool shadow_fault(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v, const struct vcpu_exit *out)
{
	uint64_t seq = mmu_invalidate_seq(s->m, s->vm), page = out->linear >> 12, gfn;
	uint32_t access, table, index;
	struct mm_page frame;

	if (!walk_guest(s, cpu, v, page, out->error_code, &gfn, &access)) {
		guest_inject_page_fault(s->m, v->vcpu, out->linear, out->error_code);
		return true;
	}
	if (gfn >= s->gfns)
		return false;
	CHECK(mm_fault(s->m, cpu, s->vm, gfn, 1, &frame) == 0);
	if (mmu_write_lock(s->m, cpu, s->vm))
		return true;
	if (s->no_retry || !mmu_invalidate_retry_gfn(s->m, s->vm, seq, gfn)) {
		table = shadow_spot(s, cpu, &v->tree[v->current], page, &index);
		shadow_drop(s, cpu, table, index);
		if (s->rmap[gfn].count == MAPPED_BY)
			shadow_zap_gfn(s, cpu, gfn);
		CHECK(shadow_mmu_set_spte(s->m, cpu, s->vm, table, index, 1, gfn,
					  make_shadow_spte(frame.hfn, frame.tag, 1, access, 1)) != UINT64_MAX);
		s->rmap[gfn].table[s->rmap[gfn].count] = table;
		s->rmap[gfn].index[s->rmap[gfn].count++] = index;
	}
	mmu_write_unlock(s->m, cpu, s->vm);
	return true;
}

/* Drop the SPTEs of one linear page, or of all (UINT64_MAX), in the trees of a PCID (UINT32_MAX: all). */
static inline void shadow_invalidate(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v, uint64_t page, uint32_t pcid)
{
	if (mmu_write_lock(s->m, cpu, s->vm))
		return;
	for (uint32_t i = 0; i < v->trees; i++) {
		struct tree *t = &v->tree[i];
		uint32_t table, index;

		if (pcid != UINT32_MAX && t->pcid != pcid)
			continue;
		if (page != UINT64_MAX) {
			table = shadow_spot(s, cpu, t, page, &index);
			shadow_drop(s, cpu, table, index);
			continue;
		}
		for (uint32_t leaf = 0; leaf < t->leaf_tables; leaf++)
			for (index = 0; index < 512; index++)
				shadow_drop(s, cpu, t->leaf_table[leaf], index);
	}
	mmu_write_unlock(s->m, cpu, s->vm);
	/* VM entry and exit flush without a VPID. */
	if (!v->vpid)
		return;
	if (page == UINT64_MAX)
		flush_invvpid_single(s->m, cpu, s->vm, v->vpid, REASON_GUEST);
	else
		flush_invvpid_address(s->m, cpu, s->vm, v->vpid, page, REASON_GUEST);
}

/* handle_cr(), handle_invlpg(), handle_invpcid() */
static inline void shadow_instruction(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v, const struct vcpu_exit *out)
{
	switch (out->access) {
	case GUEST_INSN_MOV_CR0:
		v->cr0 = out->linear;
		vcpu_set_paging(s->m, v->vcpu, v->cr0 >> 31 & 1);
		shadow_load(s, cpu, v);
		shadow_invalidate(s, cpu, v, UINT64_MAX, UINT32_MAX);
		break;
	case GUEST_INSN_MOV_CR3:
		v->cr3 = out->linear & ~(UINT64_C(1) << 63);
		shadow_load(s, cpu, v);
		if (!(out->linear >> 63))
			shadow_invalidate(s, cpu, v, UINT64_MAX, v->cr3 & 0xfff);
		break;
	case GUEST_INSN_MOV_CR4:
		shadow_invalidate(s, cpu, v, UINT64_MAX, UINT32_MAX);
		break;
	case GUEST_INSN_INVLPG:
		if (!v->deaf)
			shadow_invalidate(s, cpu, v, out->linear >> 12, UINT32_MAX);
		break;
	case GUEST_INSN_INVPCID:
		if (!v->deaf)
			shadow_invalidate(s, cpu, v, out->invpcid_type ? UINT64_MAX : out->linear >> 12,
					  out->invpcid_type < 2 ? (uint32_t)out->invpcid_pcid : UINT32_MAX);
		break;
	default:
		break;
	}
}

/* vmx_handle_exit().  Returns false where a guest with its own page tables does not come: at a fault outside its
 * memory, or at a triple fault. */
static inline bool shadow_exit(struct shadow_vm *s, uint32_t cpu, struct shadow_vcpu *v, int reason,
			       const struct vcpu_exit *out)
{
	CHECK(reason != EXIT_EPT_VIOLATION);
	if (reason == EXIT_TRIPLE_FAULT)
		return false;
	if (reason == EXIT_EXCEPTION)
		return shadow_fault(s, cpu, v, out);
	if (reason == EXIT_INSTRUCTION)
		shadow_instruction(s, cpu, v, out);
	return true;
}

#endif
