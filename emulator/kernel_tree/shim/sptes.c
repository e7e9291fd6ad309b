/* A tree's accesses to SPTEs: the core's steps, the custody in their addresses, and the ordering points. */
#include "linux.h"
#include "machine_internal.h"

/* Bits of an SPTE that tell its page. */
#define PFN_MASK ((1ULL << (PAGE_SHIFT + HFN_BITS)) - PAGE_SIZE)

enum where { ELSEWHERE, IN_TABLE, IN_FREED_TABLE };

static enum where spte_at(const volatile void *p, unsigned int *hfn)
{
	u64 link;

	if (!shim_in_frames(p, hfn))
		return ELSEWHERE;
	if (!shim_table_lives(*hfn)) {
		/* Make the link of the frame's earlier life, so that the oracle reports it. */
		link = (u64)(core.frame_tag(core.machine, *hfn) - 1 & TAG_MASK) << HFN_BITS | *hfn;
		core.table_holds(core.machine, here->api.id, here->api.vm, link << PAGE_SHIFT | RWX, here->at.level,
				 here->at.gfn);
		return IN_FREED_TABLE;
	}
	here->at = glue_place(shim_table_sp(*hfn), (unsigned int)((unsigned long)p & ~PAGE_MASK) / 8);
	here->last = p;
	return IN_TABLE;
}

bool spte_is_leaf(u64 spte, unsigned int level)
{
	return (spte & RWX) && (level == 1 || spte & LEAF);
}

static bool is_link(u64 spte, unsigned int level)
{
	return (spte & RWX) && level > 1 && !(spte & LEAF);
}

/* Return for how many SPTEs the one that was read counts: a whole chunk if the operation looks for such an SPTE. */
static unsigned int time_of(u64 spte)
{
	bool sought = here->operation == OPERATION_SPLIT ? spte_is_leaf(spte, here->at.level) :
							    here->operation == OPERATION_RECOVER &&
							    is_link(spte, here->at.level);

	return sought && here->at.level == 2 && here->api.chunk ? here->api.chunk : 1;
}

/* Begin the step of an access to an SPTE, before anything is read. */
static void tell(const volatile void *p, bool write, u64 value)
{
	unsigned int hfn;

	if (!shim_explored())
		return;
	if (!shim_in_frames(p, &hfn))
		shim_shared(p, write);
	else if (shim_table_lives(hfn))
		shim_spte_step(p, hfn, write, value);
	else
		shim_tell(CALL_TABLE, hfn, 0);
}

void shim_reads(const volatile void *p)
{
	unsigned int hfn, before;

	tell(p, false, 0);
	if (spte_at(p, &hfn) != IN_TABLE)
		return;
	if (!here->api.rcu_depth && here->api.lock != SHIM_WRITE)
		shim_finding(FINDING_LOCKDEP, "tdp_mmu.c", 0, NULL, "an SPTE is read outside of RCU and of mmu_lock for write");
	here->flushed_last = false;
	here->last_value = *(const volatile u64 *)p;
	before = here->looked;
	here->looked += time_of(here->last_value);
	if (!before || before / here->api.chunk != here->looked / here->api.chunk)
		shim_point(POINT_SPTES, here->operation != OPERATION_FAULT);
}

/* Return the SPTE of a huge leaf that replaces a table of 4K leafs (recover_huge_pages_range()), with the custody of
 * its block of frames. */
static u64 recovered(u64 link, u64 leaf)
{
	const u64 *table = (const u64 *)(core.memory + ((link >> PAGE_SHIFT & HFN_MASK) << PAGE_SHIFT));
	const u64 custody_mask = (u64)TAG_MASK << (PAGE_SHIFT + HFN_BITS);
	u64 hva = here->api.slot_hva + here->at.gfn - here->api.slot_base;
	int custody;

	shim_tell(CALL_RECOVER, 0, 0);
	for (unsigned int i = 0; i < 512; i++) {
		u64 child = __atomic_load_n(&table[i], __ATOMIC_ACQUIRE);

		if (!spte_is_leaf(child, 1))
			continue;
		custody = core.huge_custody(core.machine, here->api.vm, hva + i, child >> PAGE_SHIFT & HFN_MASK,
					    child >> (PAGE_SHIFT + HFN_BITS) & TAG_MASK);
		if (custody >= 0)
			return (leaf & ~custody_mask) | (u64)custody << (PAGE_SHIFT + HFN_BITS);
		break;
	}
	return leaf;
}

