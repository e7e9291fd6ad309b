#include "memory/custody.h"

#include "core/machine_types.h"
#include "memory/frame.h"

/* Half of the range of 15 bits. */
enum { FAR_BACK = (FRAME_TAG_MASK + 1) / 2 };

static uint32_t behind(uint32_t older, uint32_t newer)
{
	return (newer - older) & FRAME_TAG_MASK;
}

/* After 2^15 - 1 promises without a free, the last free would seem to lie in the future; it is kept at the far
 * end of the range of 15 bits. */
static uint32_t host_tag_advance(struct frames *f, uint32_t hfn)
{
	uint16_t old = atomic_load_explicit(&f->host_tag[hfn], memory_order_relaxed);
	uint16_t next;

	/* Release: pairs with the acquire of frame_host, in which a fault takes its custody. */
	do {
		next = (uint16_t)((old + 1u) & FRAME_TAG_MASK);
	} while (!atomic_compare_exchange_weak_explicit(&f->host_tag[hfn], &old,
							(uint16_t)(next | (old & FRAME_HOST_READONLY)),
							memory_order_release, memory_order_relaxed));
	frame_tag_advanced(f, next);
	/* Relaxed, like every use of host_tag_at_free: it is read only for the text of a report. */
	if (atomic_load_explicit(&f->host_tag_at_free[hfn], memory_order_relaxed) == next)
		atomic_store_explicit(&f->host_tag_at_free[hfn], (uint16_t)((next + 1u) & FRAME_TAG_MASK),
				      memory_order_relaxed);
	return next;
}

static bool is_later(uint16_t time, uint16_t than)
{
	return time != than && behind(than, time) <= FAR_BACK + FAR_BACK / 2;
}

/* Move a clock on to `time`, never back: an operation that began later may have ended earlier.  Release: each caller
 * names the acquire that it pairs with. */
static void advance_to(_Atomic uint16_t *clock, uint16_t time)
{
	uint16_t old = atomic_load_explicit(clock, memory_order_relaxed);

	while (is_later(time, old) && !atomic_compare_exchange_weak_explicit(clock, &old, time, memory_order_release,
									     memory_order_relaxed))
		;
}

/* At intervals, times that lie far back are moved nearer, so that 15 bits always suffice to tell their age.  An
 * older SPTE cannot exist any more: each time that a block's clock advances, the huge SPTEs of the block are
 * zapped. */
static void times_keep_up(_Atomic uint16_t *time, uint32_t now)
{
	for (uint32_t i = 0; i < BLOCK_FRAMES; i++) {
		uint16_t old = atomic_load_explicit(&time[i], memory_order_relaxed);

		if (behind(old, now) > FAR_BACK)
			(void)atomic_compare_exchange_strong_explicit(
				&time[i], &old, (uint16_t)((now - FAR_BACK) & FRAME_TAG_MASK), memory_order_relaxed,
				memory_order_relaxed);
	}
}

/* Take a new time of the block's clock, which does not show it yet. */
static uint16_t taking_begin(struct frames *f, uint32_t hfn)
{
	struct block *b = frame_block(f, hfn);
	uint32_t first = hfn & ~(BLOCK_FRAMES - 1u);
	uint16_t old = atomic_load_explicit(&b->begun, memory_order_relaxed), next;

	do {
		next = (uint16_t)((old + 1u) & FRAME_TAG_MASK);
	} while (!atomic_compare_exchange_weak_explicit(&b->begun, &old, next, memory_order_relaxed,
							memory_order_relaxed));
	if (next % (FAR_BACK / 2) == 0) {
		times_keep_up(&f->taken[first], next);
		times_keep_up(&f->taken_at_free[first], next);
	}
	return next;
}

void frame_taken(struct frames *f, struct taking *t)
{
	if (!t->block)
		return;
	/* Release: pairs with the acquire of frame_block_custody; a fault that reads this time comes after everything
	 * that was taken at it. */
	advance_to(&f->block[t->block - 1].clock, t->time);
	t->block = 0;
}

uint32_t frame_take(struct frames *f, struct taking *t, uint32_t hfn)
{
	uint32_t number;

	if (!frame_in_block(f, hfn))
		return host_tag_advance(f, hfn);
	number = (uint32_t)(frame_block(f, hfn) - f->block) + 1;
	if (t->block != number) {
		frame_taken(f, t);
		*t = (struct taking){ .block = number, .time = taking_begin(f, hfn) };
	}
	/* Before the host tag, which stands for a custody that still holds (frame_custody_of_one).  Release: pairs with
	 * the acquire of frame_custody_holds. */
	advance_to(&f->taken[hfn], t->time);
	return host_tag_advance(f, hfn);
}

/* Return whether the frame was taken, or freed, at `time`, later than the custody.  `begun` is read last, so
 * neither of the two is ahead of it. */
static bool after_custody(const struct frames *f, uint32_t hfn, uint32_t time, uint32_t custody)
{
	uint32_t now = atomic_load_explicit(&frame_block(f, hfn)->begun, memory_order_relaxed);

	return behind(time, now) < behind(custody & FRAME_TAG_MASK, now);
}

bool frame_custody_holds(const struct frames *f, uint32_t hfn, uint32_t custody)
{
	uint32_t taken;

	if (!(custody & CUSTODY_OF_BLOCK) || !frame_in_block(f, hfn))
		return (custody & FRAME_TAG_MASK) == frame_host_tag(f, hfn);
	taken = atomic_load_explicit(&f->taken[hfn], memory_order_acquire);
	return !after_custody(f, hfn, taken, custody);
}

uint32_t frame_custody_of_one(const struct frames *f, uint32_t hfn, uint32_t custody)
{
	uint32_t tag = frame_host_tag(f, hfn);

	return frame_custody_holds(f, hfn, custody) ? tag : (tag - 1) & FRAME_TAG_MASK;
}

uint32_t frame_custody_of_block(const struct frames *f, uint32_t hfn, uint32_t custody)
{
	/* Acquire: everything taken until then is visible. */
	uint32_t now = atomic_load_explicit(&frame_block(f, hfn)->clock, memory_order_acquire);

	if (frame_custody_holds(f, hfn, custody))
		return now;
	return (atomic_load_explicit(&f->taken[hfn], memory_order_relaxed) - 1u) & FRAME_TAG_MASK;
}

bool frame_freed_since(const struct frames *f, uint32_t hfn, uint32_t custody)
{
	uint32_t now, at_free;

	if (!atomic_load_explicit(&f->life[hfn], memory_order_relaxed))
		return false;
	if ((custody & CUSTODY_OF_BLOCK) && frame_in_block(f, hfn)) {
		at_free = atomic_load_explicit(&f->taken_at_free[hfn], memory_order_relaxed);
		return after_custody(f, hfn, at_free, custody);
	}
	now = frame_host_tag(f, hfn);
	at_free = atomic_load_explicit(&f->host_tag_at_free[hfn], memory_order_relaxed);
	return behind(custody & FRAME_TAG_MASK, now) > behind(at_free, now);
}

uint32_t frame_block_custody(struct machine *m, uint32_t hfn)
{
	return atomic_load_explicit(&frame_block(m->frames, hfn)->clock, memory_order_acquire);
}
