/* The copies that live migration makes. */
#ifndef FLUSHLAB_MM_IMAGE_H
#define FLUSHLAB_MM_IMAGE_H

#include "core/machine_types.h"

/* api */
/* Make an image of the pages from hva `start` on, n of them; initially all zeros.  One image
 * per VM, used by one thread.  Images change under user space's lock; the steps that copy pages name the pages. */
/* call: aside */
int mm_image_create(struct machine *m, uint32_t vm, uint64_t start, uint64_t n);
void mm_image_destroy(struct machine *m, uint32_t vm);
/* Copy the pages set in a bitmap word (bit i: hva base + i), as user space reads them while vCPUs run.  Returns
 * pages copied, or MACHINE_NOMEM. */
/* call: modelled */
int64_t mm_image_copy(struct machine *m, uint32_t vm, uint64_t base, uint64_t mask);
/* Copy every page of the image. */
/* call: modelled */
int64_t mm_image_copy_all(struct machine *m, uint32_t vm);
/* Return how many copies so far have found their page changed. */
/* call: aside */
uint64_t mm_image_changed(struct machine *m, uint32_t vm);
/* Return the first page (hva) from `from` on that differs from the image, or -1.  Only while no vCPU runs. */
/* call: step compare; reads contents(vm) */
int64_t mm_image_differs(struct machine *m, uint32_t vm, uint64_t from);
/* Return 1 if this page differs; *value: its first differing word, which, if a guest stored it, is the clock of
 * its vCPU then (guest.h). */
/* call: part; reads contents(vm) */
int mm_image_lost(struct machine *m, uint32_t vm, uint64_t hva, uint64_t *value);
/* Read one 64-bit word as user space does, without faulting the page in. */
/* call: anything */
uint64_t mm_read(struct machine *m, uint32_t vm, uint64_t hva, uint32_t word);
/* end api */

#endif
