/* Contexts: the tags of cached mappings, each a slot in a table with one generation for translations and one
 * for paging-structure-cache entries.  Dropping a context is one increment, however many entries it holds.
 *
 * Contexts that may hold live entries are on a list (for INVEPT and INVVPID of all), and those with a VPID in a
 * chain by VPID (for the rest), so that an invalidation visits only them.  When all slots are taken, the one
 * unused for longest is recycled, which drops its entries: a CPU may drop any entry at any time.
 */
#include "tlb/tlb_context.h"

#include <string.h>

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_account.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

/* Distance from the least recently used end within which a context without live entries is searched for. */
enum { RECYCLE_SEARCH = 64 };

/* contexts[0] stands for no tag and anchors the ring of least recent use. */
void contexts_init(struct tlb *t)
{
	for (uint32_t i = 0; i < CONTEXTS; i++) {
		t->generation[i] = t->psc_generation[i] = 1;
		t->contexts[i].birth = 1;
	}
	t->used = 1;
}

static void lru_remove(struct tlb *t, uint32_t index)
{
	struct context *c = &t->contexts[index];

	t->contexts[c->lru_prev].lru_next = c->lru_next;
	t->contexts[c->lru_next].lru_prev = c->lru_prev;
}

static void lru_add(struct tlb *t, uint32_t index)
{
	struct context *c = &t->contexts[index];
	struct context *anchor = &t->contexts[NO_CONTEXT];

	c->lru_next = anchor->lru_next;
	c->lru_prev = NO_CONTEXT;
	t->contexts[anchor->lru_next].lru_prev = index;
	anchor->lru_next = index;
}

static uint32_t bucket_of(uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta)
{
	uint64_t x = ((uint64_t)ep4ta << 32 | vpid << 16 | pcid) + kind;

	return x * UINT64_C(0x9e3779b97f4a7c15) >> 52;
}

static uint32_t context_bucket(const struct context *c)
{
	return bucket_of(c->kind, c->vpid, c->pcid, c->ep4ta);
}

uint32_t context_find(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta)
{
	uint32_t index = t->hash[bucket_of(kind, vpid, pcid, ep4ta)];

	while (index != NO_CONTEXT) {
		const struct context *c = &t->contexts[index];

		if (c->kind == kind && c->vpid == vpid && c->pcid == pcid && c->ep4ta == ep4ta) {
			lru_remove(t, index);
			lru_add(t, index);
			return index;
		}
		index = c->hash_next;
	}
	return NO_CONTEXT;
}

void context_list_new(struct tlb *t, uint32_t index)
{
	struct context *c = &t->contexts[index];
	uint16_t *head = &t->vpid_chain[c->vpid % VPID_BUCKETS];

	c->listed = true;
	c->live_position = t->live_count;
	t->live[t->live_count++] = index;
	if (c->kind == KIND_GUEST_PHYSICAL)
		return;
	c->vpid_prev = NO_CONTEXT;
	c->vpid_next = *head;
	t->contexts[*head].vpid_prev = index;
	*head = index;
}

static void context_unlist(struct tlb *t, uint32_t index)
{
	struct context *c = &t->contexts[index];
	uint32_t last = t->live[--t->live_count];

	c->listed = false;
	t->live[c->live_position] = last;
	t->contexts[last].live_position = c->live_position;
	if (c->kind == KIND_GUEST_PHYSICAL)
		return;
	if (c->vpid_prev == NO_CONTEXT)
		t->vpid_chain[c->vpid % VPID_BUCKETS] = c->vpid_next;
	else
		t->contexts[c->vpid_prev].vpid_next = c->vpid_next;
	t->contexts[c->vpid_next].vpid_prev = c->vpid_prev;
}

/* Make every translation and ghost of a context unreachable, by a scan. */
static void purge(struct tlb *t, uint32_t index)
{
	store_purge(&t->l2, index);
	for (uint32_t cell = 0; cell < t->l2.cell_count; cell++) {
		uint64_t key = t->l2.key[cell];

		if (key && key_context(key) == index)
			slot_of(t, cell)->born = 0;
	}
	l1_clear(&t->l1);
}

