/* Invalidation: exactly the entries that each operation must drop (SDM vol. 3A 4.10.4.1, 3C 29.4.3).
 *
 * Operations on a VPID act on linear and combined mappings, the latter for all EP4TAs, whether EPT is in use or
 * not (29.4.3.1).  Only INVEPT and EPT violations reach guest-physical mappings, and INVEPT never linear ones.
 * Paging-structure-cache entries go wherever "mappings" go.
 */
#include "tlb/tlb_flush.h"

#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "tlb/psc.h"
#include "tlb/tlb.h"
#include "tlb/tlb_address.h"
#include "tlb/tlb_context.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_store.h"
#include "tlb/tlb_types.h"

/* Selects the contexts of a VPID under every PCID. */
enum { ANY_PCID = 0x10000 };

static bool selects(const struct context *c, uint32_t pcid, bool globals)
{
	if (c->pcid == PCID_GLOBAL)
		return globals;
	return pcid == ANY_PCID || c->pcid == pcid;
}

/* Drop all mappings of a VPID and a PCID, or any PCID. */
static void drop_vpid(struct tlb *t, uint32_t vpid, uint32_t pcid, bool globals)
{
	uint32_t next;

	for (uint32_t i = t->vpid_chain[vpid % VPID_BUCKETS]; i != NO_CONTEXT; i = next) {
		const struct context *c = &t->contexts[i];

		next = c->vpid_next; /* context_drop may unlink it */
		if (c->vpid == vpid && selects(c, pcid, globals))
			context_drop(t, i, DROP_BOTH);
	}
}

/* Drop the mappings of a VPID that would translate a page. */
static void drop_address(struct tlb *t, uint32_t vpid, uint32_t pcid, bool globals, uint64_t page)
{
	page &= PAGE_NUMBER_MASK;
	for (uint32_t i = t->vpid_chain[vpid % VPID_BUCKETS]; i != NO_CONTEXT;
	     i = t->contexts[i].vpid_next) {
		const struct context *c = &t->contexts[i];

		if (c->vpid != vpid || !selects(c, pcid, globals))
			continue;
		context_drop_pieces(t, i, page);
		psc_drop_page(t, i, page);
	}
	l1_drop(&t->l1, page);
}

void invept_single(struct tlb *t, uint32_t ep4ta)
{
	for (uint32_t i = t->live_count; i-- > 0;) {
		const struct context *c = &t->contexts[t->live[i]];

		if (c->kind != KIND_LINEAR && c->ep4ta == ep4ta)
			context_drop(t, t->live[i], DROP_BOTH);
	}
}

void invept_global(struct tlb *t)
{
	for (uint32_t i = t->live_count; i-- > 0;)
		if (t->contexts[t->live[i]].kind != KIND_LINEAR)
			context_drop(t, t->live[i], DROP_BOTH);
}

void ept_flush_list(struct tlb *t, uint32_t ep4ta, uint64_t gpa_page, uint64_t pages)
{
	for (uint32_t i = t->live_count; i-- > 0;) {
		const struct context *c = &t->contexts[t->live[i]];

		if (c->kind == KIND_LINEAR || c->ep4ta != ep4ta)
			continue;
		if (c->kind == KIND_COMBINED) {
			context_drop(t, t->live[i], DROP_BOTH);
		} else {
			context_drop_range(t, t->live[i], gpa_page, pages);
			psc_drop_range(t, t->live[i], gpa_page, pages);
		}
	}
	l1_clear(&t->l1);
}

void invvpid_address(struct tlb *t, uint32_t vpid, uint64_t page)
{
	if (vpid)
		drop_address(t, vpid, ANY_PCID, true, page);
}

void invvpid_single(struct tlb *t, uint32_t vpid)
{
	if (vpid)
		drop_vpid(t, vpid, ANY_PCID, true);
}

