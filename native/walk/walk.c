/* The custody check, and walks of the EPT.  See walk.h. */
#include "walk/walk.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/shadow_mmu.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "oracle/oracle.h"
#include "tlb/tlb.h"
#include "tlb/tlb_flush.h"
#include "tlb/tlb_report.h"
#include "vm/ept12.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/apic.h"
#include "walk/flush.h"
#include "walk/vmcs.h"
#include "walk/walk_steps.h"

bool walk_check_slow(struct walk *w, struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t level)
{
	struct judgement j;

	if (entry->right[type] == RIGHT_NONE)
		return false;
	count(w->cpu->counters, COUNT_ORACLE_SLOW, 1);
	oracle_judge(w->m, w->vcpu, w->life_bits >> 16, entry, page, type, &j);
	if (j.verdict == VERDICT_VIOLATION && w->speculative)
		return false;
	if (j.verdict == VERDICT_VIOLATION) {
		oracle_violation(w->m, w->cpu, w->vcpu, entry, page, type, level, w->linear, &j);
		/* A store that KVM has missed reaches its page all the same. */
		if (j.kinds != 1u << VIOLATION_MISSED_GUEST_WRITE) {
			tlb_drop(w->tlb, entry->kind, page);
			return false;
		}
	}
	if (j.verdict == VERDICT_LEGAL_STALE)
		count(w->cpu->counters, COUNT_LEGAL_STALE, 1);
	if (entry->nested != w->guest->vmx.nested) {
		/* The cached mapping stays as the other guest filled it, with that guest's rights. */
		entry_adopt(entry, w->guest->vmx.nested);
		entry->right[type] = j.right;
		return true;
	}
	entry->right[type] = j.right;
	tlb_update_right(w->tlb, entry->kind, page, type, j.right);
	return true;
}

/* Decide whether the ghost's use would have been a violation. */
static bool averted(struct walk *w, const struct tlb_entry *ghost, uint64_t page, uint32_t type)
{
	struct judgement j;

	if (apic_stale(w, ghost, page))
		return true;
	if (right_holds(w, ghost->right[type], ghost->hfn + (uint32_t)(page - ghost->page)))
		return false;
	oracle_judge(w->m, w->vcpu, w->life_bits >> 16, ghost, page, type, &j);
	return j.verdict == VERDICT_VIOLATION;
}

void walk_ghost(struct walk *w, const struct tlb_entry *ghost, uint64_t page, uint32_t type)
{
	uint64_t flush = tlb_ghost_flush(w->tlb);

	if (w->speculative || !flush || ghost->right[type] == RIGHT_NONE)
		return;
	count(w->cpu->counters, COUNT_REFILLS, 1);
	count(w->cpu->counters, COUNT_SHADOW_EPT_FILLS, w->m->config.hyperv && flush_is_of_ept(flush));
	if (averted(w, ghost, page, type)) {
		count(w->cpu->counters, COUNT_AVERTED, 1);
		flush_averted(w->m, w->cpu, flush);
	}
	/* The access may be retried after an exit; that must not count the refill twice. */
	tlb_ghost_forget(w->tlb);
}

static enum walk_result violate(struct walk *w, uint64_t gfn, uint32_t type, uint64_t spte)
{
	if (w->speculative)
		return WALK_EXIT;
	if (w->guest->skip_gfn == gfn) {
		w->guest->skip_gfn = GUEST_NO_GFN;
		return WALK_SKIPPED;
	}
	w->guest->last_violation = gfn;
	w->guest->store.faulted = false;
	w->exit->reason = EXIT_EPT_VIOLATION;
	w->exit->gpa = gfn << 12;
	w->exit->linear = w->linear;
	w->exit->access = type;
	w->exit->rights = spte_present(spte) ? spte & SPTE_RWX : 0;
	ept_violation_invalidate(w->tlb, gfn, w->linear >> 12 & GUEST_PAGE_MASK, w->guest->config.paging);
	return WALK_EXIT;
}

/* Return the gfn of L1's that a leaf maps for a guest-physical page. */
static uint64_t gfn_of_leaf(const struct walk *w, uint64_t page, uint32_t table, uint32_t level)
{
	const _Atomic uint64_t *gfns = w->vmcs->nested_ept ? shadowed_gfns(w->m, table) : NULL;

	/* Relaxed: between two acquire loads of the SPTE (shadow_mmu.c). */
	return gfns ? atomic_load_explicit(&gfns[page >> (level - 1) * 9 & 511], memory_order_relaxed) : page;
}

/* Fill a guest-physical mapping from a leaf.  page, gfn: the first ones that the leaf maps. */
static void fill(struct walk *w, uint64_t spte, uint32_t level, uint64_t page, uint64_t gfn, uint32_t right,
		 struct tlb_entry *out)
{
	*out = (struct tlb_entry){
		.page = page,
		.gfn = gfn,
		.ept12_delta = (int32_t)(page - gfn),
		.hfn = spte_hfn(spte),
		.kind = KIND_GUEST_PHYSICAL,
		.size = (uint8_t)(level - 1),
		.ep4ta = w->vmcs->root,
		.vm = w->vcpu->vm,
		.vcpu = w->vcpu->id,
		.clock = w->guest->clock,
		.custody = (uint16_t)spte_leaf_custody(spte, level),
		.nested = w->guest->vmx.nested,
		.apic_page = w->vmcs->apic_page,
	};
	walk_rights(spte, right, out->right);
}