/* End the generation of the translations.  After the last generation comes 1 again: then the cells that still
 * bear one of the 32767 old generations must be found and made dead. */
static void end_generation(struct tlb *t, uint32_t index)
{
	struct context *c = &t->contexts[index];

	c->flush[t->generation[index] % FLUSH_HISTORY] = t->flush;
	c->live = c->live_other = 0;
	c->filled = false;
	if (t->generation[index] == GENERATION_MAX) {
		purge(t, index);
		t->generation[index] = 0;
		c->birth = 1;
	}
	t->generation[index]++;
	t->l2.deaths++;
	if (index == t->serves)
		l1_retag(t);
}

static void end_psc_generation(struct tlb *t, uint32_t index)
{
	t->contexts[index].psc_filled = false;
	if (t->psc_generation[index] == GENERATION_MAX) {
		for (uint32_t level = 0; level < PSC_LEVELS; level++)
			store_purge(&t->psc[level], index);
		t->psc_generation[index] = 0;
	}
	t->psc_generation[index]++;
	for (uint32_t level = 0; level < PSC_LEVELS; level++)
		t->psc[level].deaths++;
}

void context_drop(struct tlb *t, uint32_t index, uint32_t what)
{
	struct context *c = &t->contexts[index];

	if (what & DROP_TRANSLATIONS && c->filled) {
		account_dropped(t, c->vm, c->live);
		account_dropped(t, UINT32_MAX, c->live_other);
		/* First-level copies of global translations bear the PCIDs that they were used with. */
		if (c->pcid == PCID_GLOBAL && t->l1.has_globals)
			l1_clear(&t->l1);
		end_generation(t, index);
	}
	if (what & DROP_PSC && c->psc_filled)
		end_psc_generation(t, index);
	if (c->listed && !c->filled && !c->psc_filled)
		context_unlist(t, index);
}

/* Choose the least recently used context, if possible one without live entries.  Never one of the current ones,
 * because those were used last. */
static uint32_t context_recycle(struct tlb *t)
{
	uint32_t oldest = t->contexts[NO_CONTEXT].lru_prev;
	uint32_t index = oldest;
	struct context *c;

	for (uint32_t i = 0; i < RECYCLE_SEARCH && t->contexts[index].listed; i++)
		index = t->contexts[index].lru_prev;
	if (t->contexts[index].listed)
		index = oldest;
	c = &t->contexts[index];
	if (c->pcid == PCID_GLOBAL && t->l1.has_globals)
		l1_clear(&t->l1);
	end_generation(t, index);
	end_psc_generation(t, index);
	if (c->listed)
		context_unlist(t, index);
	for (uint16_t *link = &t->hash[context_bucket(c)];; link = &t->contexts[*link].hash_next)
		if (*link == index) {
			*link = c->hash_next;
			break;
		}
	lru_remove(t, index);
	c->birth = t->generation[index];
	/* The next owner's ids may equal those of cells that this one leaves. */
	memset(t->absent, 0, sizeof(t->absent));
	return index;
}

uint32_t context_get(struct tlb *t, uint32_t kind, uint32_t vpid, uint32_t pcid, uint32_t ep4ta)
{
	uint32_t index = context_find(t, kind, vpid, pcid, ep4ta);
	struct context *c;
	uint16_t *head;

	if (index != NO_CONTEXT)
		return index;
	index = t->used < CONTEXTS ? t->used++ : context_recycle(t);
	c = &t->contexts[index];
	c->kind = kind;
	c->vpid = vpid;
	c->pcid = pcid;
	c->ep4ta = ep4ta;
	head = &t->hash[context_bucket(c)];
	c->hash_next = *head;
	*head = index;
	lru_add(t, index);
	return index;
}
