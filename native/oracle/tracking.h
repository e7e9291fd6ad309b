/* The promise of KVM to see each store of a guest to a table that it shadows (arch/x86/kvm/mmu/page_track.c). */
#ifndef FLUSHLAB_TRACKING_H
#define FLUSHLAB_TRACKING_H

#include "core/machine_types.h"
#include "vm/vm.h"

/* api */
/* Begin or end the promise that no store to a guest's page goes unseen.  KVM has write-protected the page's SPTEs and
 * flushed before it begins; it ends before an SPTE of the page becomes writable again (an unsynchronized table, or one
 * that is shadowed no longer).  A store that KVM does not see meanwhile is VIOLATION_MISSED_GUEST_WRITE.  0, or
 * MACHINE_NOMEM.  Under mmu_lock held for write. */
/* call: step promise; reads ept; writes custody; quiet */
int oracle_track_writes(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, int on);
/* end api */

/* Return whether the promise holds for a page. */
bool writes_tracked(const struct machine *m, uint32_t vm, uint64_t gfn);
void tracking_destroy(struct machine *m, struct vm *vm);

#endif
