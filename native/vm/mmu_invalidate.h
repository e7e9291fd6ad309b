/* KVM's side of the mmu_notifier protocol: a fault that races an invalidation must retry. */
#ifndef FLUSHLAB_MMU_INVALIDATE_H
#define FLUSHLAB_MMU_INVALIDATE_H

#include "core/machine_types.h"

/* api */
/* mmu_invalidate_seq, mmu_invalidate_in_progress and the merged range of a VM.  begin and end under
 * mmu_lock held for write; the reads pair with them (acquire/release). */
/* call: step mmu_invalidate_seq; reads mmu_invalidate_seq(vm); writes mmu_invalidate_in_progress(vm); keeps-gil */
void mmu_invalidate_begin(struct machine *m, uint32_t vm);
/* call: part; reads mmu_invalidate_seq(vm); writes mmu_invalidate_in_progress(vm); keeps-gil */
void mmu_invalidate_range_add(struct machine *m, uint32_t vm, uint64_t start, uint64_t end);
/* Return the number of invalidations in progress, under mmu_lock. */
/* call: step mmu_invalidate_seq; reads mmu_invalidate_seq(vm), mmu_invalidate_in_progress(vm); keeps-gil */
uint32_t mmu_invalidate_in_progress(struct machine *m, uint32_t vm);
/* After mmu_invalidate_begin, before its first range: 1 if an earlier invalidation is in progress and the merged range
 * reaches into [start, end). */
/* call: part; reads mmu_invalidate_seq(vm), mmu_invalidate_in_progress(vm); keeps-gil */
int mmu_invalidate_overlaps(struct machine *m, uint32_t vm, uint64_t start, uint64_t end);
/* Counts as a write of the sequence alone, which all that counts or changes the invalidations in progress read, too. */
/* call: step mmu_invalidate_seq; writes mmu_invalidate_seq(vm); keeps-gil */
void mmu_invalidate_end(struct machine *m, uint32_t vm);
/* call: step mmu_invalidate_seq; reads mmu_invalidate_seq(vm); keeps-gil */
uint64_t mmu_invalidate_seq(struct machine *m, uint32_t vm);
/* Age a VM that no CPU uses yet: as after so many invalidations. */
/* call: aside */
void mmu_invalidate_seq_init(struct machine *m, uint32_t vm, uint64_t seq);
/* mmu_invalidate_retry_gfn(): 1 if a fault that sampled `seq` must retry. */
/* call: step mmu_invalidate_seq; reads mmu_invalidate_in_progress(vm); reads mmu_invalidate_seq(vm) if not result;
 * reads invalidate_end(vm, seq, gfn) if result; quiet; keeps-gil */
int mmu_invalidate_retry_gfn(struct machine *m, uint32_t vm, uint64_t seq, uint64_t gfn);
/* Right after mmu_invalidate_retry_gfn() has returned 1, while no other thread runs: 1 if it would have done so also
 * before the last mmu_invalidate_end(), and also after the next one. */
/* call: part; reads mmu_invalidate_seq(vm), mmu_invalidate_in_progress(vm); keeps-gil */
int mmu_invalidate_retry_stays(struct machine *m, uint32_t vm, uint64_t seq, uint64_t gfn);
/* mmu_invalidate_retry_gfn() for gfns [start, end): 1 if one of them may have to retry. */
/* call: step mmu_invalidate_seq; reads mmu_invalidate_seq(vm), mmu_invalidate_in_progress(vm); keeps-gil */
int mmu_invalidate_retry_range(struct machine *m, uint32_t vm, uint64_t seq, uint64_t start, uint64_t end);
/* end api */

#endif
