/* Inside of the ledger (oracle.h): the state of every right of a VM, one entry per gfn, in arrays by what is needed
 * together.
 *
 * Locks are per group of gfns that lie side by side.  Whoever goes along a range holds one group's at a time, by a
 * cursor; nobody waits for anything else, nor sleeps, while a cursor holds a lock.  So one locked instruction
 * serves a group, and a checker on another CPU waits for as long as a few SPTEs take.
 */
#ifndef FLUSHLAB_LEDGER_H
#define FLUSHLAB_LEDGER_H

#include "frame.h"
#include "oracle.h"
#include "vm.h"

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
	uint32_t host_tag; /* of the frame, when a promise withdrew its custody last */
};

struct ledger {
	uint64_t bytes; /* of the mapping that holds it all */
	_Atomic uint32_t *lock; /* by group */
	struct ledger_right *right;
	struct ledger_promise *promise;
};

#define LEDGER_NO_GROUP UINT64_MAX

struct ledger_cursor {
	struct ledger *ledger;
	const _Atomic uint64_t *promise_clock;
	uint64_t group; /* whose lock is held, or LEDGER_NO_GROUP */
};

static inline struct ledger_cursor ledger_cursor(const struct machine *m, uint32_t vm)
{
	return (struct ledger_cursor){ m->vms[vm].ledger, &m->vms[vm].promise_clock, LEDGER_NO_GROUP };
}

/* Out of line: another group's lock is held, or none. */
void ledger_move(struct ledger_cursor *c, uint64_t group);

/* The entry of a gfn, locked until the cursor moves on or is released. */
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

/* A grant under a custody that the host has withdrawn meanwhile grants nothing: it is the mark that an SPTE was
 * installed for a frame which its fault no longer owned. */
static inline void ledger_add(uint8_t *live, uint8_t *revoked, uint8_t which, bool custody_holds)
{
	if (__builtin_expect(custody_holds, 1))
		*revoked &= (uint8_t)~which;
	else if (!*live)
		*revoked |= which;
	*live += *live < UINT8_MAX;
}

/* A leaf SPTE that grants one gfn is about to appear. */
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

/* It has gone, or lost W.  The right first, then the frame's tag, which says so (oracle.h); whoever sees the tag
 * before the lock is released waits for the rest.  The promise clock is read last, when the SPTE's change is out:
 * a ticket that is not in it yet is one whose flush comes after the change.  Acquire: pairs with oracle_ticket. */
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
