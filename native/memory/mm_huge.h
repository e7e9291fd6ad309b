/* Moving user memory: migration, and khugepaged's collapse of 4K pages into a huge one. */
#ifndef FLUSHLAB_MM_HUGE_H
#define FLUSHLAB_MM_HUGE_H

#include "core/machine_types.h"

/* api */
/* Migrate each present 4K page of the range to a new frame (huge pages stay).  Returns pages moved; fewer when
 * frames run out. */
/* call: step mm; writes mm(vm), guest_frames, custody, memory(vm) */
uint64_t mm_migrate(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end);
/* khugepaged: move the aligned 512 pages at hva into one 2M block, contents copied.  Absent pages are filled
 * in, but at least one must be present.  0, MACHINE_NOMEM (no block is free), or MACHINE_AGAIN (no page is
 * present, or pages differ in their protection). */
/* call: step mm; writes mm(vm), guest_frames, custody, memory(vm), block_frames */
int mm_collapse(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva);
/* Map the block by 4K pages again, with its frames unchanged. */
/* call: step mm; writes mm(vm), guest_frames, custody, memory(vm), block_frames */
int mm_split(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva);
/* Return 1 if the 2M range at hva is mapped huge. */
/* call: part; reads mm(vm); keeps-gil */
int mm_huge(struct machine *m, uint32_t vm, uint64_t hva);
/* host_pfn_mapping_level() for a fault that has the frame `hfn` for hva by custody `tag`: the custody of a huge
 * leaf, if hva is mapped huge and by that frame, else -1.  This is the moment at which the fault reads the
 * frame's neighbours; if its own custody is void, so is that of the leaf for this frame.
 *
 * Part of the step in which the fault tests whether to retry: mmu_lock is held for read, and no step that another
 * thread can take meanwhile changes the results of both calls. */
/* call: part; reads mm(vm), custody */
int32_t mm_huge_custody(struct machine *m, uint32_t vm, uint64_t hva, uint32_t hfn, uint32_t tag);
/* end api */

#endif
