/* Paging-structure caches (SDM vol. 3A 4.10.3, 3C 29.4.1): one store per level of the table that an entry
 * points to.  They share the contexts of the translations but have generations of their own, because INVLPG
 * drops all of a PCID's entries here but only one of its translations.  No entry is global: the G flag has a
 * meaning only where a page is mapped. */
#include "tlb/psc.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_context.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

enum { PSC_WAYS = FEW_WAYS };

int psc_create(struct tlb *t, const struct machine_config *config)
{
	for (uint32_t level = 0; level < PSC_LEVELS; level++) {
		struct store *s = &t->psc[level];

		if (store_create(s, t->heap, config->psc_entries, PSC_WAYS, true, sizeof(struct psc_entry),
				 t->psc_generation))
			return MACHINE_NOMEM;
	}
	return 0;
}

void psc_destroy(struct tlb *t)
{
	for (uint32_t level = 0; level < PSC_LEVELS; level++)
		store_destroy(&t->psc[level]);
}

static uint32_t context_of_kind(const struct tlb *t, uint32_t kind)
{
	return kind == KIND_GUEST_PHYSICAL ? t->physical : t->paged;
}

const struct psc_entry *psc_search(struct tlb *t, uint32_t kind, uint64_t page)
{
	uint32_t index = context_of_kind(t, kind);

#pragma GCC unroll 4
	for (uint32_t level = 1; level <= PSC_LEVELS; level++) {
		struct store *s = &t->psc[level - 1];
		uint32_t cell = psc_find(t, index, level, page);

		if (cell == NO_CELL)
			continue;
		if (s->ways)
			set_touch(s, &s->set[cell / FEW_WAYS], cell % FEW_WAYS);
		return psc_payload(s, cell);
	}
	return NULL;
}

int psc_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct psc_entry *entry)
{
	const struct psc_entry *found = psc_search(t, kind, page);

	if (!found)
		return 0;
	*entry = *found;
	return found->level;
}

void psc_insert(struct tlb *t, const struct psc_entry *entry)
{
	uint32_t index = context_of_kind(t, entry->kind), cell;
	struct store *s = &t->psc[entry->level - 1];
	uint64_t id = region_id(index, entry->level, entry->page);
	struct context *c = &t->contexts[index];
	struct psc_entry *payload;

	if (index == NO_CONTEXT)
		return;
	cell = store_claim(s, id, 9 * entry->level, true, false);
	if (cell == NO_CELL)
		return;
	if (s->key[cell])
		t->contexts[key_context(s->key[cell])].psc_slots[key_size(s->key[cell])]--;
	c->psc_slots[entry->level - 1]++;
	s->key[cell] = id << GENERATION_BITS | t->psc_generation[index];
	store_touch(s, cell);
	payload = psc_payload(s, cell);
	*payload = *entry;
	payload->page = key_page(s->key[cell]);
	payload->vpid = c->vpid;
	payload->pcid = c->pcid;
	payload->ep4ta = c->ep4ta;
	c->psc_filled = true;
	context_list(t, index);
}

void psc_drop_page(struct tlb *t, uint32_t index, uint64_t page)
{
	for (uint32_t level = 1; level <= PSC_LEVELS; level++) {
		uint32_t cell = psc_find(t, index, level, page);

		if (cell != NO_CELL)
			cell_mark_dead(&t->psc[level - 1], cell);
	}
}

void psc_drop_range(struct tlb *t, uint32_t index, uint64_t page, uint64_t pages)
{
	for (uint32_t level = 1; level <= PSC_LEVELS; level++) {
		struct store *s = &t->psc[level - 1];

		for (uint32_t cell = 0; cell < s->cell_count; cell++) {
			uint64_t key = s->key[cell], first;

			if (!key || key_context(key) != index || !cell_live(s, cell))
				continue;
			first = key_page(key);
			if (first < page + pages && page < first + (UINT64_C(1) << 9 * level))
				cell_mark_dead(s, cell);
		}
	}
}

uint32_t psc_dump(struct tlb *t, struct psc_entry *entries, uint32_t max)
{
	uint32_t n = 0;

	for (uint32_t level = 0; level < PSC_LEVELS; level++) {
		const struct store *s = &t->psc[level];

		for (uint32_t cell = 0; cell < s->cell_count; cell++) {
			if (!cell_live(s, cell))
				continue;
			if (n < max)
				entries[n] = *psc_payload(s, cell);
			n++;
		}
	}
	return n;
}
