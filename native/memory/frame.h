/* Host memory: frames, their custody tags, and the pools they are recycled through.
 *
 * Frames are numbered consecutively: roots, tables, single guest frames, guest blocks of 512.  Frame 0 is never
 * handed out, so that a number left zero names no frame in use.  Pools are last-in first-out per kind, so that
 * a stale pointer soon meets a new owner.  Tables and guest pages never share a frame: a write through a stale
 * translation can corrupt guest memory, never the emulator's own tables.
 *
 * Two tags of 15 bits a frame:
 *   tag       advanced whenever a right on the frame changes: SPTE zapped or write-protected, a
 *             revocation completed, a guest invalidation, the frame freed.  A TLB entry holds the tag of
 *             its fill; if that is older than the frame's, the oracle is asked before the frame is used.
 *   host_tag  advanced when the host takes the frame away from its user: an mmu_notifier's promise
 *             completed, or the frame was freed.  This is the custody that a fault takes with the frame number,
 *             that the SPTE carries in spare bits, and the TLB entry after it (custody.h).
 *
 * Beside its host tag a frame has FRAME_HOST_READONLY: the host's own page table does not permit a write (mprotect, or
 * copy-on-write to come).  KVM may then grant reading only, whatever the custody.
 */
#ifndef FLUSHLAB_FRAME_H
#define FLUSHLAB_FRAME_H

#include "core/machine_types.h"

/* api */
/* calls: anything */
/* Levels of page tables, as KVM counts them. */
enum pg_level { PG_LEVEL_4K = 1, PG_LEVEL_2M = 2, PG_LEVEL_1G = 3, PG_LEVEL_512G = 4 };

enum frame_kind { FRAME_ROOT, FRAME_TABLE, FRAME_GUEST, FRAME_BLOCK, FRAME_KINDS };
/* CUSTODY_OF_BLOCK: a custody outside of an SPTE is that of a huge leaf. */
enum { FRAME_TAG_MASK = 0x7fff, CUSTODY_OF_BLOCK = 0x8000, BLOCK_FRAMES = 512 };

/* Allocate: the first frame number, or MACHINE_NOMEM.  Tables come zeroed; a block is 512 frames, aligned.
 * Guest frames hold poison until written. */
int64_t frame_alloc(struct machine *m, uint32_t cpu, uint32_t kind);
/* Free one frame (of a block too: the block returns to its pool when its last frame is freed).  Poisons
 * it and advances its tags.  Freeing twice is a bug of the caller that ends the process. */
void frame_free(struct machine *m, uint32_t cpu, uint32_t hfn);
/* call: aside */
uint32_t frame_tag_of(struct machine *m, uint32_t hfn);
/* call: anything */
uint32_t frame_host_tag_of(struct machine *m, uint32_t hfn);
/* Return how often tags of frames have gone round, from their last value to 0.  A translation that is exactly as many
 * changes of its frame old as a tag has values would be taken for a fresh one; without a round there is none. */
/* call: aside */
uint64_t frames_tag_rounds(struct machine *m);
/* Return how many times the frame was freed. */
uint32_t frame_life_of(struct machine *m, uint32_t hfn);
/* For FRAME_BLOCK these count blocks: a block counts as long as one of its frames is in use. */
uint32_t frames_in_use(struct machine *m, uint32_t kind);
uint32_t frames_total(struct machine *m, uint32_t kind);
/* While no CPU runs: restore a new machine's order of allocation, for all kinds of which no frame is in use.
 * Returns the number of frames in use. */
uint64_t frames_order(struct machine *m);
/* Read or write one 64-bit word of a frame, as a guest or user space does. */
uint64_t frame_read(struct machine *m, uint32_t hfn, uint32_t word);
void frame_write(struct machine *m, uint32_t hfn, uint32_t word, uint64_t value);
/* end api */

enum { FRAME_WORDS = 512, FRAMES_MAX = 1 << 24, FRAME_HOST_READONLY = 0x8000 };

/* The content of free memory.  As an SPTE or a guest's page-table entry it is not present, so that a walk that
 * strays into it ends. */
#define FRAME_POISON UINT64_C(0x6b6b6b6b6b6b6b68)

struct frame_pool {
	_Atomic uint32_t lock;
	uint32_t *stack; /* free frames (first frames, for blocks); the top is the last one freed */
	_Atomic uint32_t free;
	uint32_t total;
	uint32_t first; /* frame number */
};

struct block {
	_Atomic uint16_t used;  /* frames not yet freed */
	_Atomic uint16_t begun; /* the clock, once the taking under way is complete */
	_Atomic uint16_t clock;
};

