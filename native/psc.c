/* Paging-structure caches (SDM vol. 3A 4.10.3, 3C 29.4.1): one store per level of the table that an entry
 * points to.  They share the contexts of the translations but have generations of their own, as INVLPG
 * drops all of a PCID's entries here and but one of its translations.  None is global: the G flag means
 * something only where a page is mapped.
 */
#include "tlb_internal.h"

enum { PSC_WAYS = 4 };

int psc_create(struct tlb *t, const struct machine_config *config)
{
	for (uint32_t level = 0; level < PSC_LEVELS; level++) {
		struct store *s = &t->psc[level];

		if (store_create(s, config->psc_entries, PSC_WAYS, sizeof(struct psc_entry),
				 t->psc_generation))
			return MACHINE_NOMEM;
		/* an entry for a table of level 1 covers 512 pages, and so on; the store's `size`
		 * is level - 1 */
		for (uint32_t i = 0; i < PSC_LEVELS; i++)
			s->shift[i] = 9 * (i + 1);
	}
	return 0;
}

void psc_destroy(struct tlb *t)
{
	for (uint32_t level = 0; level < PSC_LEVELS; level++)
		store_destroy(&t->psc[level]);
}

static uint64_t region_id(uint32_t index, uint32_t level, uint64_t page)
{
	uint32_t shift = 9 * level;

	return mapping_id(level - 1, (page & PAGE_NUMBER_MASK) >> shift << shift, index);
}

/* The live entry of that level which covers the page. */
static struct cell *psc_find(struct tlb *t, uint32_t index, uint32_t level, uint64_t page)
{
	struct store *s = &t->psc[level - 1];
	struct cell *cell;

	if (!t->contexts[index].psc_slots[level - 1])
		return NULL;
	cell = store_find(s, region_id(index, level, page));
	return cell && cell_live(s, cell) ? cell : NULL;
}

static uint32_t context_of_kind(const struct tlb *t, uint32_t kind)
{
	return kind == KIND_GUEST_PHYSICAL ? t->physical : t->paged;
}

int psc_lookup(struct tlb *t, uint32_t kind, uint64_t page, struct psc_entry *entry)
{
	uint32_t index = context_of_kind(t, kind);

	for (uint32_t level = 1; level <= PSC_LEVELS; level++) {
		struct cell *cell = psc_find(t, index, level, page);

		if (!cell)
			continue;
		cell->stamp = ++t->psc[level - 1].clock;
		*entry = *(const struct psc_entry *)cell_payload(&t->psc[level - 1], cell);
		return level;
	}
	return 0;
}

void psc_insert(struct tlb *t, const struct psc_entry *entry)
{
	uint32_t index = context_of_kind(t, entry->kind);
	struct store *s = &t->psc[entry->level - 1];
	uint64_t id = region_id(index, entry->level, entry->page);
	struct psc_entry *payload;
	struct cell *cell;

	if (index == NO_CONTEXT)
		return;
	cell = store_claim(s, id);
	if (!cell)
		return;
	if (cell->key)
		t->contexts[key_context(cell->key)].psc_slots[key_size(cell->key)]--;
	t->contexts[index].psc_slots[entry->level - 1]++;
	cell->key = id << GENERATION_BITS | t->psc_generation[index];
	cell->stamp = ++s->clock;
	payload = cell_payload(s, cell);
	*payload = *entry;
	payload->page = key_page(cell->key);
	payload->vpid = t->contexts[index].vpid;
	payload->pcid = t->contexts[index].pcid;
	payload->ep4ta = t->contexts[index].ep4ta;
	t->contexts[index].psc_filled = true;
	context_list(t, index);
}

void psc_drop_page(struct tlb *t, uint32_t index, uint64_t page)
{
	for (uint32_t level = 1; level <= PSC_LEVELS; level++) {
		struct cell *cell = psc_find(t, index, level, page);

		if (cell)
			cell->key &= ~(uint64_t)GENERATION_MAX;
	}
}

uint32_t psc_dump(struct tlb *t, struct psc_entry *entries, uint32_t max)
{
	uint32_t n = 0;

	for (uint32_t level = 0; level < PSC_LEVELS; level++) {
		const struct store *s = &t->psc[level];

		for (uint32_t i = 0; i < s->cell_count; i++) {
			if (!cell_live(s, &s->cells[i]))
				continue;
			if (n < max)
				entries[n] = *(const struct psc_entry *)cell_payload(s, &s->cells[i]);
			n++;
		}
	}
	return n;
}
