/* The APIC-access page (SDM vol. 3C, 30.4): an access that a translation leads to its frame exits.
 *
 * A processor may find out at the fill whether a translation leads there, and cache that.  So software invalidates the
 * cached mappings when it sets "virtualize APIC accesses" or changes APIC_ACCESS_ADDR (SDM vol. 3C, 29.4.3.3 and 29.4.3.4:
 * guidelines for INVVPID and INVEPT).  Here every cached mapping holds the APIC-access page of its fill, and the access is
 * one to that page, or to none, until the mapping is dropped.  Guest-physical mappings hand it on to the combined ones that
 * are filled from them.
 */
#ifndef FLUSHLAB_APIC_H
#define FLUSHLAB_APIC_H

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

/* Return whether an access through this mapping is one to the APIC-access page, as it is cached. */
static inline bool apic_virtualized(const struct walk *w, const struct tlb_entry *e, uint64_t page)
{
	return w->vmcs->apic_page && e->hfn + (uint32_t)(page - e->page) == e->apic_page;
}

/* Return whether the mapping is cached for another APIC-access page, and an access through it goes wrong for that. */
static inline bool apic_stale(const struct walk *w, const struct tlb_entry *e, uint64_t page)
{
	uint32_t hfn = e->hfn + (uint32_t)(page - e->page), now = w->vmcs->apic_page;

	return now && e->apic_page != now && (hfn == now || hfn == e->apic_page);
}

#endif
