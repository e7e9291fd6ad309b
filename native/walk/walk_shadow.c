/* Walks without EPT.  See walk_shadow.h.
 *
 * The processor knows nothing of the guest's own tables here: KVM derives the shadow tables from them, and whether a
 * translation agrees with them is for the oracle to say, at each fill.
 */
#include "walk/walk_shadow.h"

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
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk_steps.h"

/* A leaf as the walk has read it: the SPTE, the first gfn that it maps, and the tag of the frame accessed. */
struct leaf {
	uint64_t spte;
	uint64_t gfn;
	uint32_t level;
	uint32_t tag;
};

static enum walk_result page_fault(struct walk *w, uint64_t page, uint32_t type, uint32_t error_code, uint64_t spte)
{
	if (w->speculative)
		return WALK_EXIT;
	if (w->guest->skip_gfn == page) {
		w->guest->skip_gfn = GUEST_NO_GFN;
		return WALK_SKIPPED;
	}
	w->guest->last_violation = page;
	w->guest->store.faulted = false;
	w->exit->reason = EXIT_EXCEPTION;
	w->exit->gpa = 0;
	w->exit->linear = canonical_address(w->linear);
	w->exit->access = type;
	w->exit->rights = spte & SPTE_RWX;
	w->exit->error_code = error_code | (type == ACCESS_WRITE ? PFERR_WRITE : 0) |
			      (type == ACCESS_EXECUTE ? PFERR_FETCH : 0) | (w->supervisor ? 0 : PFERR_USER);
	page_fault_invalidate(w->tlb, page);
	return WALK_EXIT;
}

static enum walk_result report(struct walk *w, uint32_t table, uint32_t custody, uint64_t page, uint32_t level,
			       uint32_t type)
{
	if (w->speculative)
		return WALK_EXIT;
	walk_report_table(w, KIND_LINEAR, table, custody, page, level, type);
	return page_fault(w, page, type, 0, 0);
}

static bool is_mmio_spte(uint64_t spte)
{
	return !spte_present(spte) && spte >> SPTE_MMIO_BIT & 1;
}

static bool permits(const struct walk *w, uint64_t spte, uint32_t type)
{
	return spte & walk_access_bit(type) && (spte & SPTE_USER || w->supervisor);
}

/* Read the table's gfn and the frame's tag for a leaf.  They must be ones that belong to it: read them first, then the
 * SPTE again.  A CPU that clears the SPTE advances the tag afterwards (oracle.h). */
static bool read_leaf(const struct walk *w, const _Atomic uint64_t *slot, uint64_t page, uint32_t table,
		      struct leaf *leaf)
{
	const _Atomic uint64_t *gfns = shadowed_gfns(w->m, table);
	uint32_t index = page >> (leaf->level - 1) * 9 & 511;
	uint32_t hfn = spte_hfn(leaf->spte) + (uint32_t)(page & ((UINT64_C(1) << (leaf->level - 1) * 9) - 1));

	leaf->gfn = gfns ? atomic_load_explicit(&gfns[index], memory_order_relaxed) : GUEST_NO_GFN;
	leaf->tag = (uint32_t)atomic_load_explicit(&w->m->frames->tag[hfn], memory_order_acquire);
	if (atomic_load_explicit(slot, memory_order_acquire) != leaf->spte)
		return false;
	if (!frame_custody_holds(w->m->frames, hfn, spte_leaf_custody(leaf->spte, leaf->level)))
		leaf->tag = RIGHT_UNJUDGED;
	return true;
}