void invvpid_all(struct tlb *t)
{
	for (uint32_t i = t->live_count; i-- > 0;) {
		const struct context *c = &t->contexts[t->live[i]];

		if (c->kind != KIND_GUEST_PHYSICAL && c->vpid)
			context_drop(t, t->live[i], DROP_BOTH);
	}
}

void invvpid_retain_globals(struct tlb *t, uint32_t vpid)
{
	if (vpid)
		drop_vpid(t, vpid, ANY_PCID, false);
}

/* Begin drops by the guest or by hardware: no flush of KVM's is responsible for them. */
static uint64_t native_begin(struct tlb *t)
{
	uint64_t flush = t->flush;

	t->flush = 0;
	return flush;
}

static void native_end(struct tlb *t, uint64_t flush)
{
	t->flush = flush;
}

static void native_drop_vpid(struct tlb *t, uint32_t vpid, uint32_t pcid, bool globals)
{
	uint64_t flush = native_begin(t);

	drop_vpid(t, vpid, pcid, globals);
	native_end(t, flush);
}

static void native_drop_address(struct tlb *t, uint32_t pcid, bool globals, uint64_t page)
{
	uint64_t flush = native_begin(t);

	drop_address(t, t->vpid, pcid, globals, page);
	native_end(t, flush);
}

void invlpg(struct tlb *t, uint64_t page)
{
	native_drop_address(t, t->pcid, true, page);
	/* all of the PCID's paging-structure caches, for any address */
	for (uint32_t i = t->vpid_chain[t->vpid % VPID_BUCKETS], next; i != NO_CONTEXT; i = next) {
		const struct context *c = &t->contexts[i];

		next = c->vpid_next;
		if (c->vpid == t->vpid && c->pcid == t->pcid)
			context_drop(t, i, DROP_PSC);
	}
}

void invpcid_address(struct tlb *t, uint32_t pcid, uint64_t page)
{
	native_drop_address(t, pcid, false, page);
}

void invpcid_single(struct tlb *t, uint32_t pcid)
{
	native_drop_vpid(t, t->vpid, pcid, false);
}

void invpcid_all(struct tlb *t)
{
	native_drop_vpid(t, t->vpid, ANY_PCID, true);
}

void invpcid_retain_globals(struct tlb *t)
{
	native_drop_vpid(t, t->vpid, ANY_PCID, false);
}

void mov_to_cr3(struct tlb *t, uint32_t pcid)
{
	native_drop_vpid(t, t->vpid, pcid, false);
}

void mov_to_cr_all(struct tlb *t)
{
	native_drop_vpid(t, t->vpid, ANY_PCID, true);
}

void mov_to_cr_pcid(struct tlb *t)
{
	native_drop_vpid(t, t->vpid, t->pcid, true);
}

void page_fault_invalidate(struct tlb *t, uint64_t page)
{
	native_drop_address(t, t->pcid, true, page);
}

void vm_transition_no_vpid(struct tlb *t)
{
	native_drop_vpid(t, 0, ANY_PCID, true);
}

/* Unlike INVLPG this names one linear address: pieces of its guest page elsewhere stay.  The global
 * translations that it would use are dropped, too, or the access would end in that violation for ever. */
void ept_violation_invalidate(struct tlb *t, uint64_t gpa_page, uint64_t linear_page, int linear_valid)
{
	uint64_t flush = native_begin(t);

	gpa_page &= PAGE_NUMBER_MASK;
	context_drop_page(t, t->physical, gpa_page);
	psc_drop_page(t, t->physical, gpa_page);
	l1_drop(&t->l1, gpa_page); /* filled while paging was off */
	if (linear_valid && t->kind == KIND_COMBINED) {
		linear_page &= PAGE_NUMBER_MASK;
		context_drop_page(t, t->paged, linear_page);
		context_drop_page(t, t->global, linear_page);
		psc_drop_page(t, t->paged, linear_page);
		l1_drop(&t->l1, linear_page);
	}
	native_end(t, flush);
}
