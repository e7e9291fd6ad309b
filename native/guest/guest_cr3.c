/* See guest_cr3.h. */
#include "guest/guest_cr3.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "guest/guest_os.h"
#include "guest/guest_shadow.h"
#include "memory/frame.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

/* SDM vol. 3A, 4.4.1: the CPU reads all four PDPTEs at once, through EPT.  The PDPT has an alignment of 32 bytes. */
static enum walk_result load_pdptes(struct walk *w, uint64_t cr3)
{
	struct tlb_entry e;
	enum walk_result r = walk_physical(w, cr3 >> 12, ACCESS_READ, &e);
	uint32_t hfn, first = cr3 % 4096 / 32 * 4;

	if (r != WALK_DONE)
		return r;
	hfn = e.hfn + (uint32_t)((cr3 >> 12) - e.page);
	/* Relaxed: guest memory, which only the guest orders. */
	for (uint32_t i = 0; i < GUEST_PDPTES; i++)
		w->guest->pdpte[i] = atomic_load_explicit(guest_word(w->m, hfn, first + i), memory_order_relaxed);
	return r;
}

enum walk_result os_mov_cr3(struct walk *w)
{
	struct guest *g = w->guest;
	uint64_t cr3 = g->new_cr3 & ~CR3_NOFLUSH;
	enum walk_result r = g->tables == GUEST_TABLES_PAE ? load_pdptes(w, cr3) : WALK_DONE;

	if (r != WALK_DONE)
		return r;
	g->moves_to_cr3 = false;
	g->process[g->current].cr3_gfn = (cr3 & GPTE_ADDRESS) >> 12;
	os_load_cr3(w);
	count(w->cpu->counters, COUNT_GUEST_SWITCHES, 1);
	if (g->new_cr3 & CR3_NOFLUSH && g->config.pcid)
		return r;
	mov_to_cr3(w->tlb, g->pcid);
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	return r;
}
