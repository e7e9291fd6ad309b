/* The APIC-access page (SDM vol. 3C, 30.4): an access exits if its translation leads to this page's frame.
 *
 * A processor may find out at the fill whether a translation leads there, and cache that.  So software invalidates
 * the cached mappings when it sets "virtualize APIC accesses" or changes APIC_ACCESS_ADDR (SDM vol. 3C, 29.4.3.3 and
 * 29.4.3.4: guidelines for INVVPID and INVEPT).  Here every cached mapping holds the APIC-access page, or none, that
 * the VMCS had at the fill, and decides by that page until it is dropped.  A combined mapping takes the page from the
 * guest-physical mapping that it is filled from.
 */
#ifndef FLUSHLAB_APIC_H
#define FLUSHLAB_APIC_H

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

/* Return whether the mapping, as it is cached, makes an access through it one to the APIC-access page. */
static inline bool apic_virtualized(const struct walk *w, const struct tlb_entry *e, uint64_t page)
{
	return w->vmcs->apic_page && e->hfn + (uint32_t)(page - e->page) == e->apic_page;
}

/* Return whether an access through the mapping goes wrong because it is cached for another APIC-access page. */
static inline bool apic_stale(const struct walk *w, const struct tlb_entry *e, uint64_t page)
{
	uint32_t hfn = e->hfn + (uint32_t)(page - e->page), now = w->vmcs->apic_page;

	return now && e->apic_page != now && (hfn == now || hfn == e->apic_page);
}

#endif
