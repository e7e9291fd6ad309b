/* Internals of the ledger (oracle.h): the state of every right of a VM, one entry per gfn, in arrays grouped by
 * use.
 *
 * Locks are per group of adjacent gfns.  A CPU that goes along a range holds one group's lock at a time, by a
 * cursor; it neither waits for anything else nor sleeps while the cursor holds a lock.  One locked instruction
 * therefore serves a whole group, and a checker on another CPU waits only as long as a few SPTEs take.
 */
#ifndef FLUSHLAB_LEDGER_H
#define FLUSHLAB_LEDGER_H

#include "memory/frame.h"
#include "oracle/oracle.h"
#include "vm/vm.h"

enum { LEDGER_GROUP_BITS = 4, REVOKED_READ = 1, REVOKED_WRITE = 2 };

/* Under the group's lock. */
struct ledger_right {
	uint32_t hfn;
	uint8_t live_read;
	uint8_t live_write;
	uint8_t revoked;
	uint8_t promise;
	uint64_t ungranted;
};

struct ledger_promise {
	uint64_t time;
	uint32_t cpu;
	uint32_t host_tag; /* host tag of the frame when a promise last withdrew its custody */
};

struct ledger {
	uint64_t bytes; /* size of the mapping that holds all of it */
	_Atomic uint32_t *lock; /* by group */
	struct ledger_right *right;
	struct ledger_promise *promise;
};

#define LEDGER_NO_GROUP UINT64_MAX

struct ledger_cursor {
	struct ledger *ledger;
	const _Atomic uint64_t *promise_clock;
	uint64_t group; /* group with its lock held, or LEDGER_NO_GROUP */
};

static inline struct ledger_cursor ledger_cursor(const struct machine *m, uint32_t vm)
{
	return (struct ledger_cursor){ m->vms[vm].ledger, &m->vms[vm].promise_clock, LEDGER_NO_GROUP };
}

/* Out of line: the cursor holds another group's lock, or none. */
void ledger_move(struct ledger_cursor *c, uint64_t group);

/* Return the entry of a gfn, locked until the cursor moves on or is released. */
static inline struct ledger_right *ledger_at(struct ledger_cursor *c, uint64_t gfn)
{
	if (__builtin_expect(c->group != gfn >> LEDGER_GROUP_BITS, 0))
		ledger_move(c, gfn >> LEDGER_GROUP_BITS);
	return &c->ledger->right[gfn];
}

static inline void ledger_release(struct ledger_cursor *c)
{
	/* Release: pairs with the acquire of ledger_move. */
	if (c->group != LEDGER_NO_GROUP)
		atomic_store_explicit(&c->ledger->lock[c->group], 0, memory_order_release);
	c->group = LEDGER_NO_GROUP;
}

/* Add a grant.  Under a custody that the host has withdrawn meanwhile it grants nothing and marks the right
 * revoked: the SPTE was installed for a frame that its fault no longer owned. */
static inline void ledger_add(uint8_t *live, uint8_t *revoked, uint8_t which, bool custody_holds)
{
	if (__builtin_expect(custody_holds, 1))
		*revoked &= (uint8_t)~which;
	else if (!*live)
		*revoked |= which;
	*live += *live < UINT8_MAX;
}

/* Grant one gfn for a leaf SPTE that is about to appear. */
static inline void ledger_grant_one(struct ledger_cursor *c, uint64_t gfn, uint32_t hfn, bool custody_holds,
				    bool write)
{
	struct ledger_right *e = ledger_at(c, gfn);

	if (e->hfn != hfn) {
		e->hfn = hfn;
		e->live_read = 0;
		e->live_write = 0;
		e->revoked = write ? 0 : REVOKED_WRITE;
	}
	ledger_add(&e->live_read, &e->revoked, REVOKED_READ, custody_holds);
	if (write)
		ledger_add(&e->live_write, &e->revoked, REVOKED_WRITE, custody_holds);
}

/* Ungrant one gfn: its SPTE is gone, or has lost W.  The right changes first, then the frame's tag, which
 * announces it (oracle.h); a checker that sees the tag before the lock is released waits for the rest.  The
 * promise clock is read last, when the SPTE's change is visible: a ticket that is not in it yet belongs to a
 * flush that comes after the change.  Acquire: pairs with oracle_ticket. */
static inline void ledger_ungrant_one(struct ledger_cursor *c, struct frames *f, uint64_t gfn, uint32_t hfn, bool read,
				      bool write)
{
	struct ledger_right *e = ledger_at(c, gfn);

	if (__builtin_expect(e->hfn != hfn, 0)) {
		frame_tag_advance(f, hfn);
		return;
	}
	e->live_read -= read & (e->live_read != 0);
	e->live_write -= write & (e->live_write != 0);
	frame_tag_advance(f, hfn);
	e->ungranted = atomic_load_explicit(c->promise_clock, memory_order_acquire);
}

#endif
