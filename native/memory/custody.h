/* The custody of frames: may an SPTE's user still use the frame?
 *
 * A huge SPTE has room for one custody, and stands for the 512 frames of a block, of which the host may take
 * some and leave others.  So each block has a clock, which advances whenever the host takes frames of it, and
 * each frame of a block remembers the clock at which it was last taken.  The custody of a huge leaf is the
 * clock's reading at its fault: it is void for the frames that were taken since, and valid for all others.
 */
#ifndef FLUSHLAB_CUSTODY_H
#define FLUSHLAB_CUSTODY_H

#include "core/machine_types.h"

/* api */
/* Return the clock of the frame's block: the custody of a huge leaf for a fault at this moment. */
/* call: anything */
uint32_t frame_block_custody(struct machine *m, uint32_t hfn);
/* end api */

/* One operation by which the host takes frames from their user.  All of its frames of a block are taken at one
 * time of the block's clock; a fault that reads the clock before the last of them is taken counts as earlier. */
struct taking {
	uint32_t block; /* number + 1; 0: none */
	uint16_t time;
};

/* Advance the frame's host tag; returns the new tag. */
uint32_t frame_take(struct frames *f, struct taking *t, uint32_t hfn);
void frame_taken(struct frames *f, struct taking *t);

/* Return whether the host has not taken the frame since that custody, CUSTODY_OF_BLOCK or not. */
bool frame_custody_holds(const struct frames *f, uint32_t hfn, uint32_t custody);
/* Convert this custody into one of the single frame; void if it is void. */
uint32_t frame_custody_of_one(const struct frames *f, uint32_t hfn, uint32_t custody);
/* Return the custody of a block at this moment, for a fault that holds this frame of it by its own custody:
 * void for the frame if that is void. */
uint32_t frame_custody_of_block(const struct frames *f, uint32_t hfn, uint32_t custody);
/* Return whether the custody is older than the last free of the frame. */
bool frame_freed_since(const struct frames *f, uint32_t hfn, uint32_t custody);

#endif
