/* The arena of host frames and its pools.  See frame.h. */
#define _GNU_SOURCE
#include "memory/frame.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "core/spin.h"
#include "memory/custody.h"

static const uint64_t FRAME_BYTES = 4096, ARENA_ALIGN = 2 << 20;

static uint32_t frames_of(uint32_t kind)
{
	return kind == FRAME_BLOCK ? BLOCK_FRAMES : 1;
}

/* Relaxed stores, and loads in frame_copy: the right to use the frame is established elsewhere (pool lock, SPTE
 * publication).  They are atomic because a guest that uses a stale translation, which this program exists to
 * find, stores into the frame at the same time. */
void frame_fill(struct frames *f, uint32_t hfn, uint64_t word)
{
	_Atomic uint64_t *words = frame_words(f, hfn);

	for (uint32_t i = 0; i < FRAME_WORDS; i++)
		atomic_store_explicit(&words[i], word, memory_order_relaxed);
}

void frame_copy(struct frames *f, uint32_t to, uint32_t from)
{
	_Atomic uint64_t *out = frame_words(f, to), *in = frame_words(f, from);

	for (uint32_t i = 0; i < FRAME_WORDS; i++)
		atomic_store_explicit(&out[i], atomic_load_explicit(&in[i], memory_order_relaxed),
				      memory_order_relaxed);
}

static int64_t pool_pop(struct frame_pool *p)
{
	int64_t hfn = MACHINE_NOMEM;
	uint32_t free;

	spin_lock(&p->lock);
	/* Relaxed: written under the lock only; atomic for frames_in_use. */
	free = atomic_load_explicit(&p->free, memory_order_relaxed);
	if (free) {
		hfn = p->stack[free - 1];
		atomic_store_explicit(&p->free, free - 1, memory_order_relaxed);
	}
	spin_unlock(&p->lock);
	return hfn;
}

static void pool_push(struct frame_pool *p, uint32_t hfn)
{
	uint32_t free;

	spin_lock(&p->lock);
	free = atomic_load_explicit(&p->free, memory_order_relaxed);
	p->stack[free] = hfn;
	atomic_store_explicit(&p->free, free + 1, memory_order_relaxed);
	spin_unlock(&p->lock);
}

int64_t frame_alloc(struct machine *m, uint32_t cpu, uint32_t kind)
{
	struct frames *f = m->frames;
	int64_t first;

	(void)cpu;
	if (kind >= FRAME_KINDS)
		return MACHINE_NOMEM;
	first = pool_pop(&f->pool[kind]);
	if (first < 0)
		return first;
	for (uint32_t hfn = (uint32_t)first; hfn < first + frames_of(kind); hfn++) {
		atomic_store_explicit(&f->used[hfn], 1, memory_order_relaxed);
		frame_set_unlinked(f, hfn, false);
		if (kind <= FRAME_TABLE)
			frame_fill(f, hfn, 0);
		else if (!atomic_load_explicit(&f->life[hfn], memory_order_relaxed))
			frame_fill(f, hfn, FRAME_POISON); /* in later lives, frame_release has done it */
	}
	if (kind == FRAME_BLOCK)
		atomic_store_explicit(&frame_block(f, (uint32_t)first)->used, BLOCK_FRAMES, memory_order_relaxed);
	return first;
}

/* Custody goes first, then the memory: a CPU that reads poison finds the frame freed.  The tag goes last
 * (oracle.h: the change that it announces must be visible before it). */
