/* See guest_ept12.h. */
#include "guest/guest_ept12.h"

#include <string.h>

#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/guest_fault.h"
#include "guest/guest_shadow.h"
#include "guest/program.h"
#include "oracle/ledger.h"
#include "tlb/tlb.h"
#include "vm/ept12.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

/* SDM vol. 3C, 29.3.2: entries of EPT. */
#define EPT12_READABLE UINT64_C(1)
#define EPT12_ENTRY_WRITABLE UINT64_C(2)
#define EPT12_EXECUTABLE UINT64_C(4)
#define EPT12_WB UINT64_C(0x30)
#define EPT12_PAGE UINT64_C(0x80) /* of level 2: the entry maps 2 MiB */
#define EPT12_FLAGS (EPT12_ACCESSED | EPT12_DIRTY)
#define EPT12_RWX (EPT12_READABLE | EPT12_ENTRY_WRITABLE | EPT12_EXECUTABLE)
/* 25.6.11: EPTP. */
#define EPTP_WB UINT64_C(6)
#define EPTP_LEVELS_4 UINT64_C(0x18)
#define EPTP_AD UINT64_C(0x40)

enum { EPT12_LEVELS = 4, CHANGES_AT_FIRST = 16 };

/* An entry to write. */
struct wanted {
	uint32_t number;
	uint64_t page;
	uint32_t kind;  /* GUEST_OP_EPT12_* */
	uint64_t gfn;
	bool writable;
	bool dirty;     /* GUEST_OP_EPT12_CLEAN of the dirty flag alone */
	uint32_t level; /* of the entry to write */
};

static struct ept12s *ept12s_made(struct walk *w)
{
	struct guest_vmx *vmx = &w->guest->vmx;

	if (vmx->ept12s)
		return vmx->ept12s;
	vmx->ept12s = heap_zalloc(w->m->heap, 1, sizeof(*vmx->ept12s));
	if (!vmx->ept12s)
		return NULL;
	vmx->ept12s->violation = GUEST_NO_GFN;
	for (uint32_t i = 0; i <= EPT12S; i++)
		vmx->ept12s->ept[i].root_gfn = GUEST_NO_GFN;
	return vmx->ept12s;
}

void ept12s_destroy(struct machine *m, struct guest *l1)
{
	struct ept12s *s = l1->vmx.nested ? NULL : l1->vmx.ept12s;

	for (uint32_t i = 0; s && i <= EPT12S; i++)
		heap_free(m->heap, s->ept[i].mapping);
	if (s)
		heap_free(m->heap, s->change);
	heap_free(m->heap, s);
	l1->vmx.ept12s = NULL;
}

/* --- tables ------------------------------------------------------------------------------------------------- */

static enum walk_result reach(struct walk *w, uint64_t table, uint32_t index, uint32_t type, _Atomic uint64_t **word)
{
	struct tlb_entry e;
	enum walk_result r;

	w->linear = os_linear(w->guest, table) << 12 | index * sizeof(uint64_t);
	r = walk_physical(w, table, type, &e);
	if (r == WALK_EXIT)
		w->exit->gpa |= index * sizeof(uint64_t);
	if (r == WALK_DONE)
		*word = guest_word(w->m, e.hfn + (uint32_t)(table - e.page), index);
	return r;
}

/* Relaxed here and below: these are accesses to guest memory, which the guest alone has to order. */
static enum walk_result read_entry(struct walk *w, uint64_t table, uint32_t index, uint64_t *value)
{
	_Atomic uint64_t *word;
	enum walk_result r = reach(w, table, index, ACCESS_READ, &word);

	if (r == WALK_DONE)
		*value = atomic_load_explicit(word, memory_order_relaxed);
	return r;
}

/* Write an entry, unless it has the value already, but for these bits: then KVM has emulated the store. */
static enum walk_result write_entry(struct walk *w, uint64_t table, uint32_t index, uint64_t value, uint64_t but)
{
	_Atomic uint64_t *word;
	uint64_t old;
	enum walk_result r = read_entry(w, table, index, &old);

	w->guest->store.done = false;
	if (r != WALK_DONE || (old & ~but) == (value & ~but))
		return r;
	r = reach(w, table, index, ACCESS_WRITE, &word);
	if (r == WALK_EXIT)
		guest_store_faulted(w, value);
	if (r == WALK_DONE)
		atomic_store_explicit(word, value, memory_order_relaxed);
	return r;
}

enum walk_result ept12_root(struct walk *w, uint32_t number)
{
	struct ept12s *s = ept12s_made(w);
	enum walk_result r;
	uint64_t gfn;

	if (!s)
		return WALK_GUEST_FAULT;
	if (s->ept[number].root_gfn != GUEST_NO_GFN)
		return WALK_DONE;
	r = os_spare_table(w, &gfn);
	if (r != WALK_DONE)
		return r;
	s->ept[number].root_gfn = gfn;
	os_table_linked(w->guest, gfn);
	return WALK_DONE;
}

