/* Accesses of a guest program to its APIC: GUEST_OP_APIC.
 *
 * The program says which of its accesses are to the APIC of its processor; the hardware decides by the translation
 * (walk/apic.h).  If the two differ, the oracle reports VIOLATION_APIC_STALE, and the program goes on as it meant:
 * an access to the APIC exits, and any other reaches memory.
 */
#ifndef FLUSHLAB_GUEST_APIC_H
#define FLUSHLAB_GUEST_APIC_H

#include "walk/walk.h"

/* Do the access of one record.  is_apic: the guest means its APIC; WALK_EXIT with EXIT_APIC_ACCESS then leaves the
 * access to KVM. */
enum walk_result apic_access(struct walk *w, uint64_t record, bool is_apic);
/* The guest accesses its APIC through this translation of the page; returns WALK_EXIT with EXIT_APIC_ACCESS. */
enum walk_result apic_accessed(struct walk *w, uint64_t page, uint32_t type, const struct tlb_entry *e);

#endif
