/* Pages of which KVM has promised to see the stores: a bit per gfn.  See tracking.h. */
#include "oracle/tracking.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "oracle/ledger.h"
#include "sync/cpu.h"

/* Return the VM's bits, made at the first promise; NULL: memory is out. */
static _Atomic uint64_t *bits_made(struct machine *m, uint32_t vm)
{
	/* Relaxed: mmu_lock orders the makers. */
	_Atomic uint64_t *bits = atomic_load_explicit(&m->vms[vm].tracked, memory_order_relaxed);

	if (bits)
		return bits;
	bits = heap_zalloc(m->heap, m->vms[vm].gfns / 64 + 1, sizeof(*bits));
	/* Release: a reader of the pointer sees the zeros. */
	atomic_store_explicit(&m->vms[vm].tracked, bits, memory_order_release);
	return bits;
}

int oracle_track_writes(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, int on)
{
	uint64_t bit = UINT64_C(1) << gfn % 64;
	_Atomic uint64_t *bits;

	if (gfn >= m->vms[vm].gfns)
		return cpu_misuse(m, cpu, "tracking of stores beyond guest memory (gfn 0x%llx)",
				  (unsigned long long)gfn);
	bits = bits_made(m, vm);
	if (!bits)
		return MACHINE_NOMEM;
	if (!on) {
		/* Relaxed: an SPTE that becomes writable is published later, by a release. */
		atomic_fetch_and_explicit(&bits[gfn / 64], ~bit, memory_order_relaxed);
		return 0;
	}
	/* Relaxed: the tag that is advanced next announces it, by a release. */
	atomic_fetch_or_explicit(&bits[gfn / 64], bit, memory_order_relaxed);
	ledger_announce(m, vm, gfn);
	return 0;
}

bool writes_tracked_in(const struct vm *vm, const _Atomic uint64_t *bits, uint64_t gfn)
{
	return gfn < vm->gfns &&
	       atomic_load_explicit(&bits[gfn / 64], memory_order_relaxed) >> gfn % 64 & 1;
}

void tracking_destroy(struct machine *m, struct vm *vm)
{
	heap_free(m->heap, atomic_load_explicit(&vm->tracked, memory_order_relaxed));
	atomic_store_explicit(&vm->tracked, NULL, memory_order_relaxed);
}