/* doubt() for L1's EPT: it forbids the mapping, or its writes. */
static void doubt_nested(const struct walk *w, uint64_t page, struct tlb_entry *e)
{
	if (ept12_agreement(w->vcpu, e, page, ACCESS_READ) != GUEST_AGREES) {
		entry_leave_all_unjudged(e);
		return;
	}
	if (e->right[ACCESS_WRITE] != RIGHT_NONE &&
	    (writes_doubtful(w, e, page) ||
	     ept12_agreement(w->vcpu, e, page, ACCESS_WRITE) != GUEST_AGREES))
		entry_leave_unjudged(e, ACCESS_WRITE);
}

/* Return whether the custody of a leaf holds, and nothing is in the way of the rights that it grants. */
static inline bool certain(const struct walk *w, uint64_t gfn, uint64_t spte, uint32_t level)
{
	return level == PG_LEVEL_4K && walk_leaf_permitted(w->m->frames, spte) && !w->vmcs->nested_ept &&
	       !writes_tracked(w->vm, gfn);
}

/* Let the oracle judge the first use if L1's EPT forbids the mapping, or if a write is doubtful: a fill takes the
 * frame's present tag, which vouches for the SPTE only. */
static __attribute__((noinline)) void doubt(const struct walk *w, uint64_t page, struct tlb_entry *e)
{
	if (w->vmcs->nested_ept)
		doubt_nested(w, page, e);
	else if (e->right[ACCESS_WRITE] != RIGHT_NONE && writes_doubtful(w, e, page))
		entry_leave_unjudged(e, ACCESS_WRITE);
}

static enum walk_result ept_walk(struct walk *w, uint64_t gfn, uint32_t type, struct tlb_entry *out)
{
	uint32_t table, custody, level = walk_start(w, KIND_GUEST_PHYSICAL, gfn, type, &table, &custody);

	if (!level)
		return WALK_EXIT;
	for (;;) {
		_Atomic uint64_t *slot = ept_table(w->m, table) + (gfn >> (level - 1) * 9 & 511);
		uint64_t spte = atomic_load_explicit(slot, memory_order_acquire), l1_gfn, first;
		uint32_t tag, hfn;
		bool doubtless;

		count(w->cpu->counters, COUNT_WALK_REFERENCES, 1);
		if (!walk_table_holds(w, table, custody)) {
			/* The table was freed during the walk, or linked although freed. */
			if (w->speculative)
				return WALK_EXIT;
			walk_report_table(w, KIND_GUEST_PHYSICAL, table, custody, gfn, level, type);
			ept_violation_invalidate(w->tlb, gfn, 0, 0);
			return violate(w, gfn, type, 0);
		}
		if (!spte_present(spte))
			return violate(w, gfn, type, spte);
		if (!spte_leaf(spte, level)) {
			level--;
			table = spte_hfn(spte);
			custody = spte_custody(spte);
			if (!walk_table_holds(w, table, custody)) {
				if (w->speculative)
					return WALK_EXIT;
				walk_report_table(w, KIND_GUEST_PHYSICAL, table, custody, gfn, level, type);
				return violate(w, gfn, type, 0);
			}
			walk_cache_table(w, KIND_GUEST_PHYSICAL, gfn, level, spte);
			continue;
		}
		if (!(spte & walk_access_bit(type)) || spte_hfn(spte) >= w->m->frames->count)
			return violate(w, gfn, type, spte);
		if (!walk_set_accessed(w->cpu->counters, slot, &spte, type))
			continue;
		/* The tag must be one that the frame had while the SPTE was there: read the tag first, then the
		 * SPTE again.  A CPU that clears the SPTE advances the tag afterwards (oracle.h). */
		first = gfn & ~((UINT64_C(1) << (level - 1) * 9) - 1);
		hfn = spte_hfn(spte) + (uint32_t)(gfn - first);
		l1_gfn = gfn_of_leaf(w, first, table, level);
		tag = (uint32_t)atomic_load_explicit(&w->m->frames->tag[hfn], memory_order_acquire);
		if (atomic_load_explicit(slot, memory_order_acquire) != spte)
			continue;
		doubtless = certain(w, gfn, spte, level);
		/* Void custody: no tag can stand for it, so the oracle decides. */
		if (!doubtless && !frame_custody_holds(w->m->frames, hfn, spte_leaf_custody(spte, level)))
			tag = RIGHT_UNJUDGED;
		fill(w, spte, level, first, l1_gfn, tag | w->life_bits, out);
		if (!doubtless)
			doubt(w, gfn, out);
		return WALK_DONE;
	}
}

enum walk_result walk_physical(struct walk *w, uint64_t gfn, uint32_t type, struct tlb_entry *out)
{
	enum walk_result r;
	int hit = tlb_lookup(w->tlb, KIND_GUEST_PHYSICAL, gfn, out);

	count(w->cpu->counters, COUNT_GPA_LOOKUPS, 1);
	if (hit == 1 && walk_check(w, out, gfn, type, 1))
		return WALK_DONE;
	if (hit == 1 && w->speculative && out->right[type] != RIGHT_NONE)
		return WALK_EXIT;
	count(w->cpu->counters, COUNT_GPA_MISSES, 1);
	if (hit == 2)
		walk_ghost(w, out, gfn, type);
	r = ept_walk(w, gfn, type, out);
	if (r != WALK_DONE)
		return r;
	tlb_insert(w->tlb, out, gfn);
	/* An SPTE installed with void custody is found here, at its first use. */
	if (!walk_check(w, out, gfn, type, 0))
		return WALK_SKIPPED;
	return WALK_DONE;
}
