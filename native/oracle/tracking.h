/* The promise of KVM to see each store of a guest to a table that it shadows (arch/x86/kvm/mmu/page_track.c). */
#ifndef FLUSHLAB_TRACKING_H
#define FLUSHLAB_TRACKING_H

#include <stddef.h>

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

/* writes_tracked() for a VM with such promises, which `bits` records by gfn. */
bool writes_tracked_in(const struct vm *vm, const _Atomic uint64_t *bits, uint64_t gfn);

/* Return whether the promise holds for a page.  Each walk asks, and in a VM without shadow pages learns here that none
 * does. */
static inline bool writes_tracked(const struct vm *vm, uint64_t gfn)
{
	/* Acquire: pairs with the release of bits_made(). */
	const _Atomic uint64_t *bits = atomic_load_explicit(&vm->tracked, memory_order_acquire);

	return __builtin_expect(bits != NULL, 0) && writes_tracked_in(vm, bits, gfn);
}

void tracking_destroy(struct machine *m, struct vm *vm);

#endif