struct frames {
	uint8_t *memory; /* 4096 bytes a frame */
	uint64_t memory_bytes;
	uint32_t count;
	_Atomic uint16_t *tag;
	_Atomic uint16_t *host_tag; /* with FRAME_HOST_READONLY */
	_Atomic uint16_t *host_tag_at_free; /* host_tag right after the last free: if younger than an entry's
					     * custody, the entry outlived the frame */
	_Atomic uint16_t *taken;         /* frames of blocks: the clock when the frame was last taken */
	_Atomic uint16_t *taken_at_free; /* frames of blocks: the clock when the frame was last freed */
	struct block *block;
	_Atomic uint32_t *life;          /* times freed */
	_Atomic uint64_t tag_rounds;     /* of all frames' tags and host tags */
	_Atomic uint8_t *used;           /* handed out now */
	_Atomic uint8_t *unlinked;       /* a table that no entry leads to any more, until it is allocated again */
	void *mapping;                   /* memory, before alignment; NULL: it belongs to the heap */
	uint64_t mapping_bytes;
	struct frame_pool pool[FRAME_KINDS];
};

static inline uint8_t *frame_memory(const struct frames *f, uint32_t hfn)
{
	return f->memory + ((uint64_t)hfn << 12);
}

static inline _Atomic uint64_t *frame_words(const struct frames *f, uint32_t hfn)
{
	return (_Atomic uint64_t *)(void *)frame_memory(f, hfn);
}

static inline uint32_t frame_tag(const struct frames *f, uint32_t hfn)
{
	return atomic_load_explicit(&f->tag[hfn], memory_order_relaxed);
}

/* The host tag and FRAME_HOST_READONLY. */
static inline uint32_t frame_host(const struct frames *f, uint32_t hfn)
{
	return atomic_load_explicit(&f->host_tag[hfn], memory_order_acquire);
}

static inline uint32_t frame_host_tag(const struct frames *f, uint32_t hfn)
{
	return frame_host(f, hfn) & FRAME_TAG_MASK;
}

static inline bool frame_host_readonly(const struct frames *f, uint32_t hfn)
{
	return frame_host(f, hfn) & FRAME_HOST_READONLY;
}

/* Relaxed: the lock under which the host's page table changes orders it for a fault that reads the table, and the SPTE
 * that the fault installs orders it for a walk. */
static inline void frame_host_permit(struct frames *f, uint32_t hfn, bool write)
{
	if (write)
		atomic_fetch_and_explicit(&f->host_tag[hfn], FRAME_TAG_MASK, memory_order_relaxed);
	else
		atomic_fetch_or_explicit(&f->host_tag[hfn], FRAME_HOST_READONLY, memory_order_relaxed);
}

/* Count a tag that has gone round.  Relaxed: a statistic. */
static inline void frame_tag_advanced(struct frames *f, uint16_t next)
{
	if (__builtin_expect(!next, 0))
		atomic_fetch_add_explicit(&f->tag_rounds, 1, memory_order_relaxed);
}

/* Advance the tag; returns the new one.  Release: earlier changes are seen by a CPU that acquires the frame's
 * ledger entry after noticing the tag.
 *
 * A loop, not an addition and a mask: a tag that has 16 bits for a moment could equal RIGHT_NONE.
 */
static inline uint32_t frame_tag_advance(struct frames *f, uint32_t hfn)
{
	uint16_t old = atomic_load_explicit(&f->tag[hfn], memory_order_relaxed);
	uint16_t next;

	do {
		next = (uint16_t)((old + 1u) & FRAME_TAG_MASK);
	} while (!atomic_compare_exchange_weak_explicit(&f->tag[hfn], &old, next, memory_order_release,
							memory_order_relaxed));
	frame_tag_advanced(f, next);
	return next;
}

/* Relaxed, both: the flag is only counted, and nothing depends on it. */
static inline void frame_set_unlinked(const struct frames *f, uint32_t hfn, bool unlinked)
{
	atomic_store_explicit(&f->unlinked[hfn], unlinked, memory_order_relaxed);
}

static inline bool frame_unlinked(const struct frames *f, uint32_t hfn)
{
	return atomic_load_explicit(&f->unlinked[hfn], memory_order_relaxed);
}

static inline enum frame_kind frame_kind_of(const struct frames *f, uint32_t hfn)
{
	if (hfn < f->pool[FRAME_TABLE].first)
		return FRAME_ROOT;
	if (hfn < f->pool[FRAME_GUEST].first)
		return FRAME_TABLE;
	return hfn < f->pool[FRAME_BLOCK].first ? FRAME_GUEST : FRAME_BLOCK;
}

static inline struct block *frame_block(const struct frames *f, uint32_t hfn)
{
	return &f->block[(hfn - f->pool[FRAME_BLOCK].first) / BLOCK_FRAMES];
}

static inline bool frame_in_block(const struct frames *f, uint32_t hfn)
{
	return frame_kind_of(f, hfn) == FRAME_BLOCK;
}

/* frame_free() without counters and events, for destroying a VM: no CPU executes it. */
void frame_release(struct frames *f, uint32_t hfn);
/* Fill or copy whole frames, word by word: a vCPU may store into either frame meanwhile. */
void frame_fill(struct frames *f, uint32_t hfn, uint64_t word);
void frame_copy(struct frames *f, uint32_t to, uint32_t from);

int frames_create(struct machine *m);
void frames_destroy(struct machine *m);

#endif
