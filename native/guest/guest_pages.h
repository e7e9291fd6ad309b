/* Allocation of guest-physical memory by a guest's OS. */
#ifndef FLUSHLAB_GUEST_PAGES_H
#define FLUSHLAB_GUEST_PAGES_H

#include "core/machine_types.h"

struct guest;

int guest_memory_create(struct machine *m, struct guest *g);
void guest_memory_destroy(struct machine *m, struct guest *g);
/* Mark all memory free again. */
void guest_memory_reset(struct guest *g);
/* Of the OS that runs on this vCPU. */
uint64_t guest_gfn_alloc(struct guest *g, bool mmio);
uint64_t guest_block_alloc(struct guest *g);
void guest_gfn_get(struct guest *g, uint64_t gfn);
void guest_gfn_put(struct guest *g, uint64_t gfn);

#endif