static void fill(const struct walk *w, uint64_t page, const struct leaf *leaf, struct tlb_entry *out)
{
	uint64_t pages = UINT64_C(1) << (leaf->level - 1) * 9, spte = leaf->spte;

	*out = (struct tlb_entry){
		.page = page & ~(pages - 1),
		.gfn = leaf->gfn,
		.hfn = spte_hfn(spte),
		.vpid = (uint16_t)w->vmcs->vpid,
		.pcid = (uint16_t)w->vmcs->pcid,
		.kind = KIND_LINEAR,
		.size = (uint8_t)(leaf->level - 1),
		.global = (spte & SPTE_GLOBAL) != 0,
		.supervisor = !(spte & SPTE_USER),
		.vm = w->vcpu->vm,
		.vcpu = w->vcpu->id,
		.clock = w->guest->clock,
		.custody = (uint16_t)spte_leaf_custody(spte, leaf->level),
		.nested = w->guest->vmx.nested,
		.apic_page = w->vmcs->apic_page,
	};
	walk_rights(spte, leaf->tag | w->life_bits, out->right);
}

/* A fill takes the frame's tag of now, which vouches for the SPTE only.  Let the oracle judge the first use if the
 * guest's tables say otherwise, or if a write is doubtful. */
static void doubt(const struct walk *w, uint64_t page, struct tlb_entry *e)
{
	if (guest_contradicts(w->vcpu, e, page, ACCESS_READ) != GUEST_AGREES) {
		entry_leave_all_unjudged(e);
		return;
	}
	if (e->right[ACCESS_WRITE] != RIGHT_NONE &&
	    (guest_contradicts(w->vcpu, e, page, ACCESS_WRITE) != GUEST_AGREES ||
	     writes_doubtful(w, e, page)))
		entry_leave_unjudged(e, ACCESS_WRITE);
}

static enum walk_result find(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out)
{
	uint32_t table, custody, level = walk_start(w, KIND_LINEAR, page, type, &table, &custody);

	if (!level)
		return WALK_EXIT;
	for (;;) {
		_Atomic uint64_t *slot = ept_table(w->m, table) + (page >> (level - 1) * 9 & 511);
		uint64_t spte = atomic_load_explicit(slot, memory_order_acquire);
		struct leaf leaf;

		count(w->cpu->counters, COUNT_WALK_REFERENCES, 1);
		/* The table was freed during the walk, or linked although freed. */
		if (!walk_table_holds(w, table, custody))
			return report(w, table, custody, page, level, type);
		if (is_mmio_spte(spte))
			return page_fault(w, page, type, PFERR_PRESENT | PFERR_RSVD, 0);
		if (!spte_present(spte))
			return page_fault(w, page, type, 0, 0);
		if (!spte_leaf(spte, level)) {
			level--;
			table = spte_hfn(spte);
			custody = spte_custody(spte);
			if (!walk_table_holds(w, table, custody))
				return report(w, table, custody, page, level, type);
			walk_cache_table(w, KIND_LINEAR, page, level, spte);
			continue;
		}
		if (!permits(w, spte, type) || spte_hfn(spte) >= w->m->frames->count)
			return page_fault(w, page, type, PFERR_PRESENT, spte);
		if (!walk_set_accessed(w->cpu->counters, slot, &spte, type))
			continue;
		leaf = (struct leaf){ .spte = spte, .level = level };
		if (!read_leaf(w, slot, page, table, &leaf))
			continue;
		fill(w, page, &leaf, out);
		return WALK_DONE;
	}
}

enum walk_result walk_shadow(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out)
{
	enum walk_result r = find(w, page, type, out);

	if (r != WALK_DONE)
		return r;
	doubt(w, page, out);
	tlb_insert(w->tlb, out, page);
	/* An SPTE that was wrong from the start is found here, at its first use. */
	return walk_check(w, out, page, type, 0) ? WALK_DONE : WALK_SKIPPED;
}

enum walk_result walk_shadow_cached(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out)
{
	int hit = tlb_lookup(w->tlb, KIND_LINEAR, page, out);

	count(w->cpu->counters, COUNT_GPA_LOOKUPS, 1);
	if (hit == 1 && walk_check(w, out, page, type, 0))
		return WALK_DONE;
	count(w->cpu->counters, COUNT_GPA_MISSES, 1);
	if (hit == 2)
		walk_ghost(w, out, page, type);
	return walk_shadow(w, page, type, out);
}