void frame_release(struct frames *f, uint32_t hfn)
{
	enum frame_kind kind = frame_kind_of(f, hfn);
	struct taking t = { 0 };
	uint32_t host_tag;

	if (!hfn || hfn >= f->count || !atomic_exchange_explicit(&f->used[hfn], 0, memory_order_relaxed)) {
		fprintf(stderr, "native: BUG: frame %u freed but not in use\n", hfn);
		abort();
	}
	host_tag = frame_take(f, &t, hfn);
	frame_host_permit(f, hfn, true);
	atomic_store_explicit(&f->host_tag_at_free[hfn], (uint16_t)host_tag, memory_order_relaxed);
	if (kind == FRAME_BLOCK)
		atomic_store_explicit(&f->taken_at_free[hfn], t.time, memory_order_relaxed);
	frame_taken(f, &t);
	atomic_fetch_add_explicit(&f->life[hfn], 1, memory_order_relaxed);
	frame_fill(f, hfn, FRAME_POISON);
	frame_tag_advance(f, hfn);
	if (kind != FRAME_BLOCK) {
		pool_push(&f->pool[kind], hfn);
		return;
	}
	/* Release: this frame's last stores are done when the block is handed out again; acquire: so are those
	 * that other CPUs made to its other frames. */
	if (atomic_fetch_sub_explicit(&frame_block(f, hfn)->used, 1, memory_order_acq_rel) == 1)
		pool_push(&f->pool[kind], hfn & ~(BLOCK_FRAMES - 1u));
}

void frame_free(struct machine *m, uint32_t cpu, uint32_t hfn)
{
	bool table = frame_kind_of(m->frames, hfn) <= FRAME_TABLE;

	/* Before it can have a new owner; otherwise the story of a violation would have the wrong order. */
	if (!table)
		event_record(m, cpu, EVENT_FREE, hfn, 1);
	frame_release(m->frames, hfn);
	count(m->cpus[cpu].counters, table ? COUNT_TABLES_FREED : COUNT_FRAMES_FREED, 1);
}

uint32_t frame_tag_of(struct machine *m, uint32_t hfn)
{
	return frame_tag(m->frames, hfn);
}

uint32_t frame_host_tag_of(struct machine *m, uint32_t hfn)
{
	return frame_host_tag(m->frames, hfn);
}

uint64_t frames_tag_rounds(struct machine *m)
{
	return atomic_load_explicit(&m->frames->tag_rounds, memory_order_relaxed);
}

uint32_t frame_life_of(struct machine *m, uint32_t hfn)
{
	return atomic_load_explicit(&m->frames->life[hfn], memory_order_relaxed);
}

uint64_t frame_read(struct machine *m, uint32_t hfn, uint32_t word)
{
	return atomic_load_explicit(&frame_words(m->frames, hfn)[word % FRAME_WORDS], memory_order_relaxed);
}

void frame_write(struct machine *m, uint32_t hfn, uint32_t word, uint64_t value)
{
	atomic_store_explicit(&frame_words(m->frames, hfn)[word % FRAME_WORDS], value, memory_order_relaxed);
}

uint32_t frames_in_use(struct machine *m, uint32_t kind)
{
	const struct frame_pool *p = &m->frames->pool[kind];

	return p->total - atomic_load_explicit(&p->free, memory_order_relaxed);
}

uint32_t frames_total(struct machine *m, uint32_t kind)
{
	return m->frames->pool[kind].total;
}

/* Lowest frame on top, so that a small machine touches little memory. */
static void pool_order(struct frame_pool *p, uint32_t kind)
{
	for (uint32_t i = 0; i < p->total; i++)
		p->stack[i] = p->first + (p->total - 1 - i) * frames_of(kind);
}

uint64_t frames_order(struct machine *m)
{
	uint64_t used = 0;

	for (uint32_t kind = 0; kind < FRAME_KINDS; kind++) {
		struct frame_pool *p = &m->frames->pool[kind];

		if (frames_in_use(m, kind))
			used += frames_in_use(m, kind);
		else
			pool_order(p, kind);
	}
	return used;
}

static bool pool_create(struct heap *heap, struct frame_pool *p, uint32_t kind, uint32_t first, uint32_t total)
{
	p->first = first;
	p->total = total;
	p->stack = heap_zalloc(heap, total + 1ul, sizeof(*p->stack));
	if (!p->stack)
		return false;
	pool_order(p, kind);
	atomic_init(&p->free, total);
	return true;
}

/* Reserve address space for all of it; memory is used only for touched pages.  Aligned to 2 MiB: the emulator's
 * own TLB misses less when the kernel gives it huge pages; a heap does without. */