static u64 with_custody(u64 old, u64 value)
{
	if (here->operation == OPERATION_RECOVER && is_link(old, here->at.level) && spte_is_leaf(value, here->at.level))
		return recovered(old, value);
	if (here->at.level > 1 && spte_is_leaf(old, here->at.level) && is_link(value, here->at.level))
		core.split_custody(core.machine, value >> PAGE_SHIFT & HFN_MASK, old, here->at.level);
	return value;
}

/* Note as a step the right that a change of an SPTE takes away, or grants. */
static void note(u64 old, u64 value)
{
	u64 npages = 1ULL << 9 * (here->at.level - 1);
	bool link = is_link(old, here->at.level);

	if (spte_is_leaf(value, here->at.level) && (!(old & RWX) || (old ^ value) & PFN_MASK))
		shim_step(STEP_MAPPED, here->at.gfn, npages);
	if (!(old & RWX))
		return;
	if (!(value & RWX))
		here->unflushed++;
	if (link && !is_link(value, here->at.level))
		shim_step(STEP_UNLINKED, here->at.gfn, npages);
	else if (!link && !(value & RWX))
		shim_step(STEP_ZAPPED, here->at.gfn, npages);
	else if (!link && old & ~value & WRITABLE)
		shim_step(STEP_PROTECTED, here->at.gfn, npages);
}

enum { STEP_CMPXCHG, STEP_XCHG, STEP_STORE, STEP_FETCH_AND };

/* Change an SPTE; return false if p is none.  In a freed table change nothing, and set *old to a value that no caller
 * expects. */
static noinline bool change(volatile void *p, unsigned int step, u64 *old, u64 value)
{
	enum where where;
	unsigned int hfn;
	int r;

	tell(p, true, step == STEP_FETCH_AND ? *(const volatile u64 *)p & value : value);
	where = spte_at(p, &hfn);
	if (where == IN_FREED_TABLE)
		*old = ~*old & ~(u64)RWX;
	if (where != IN_TABLE)
		return where == IN_FREED_TABLE;
	/* The caller of the primitive that calls this function: both have frame pointers. */
	shim_log(p, sizeof(u64), true, true, __builtin_return_address(1));
	shim_point(POINT_SPTE, true);
	if (step != STEP_FETCH_AND)
		value = with_custody(step == STEP_CMPXCHG ? *old : *(volatile u64 *)p, value);
	r = core.spte_change(core.machine, here->api.id, here->api.vm, hfn,
			     (unsigned int)((unsigned long)p & ~PAGE_MASK) / 8, here->at.level, here->at.gfn, step, old,
			     value);
	if (r && r != core.again)
		shim_give_up(r);
	here->last_value = *old;
	here->pfn_set = 0;
	if (!r && step == STEP_FETCH_AND)
		value &= *old;
	if (!r && *old != value) {
		here->api.changed++;
		note(*old, value);
	}
	return true;
}

bool shim_stores(volatile void *p, u64 value)
{
	u64 old = 0;

	return change(p, STEP_STORE, &old, value);
}

u64 shim_xchg(volatile void *p, u64 value)
{
	u64 old = 0;

	if (change(p, STEP_XCHG, &old, value))
		return old;
	return __atomic_exchange_n((volatile u64 *)p, value, __ATOMIC_SEQ_CST);
}

u64 shim_cmpxchg(volatile void *p, u64 old, u64 value)
{
	if (!change(p, STEP_CMPXCHG, &old, value))
		__atomic_compare_exchange_n((volatile u64 *)p, &old, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return old;
}

u64 shim_fetch_and(volatile void *p, u64 mask)
{
	u64 old = 0;

	if (change(p, STEP_FETCH_AND, &old, mask))
		return old;
	return __atomic_fetch_and((volatile u64 *)p, mask, __ATOMIC_SEQ_CST);
}