uint64_t ept12_eptp(const struct guest *l1, uint32_t number, bool ad)
{
	if (!number)
		return 0;
	return l1->vmx.ept12s->ept[number].root_gfn << 12 | EPTP_WB | EPTP_LEVELS_4 | (ad ? EPTP_AD : 0);
}

/* Find the table of the entry to write.  WALK_GUEST_FAULT: it is missing, and `create` is not set.
 *
 * If one entry maps the page's 2 MiB, that is the entry to write: its level becomes 2. */
static enum walk_result find_table(struct walk *w, struct wanted *to, bool create, uint64_t *table)
{
	uint64_t value, next;
	enum walk_result r = ept12_root(w, to->number);

	if (r != WALK_DONE)
		return r;
	*table = w->guest->vmx.ept12s->ept[to->number].root_gfn;
	for (uint32_t level = EPT12_LEVELS; level > to->level; level--) {
		uint32_t index = to->page >> (level - 1) * 9 & 511;

		r = read_entry(w, *table, index, &value);
		if (r != WALK_DONE)
			return r;
		if (!(value & EPT12_RWX)) {
			if (!create)
				return WALK_GUEST_FAULT;
			r = os_spare_table(w, &next);
			if (r == WALK_DONE)
				r = write_entry(w, *table, index, next << 12 | EPT12_RWX, EPT12_FLAGS);
			if (r != WALK_DONE)
				return r;
			os_table_linked(w->guest, next);
			value = next << 12;
		}
		if (level == 2 && value & EPT12_PAGE) {
			to->level = 2;
			return WALK_DONE;
		}
		*table = (value & GPTE_ADDRESS) >> 12;
	}
	return WALK_DONE;
}

/* --- records ------------------------------------------------------------------------------------------------ */

static bool pending(const struct ept12s *s, const struct ept12_change *change)
{
	for (uint32_t i = 0; i < s->changes; i++)
		if (s->change[i].ept12 == change->ept12 && s->change[i].page == change->page &&
		    s->change[i].gfn == change->gfn)
			return true;
	return false;
}

static bool note(struct machine *m, struct ept12s *s, const struct ept12_change *change)
{
	struct ept12_change *more;

	if (pending(s, change))
		return true;
	if (s->changes == s->room) {
		s->room = s->room ? s->room * 2 : CHANGES_AT_FIRST;
		more = heap_zalloc(m->heap, s->room, sizeof(*more));
		if (!more)
			return false;
		if (s->changes)
			memcpy(more, s->change, s->changes * sizeof(*more));
		heap_free(m->heap, s->change);
		s->change = more;
	}
	s->change[s->changes++] = *change;
	return true;
}

/* Return how many pages the entry maps. */
static uint64_t pages_of(const struct wanted *to)
{
	return UINT64_C(1) << (to->level - 1) * 9;
}

static bool record_page(struct machine *m, struct ept12s *s, const struct wanted *to, uint64_t page)
{
	struct ept12 *ept = &s->ept[to->number];
	struct guest_mapping was = ept12_mapping(ept, page);
	struct ept12_change change = { .ept12 = to->number, .page = page, .gfn = was.gfn };

	if (was.gfn != (uint32_t)GUEST_NO_GFN && !note(m, s, &change))
		return false;
	if (to->kind == GUEST_OP_EPT12_PROTECT)
		ept->mapping[page] &= ~EPT12_WRITABLE;
	else if (to->kind != GUEST_OP_EPT12_CLEAN)
		ept->mapping[page] = to->kind == GUEST_OP_EPT12_UNMAP ? 0 :
				     (to->gfn + (page & (pages_of(to) - 1))) | EPT12_MAPPED |
				     (to->writable ? EPT12_WRITABLE : 0);
	return true;
}

static bool record(struct walk *w, const struct wanted *to)
{
	uint64_t page = to->page & ~(pages_of(to) - 1), end = page + pages_of(to);
	struct ept12 *ept = &w->guest->vmx.ept12s->ept[to->number];

	if (!ept->mapping) {
		ept->pages = w->m->vms[w->vcpu->vm].gfns;
		ept->mapping = heap_zalloc(w->m->heap, ept->pages, sizeof(*ept->mapping));
	}
	if (!ept->mapping || to->page >= ept->pages)
		return false;
	for (; page < end && page < ept->pages; page++)
		if (!record_page(w->m, w->guest->vmx.ept12s, to, page))
			return false;
	return true;
}

/* --- operations --------------------------------------------------------------------------------------------- */

/* A page that is mapped with 2 MiB changes with all of these: L1 splits no such entry. */
static enum walk_result change(struct walk *w, struct wanted *to)
{
	bool map = to->kind == GUEST_OP_EPT12_MAP;
	uint32_t level = to->level;
	uint64_t table = GUEST_NO_GFN, value = 0;
	enum walk_result r = find_table(w, to, map, &table);

