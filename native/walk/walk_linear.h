/* Two-dimensional walks. */
#ifndef FLUSHLAB_WALK_LINEAR_H
#define FLUSHLAB_WALK_LINEAR_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* Translate a linear page by a two-dimensional walk, and cache the result. */
enum walk_result walk_linear(struct walk *w, uint64_t page, uint32_t type, struct tlb_entry *out);

#endif