static bool arena_create(struct heap *heap, struct frames *f)
{
	uintptr_t start;

	f->memory_bytes = f->count * FRAME_BYTES;
	if (heap) {
		f->memory = heap_zalloc(heap, f->count, FRAME_BYTES);
		return f->memory;
	}
	f->mapping_bytes = f->memory_bytes + ARENA_ALIGN;
	f->mapping = mmap(NULL, f->mapping_bytes, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (f->mapping == MAP_FAILED) {
		f->mapping = NULL;
		return false;
	}
	start = ((uintptr_t)f->mapping + ARENA_ALIGN - 1) & ~(ARENA_ALIGN - 1);
	f->memory = (uint8_t *)start;
	(void)madvise(f->memory, f->memory_bytes, MADV_HUGEPAGE); /* a kernel without huge pages refuses */
	return true;
}

static bool frames_allocate(struct heap *heap, struct frames *f, const uint32_t *total)
{
	uint32_t blocks = total[FRAME_BLOCK];
	uint64_t first = 1;

	for (uint32_t kind = 0; kind < FRAME_KINDS; kind++) {
		if (kind == FRAME_BLOCK)
			first = (first + BLOCK_FRAMES - 1) & ~(BLOCK_FRAMES - 1ul);
		if (first + (uint64_t)total[kind] * frames_of(kind) > FRAMES_MAX - 1)
			return false;
		if (!pool_create(heap, &f->pool[kind], kind, (uint32_t)first, total[kind]))
			return false;
		first += (uint64_t)total[kind] * frames_of(kind);
	}
	f->count = (uint32_t)first;
	f->tag = heap_zalloc(heap, f->count, sizeof(*f->tag));
	f->host_tag = heap_zalloc(heap, f->count, sizeof(*f->host_tag));
	f->host_tag_at_free = heap_zalloc(heap, f->count, sizeof(*f->host_tag_at_free));
	f->life = heap_zalloc(heap, f->count, sizeof(*f->life));
	f->used = heap_zalloc(heap, f->count, sizeof(*f->used));
	f->unlinked = heap_zalloc(heap, f->count, sizeof(*f->unlinked));
	f->taken = heap_zalloc(heap, f->count, sizeof(*f->taken));
	f->taken_at_free = heap_zalloc(heap, f->count, sizeof(*f->taken_at_free));
	f->block = heap_zalloc(heap, blocks + 1ul, sizeof(*f->block));
	return f->tag && f->host_tag && f->host_tag_at_free && f->life && f->used && f->unlinked && f->taken &&
	       f->taken_at_free && f->block && arena_create(heap, f);
}

int frames_create(struct machine *m)
{
	const struct machine_config *c = &m->config;
	const uint32_t total[FRAME_KINDS] = { c->root_frames, c->table_frames, c->guest_frames, c->guest_blocks };

	m->frames = heap_zalloc(m->heap, 1, sizeof(*m->frames));
	if (!m->frames)
		return MACHINE_NOMEM;
	if (!frames_allocate(m->heap, m->frames, total)) {
		frames_destroy(m);
		return MACHINE_NOMEM;
	}
	return 0;
}

void frames_destroy(struct machine *m)
{
	struct frames *f = m->frames;

	if (!f)
		return;
	if (f->mapping)
		munmap(f->mapping, f->mapping_bytes);
	else
		heap_free(m->heap, f->memory);
	for (uint32_t kind = 0; kind < FRAME_KINDS; kind++)
		heap_free(m->heap, f->pool[kind].stack);
	heap_free(m->heap, f->tag);
	heap_free(m->heap, f->host_tag);
	heap_free(m->heap, f->host_tag_at_free);
	heap_free(m->heap, f->life);
	heap_free(m->heap, f->used);
	heap_free(m->heap, f->unlinked);
	heap_free(m->heap, f->taken);
	heap_free(m->heap, f->taken_at_free);
	heap_free(m->heap, f->block);
	heap_free(m->heap, f);
	m->frames = NULL;
}