	if (r == WALK_GUEST_FAULT && !map)
		return WALK_DONE;
	if (r == WALK_DONE)
		r = read_entry(w, table, to->page >> (to->level - 1) * 9 & 511, &value);
	if (r != WALK_DONE)
		return r;
	if (map && level < to->level)
		return WALK_GUEST_FAULT;
	if (to->kind == GUEST_OP_EPT12_PROTECT)
		value &= ~EPT12_ENTRY_WRITABLE;
	else
		value = map ? to->gfn << 12 | EPT12_WB | EPT12_READABLE | EPT12_EXECUTABLE |
			      (to->writable ? EPT12_ENTRY_WRITABLE : 0) | (to->level > 1 ? EPT12_PAGE : 0) : 0;
	r = write_entry(w, table, to->page >> (to->level - 1) * 9 & 511, value, EPT12_FLAGS);
	if (r == WALK_DONE && !record(w, to))
		return WALK_GUEST_FAULT;
	return r;
}

static bool record_clean(struct walk *w, const struct wanted *to, const _Atomic uint64_t *word)
{
	struct ept12s *s = w->guest->vmx.ept12s;
	uint32_t i = 0;

	while (i < s->cleans && (s->cleaned[i].ept12 != to->number || s->cleaned[i].page != to->page))
		i++;
	if (i == EPT12_CLEANED)
		return false;
	s->cleaned[i] = (struct ept12_cleaned){ to->number, to->page, word };
	if (i == s->cleans)
		s->cleans++;
	return record(w, to);
}

/* Clear the flags of a page's entry of level 1. */
static enum walk_result clean(struct walk *w, struct wanted *to)
{
	uint32_t index = to->page & 511;
	uint64_t table = GUEST_NO_GFN, value = 0;
	_Atomic uint64_t *word = NULL;
	enum walk_result r = find_table(w, to, false, &table);

	if (r == WALK_DONE && to->level > 1)
		return WALK_GUEST_FAULT;
	if (r == WALK_DONE)
		r = read_entry(w, table, index, &value);
	if (r == WALK_DONE)
		r = write_entry(w, table, index, value & ~(to->dirty ? EPT12_DIRTY : EPT12_FLAGS), 0);
	if (r == WALK_DONE)
		r = reach(w, table, index, ACCESS_READ, &word);
	if (r == WALK_DONE && !record_clean(w, to, word))
		return WALK_GUEST_FAULT;
	return r;
}

enum walk_result ept12_op(struct walk *w, const struct guest_op *op)
{
	struct wanted to = {
		.number = op->flags >> 8,
		.page = op->linear >> 12 & GUEST_PAGE_MASK,
		.kind = op->kind,
		.gfn = op->value,
		.writable = !(op->flags & GUEST_OP_READ_ONLY),
		.dirty = (op->flags & GUEST_OP_DIRTY) != 0,
		.level = op->flags & GUEST_OP_HUGE ? 2 : 1,
	};

	return to.kind == GUEST_OP_EPT12_CLEAN ? clean(w, &to) : change(w, &to);
}

/* From here on the oracle judges each use of the former translations. */
void ept12_invalidated(struct machine *m, struct vcpu *vcpu, uint32_t number, uint64_t page)
{
	struct ept12s *s = vcpu->guests[0]->vmx.ept12s;
	uint32_t left = 0;

	for (uint32_t i = 0; s && i < s->changes; i++) {
		struct ept12_change *c = &s->change[i];

		if ((!number || c->ept12 == number) && (page == EPT12_ANY_PAGE || c->page == page))
			ledger_announce(m, vcpu->vm, c->gfn);
		else
			s->change[left++] = *c;
	}
	if (s)
		s->changes = left;
}

/* Mappings cached under the EPT of the last VM entry have another tag: the oracle judges a use of one. */
void ept12_entered(struct machine *m, struct vcpu *vcpu, uint32_t number)
{
	struct ept12s *s = vcpu->guests[0]->vmx.ept12s;
	const struct ept12 *last = s && s->entered != number ? &s->ept[s->entered] : NULL;

	for (uint64_t page = 0; last && last->mapping && page < last->pages; page++)
		if (last->mapping[page] & EPT12_MAPPED)
			ledger_announce(m, vcpu->vm, (uint32_t)last->mapping[page]);
	if (s)
		s->entered = number;
}

/* --- exits to L1 -------------------------------------------------------------------------------------------- */

bool ept12_violation_pending(const struct guest *l1)
{
	/* In SMM L1 runs its SMI handler. */
	return !l1->smm && l1->vmx.ept12s && l1->vmx.ept12s->violation != GUEST_NO_GFN;
}

enum walk_result ept12_violation(struct walk *w)
{
	struct ept12s *s = w->guest->vmx.ept12s;
	struct guest *l2 = w->vcpu->guests[w->guest->vmx.current];
	struct wanted to = { .number = l2->vmx.ept12, .page = s->violation, .kind = GUEST_OP_EPT12_MAP,
			     .gfn = s->violation, .writable = true, .level = 1 };
	enum walk_result r = WALK_DONE;

	if (to.page >= l2->config.first_gfn && to.page < l2->config.end_gfn)
		r = change(w, &to);
	else
		l2->skip_gfn = to.page;
	if (r == WALK_DONE)
		s->violation = GUEST_NO_GFN;
	return r;
}
