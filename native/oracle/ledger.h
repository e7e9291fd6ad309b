/* The ledger (oracle.h): the state of every right of a VM, one entry per gfn, in arrays grouped by use.
 *
 * Locks are per group of adjacent gfns.  A CPU that goes along a range holds one group's lock at a time, by a
 * cursor; it neither waits for anything else nor sleeps while the cursor holds a lock.  One locked instruction
 * therefore serves a whole group, and a checker on another CPU waits only as long as a few SPTEs take.
 */
#ifndef FLUSHLAB_LEDGER_H
#define FLUSHLAB_LEDGER_H

#include "core/machine_types.h"
#include "memory/frame.h"
#include "vm/vm.h"

/* api */
/* KVM's promises, and the moment at which each is made: see kvm_mmu_notifier_invalidate_range_start,
 * kvm_set_memslot, kvm_vm_ioctl_get_dirty_log, kvm_zap_gfn_range. */
enum promise {
	PROMISE_NONE,
	PROMISE_NOTIFIER,       /* invalidate_range_start returned: the range is not used */
	PROMISE_NOTIFIER_WRITE, /* invalidate_range_start returned: the range is not written (mprotect,
				 * copy-on-write, KSM) */
	PROMISE_MEMSLOT,        /* the slot is gone */
	PROMISE_ZAP_RANGE,      /* kvm_zap_gfn_range returned */
	PROMISE_DIRTY_LOG,      /* every later write is logged */
	PROMISE_FREE,           /* the frame was freed */
	PROMISE_GUEST,          /* the guest invalidated its own mapping on this vCPU */
	PROMISES
};

/* Take a ticket, a moment in the history of a VM's rights, after an operation has changed SPTEs and before its
 * flush. */
/* call: part; reads ept */
uint64_t oracle_ticket(struct machine *m, uint32_t vm);
/* The operation behind `promise` on gfns [start, end) is complete.  Its flush has covered the rights that were
 * removed before `ticket`; only that of a dirty log needs one (0 with others), because nothing may be granted while
 * the others are under way.  Returns the number of rights revoked. */
/* call: step promise; reads ept; writes custody; quiet */
uint64_t oracle_revoke(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end,
		       uint32_t promise, uint64_t ticket);
/* oracle_revoke() for single gfns: bit i of mask is gfn base + i (dirty log). */
/* call: step promise; reads ept; writes custody; quiet */
uint64_t oracle_revoke_mask(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t base, uint64_t mask,
			    uint32_t promise, uint64_t ticket);
/* Return the state of one right, for tests and reports: bit 0 readable granted, 1 writable granted, 2 read
 * revoked, 3 write revoked; frame in *hfn. */
/* call: anything */
uint32_t oracle_right(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t *hfn);
/* end api */

enum { LEDGER_GROUP_BITS = 4, REVOKED_READ = 1, REVOKED_WRITE = 2, LEDGER_NO_FRAME = 0xffffff };

/* Under the group's lock. */
struct ledger_right {
	uint32_t hfn : 24; /* as wide as in an SPTE; LEDGER_NO_FRAME: the page was never mapped */
	uint32_t revoked : 8;
	/* The TDP MMU has an SPTE of a page per root, the shadow MMU as many as a list of its rmap holds
	 * (RMAP_RECYCLE_THRESHOLD). */
	uint16_t live_read;
	uint16_t live_write;
	uint64_t ungranted;
};

struct ledger_promise {
	uint64_t time;
	uint32_t cpu;
	uint16_t host_tag; /* host tag of the frame when a promise last withdrew its custody */
	uint8_t promise;
};

struct ledger {
	uint64_t bytes; /* size of the mapping that holds all of it */
	_Atomic uint32_t *lock; /* by group */
	struct ledger_right *right;
	struct ledger_promise *promise;
};

/* The state of one right, as ledger_copy() returns it. */
struct ledger_entry {
	uint32_t hfn;
	uint16_t live_read;  /* SPTEs that grant it now, over all roots */
	uint16_t live_write;
	uint8_t revoked;    /* bit 0: read, bit 1: write */
	uint8_t promise;    /* the last one */
	uint32_t promise_cpu;
	uint64_t promise_time;
	uint64_t ungranted;   /* the VM's promise clock when a right was last taken away */
};

int ledger_create(struct machine *m, struct vm *vm);
void ledger_destroy(struct machine *m, struct vm *vm);

/* Grant n gfns from `gfn` on the frames from `hfn` on, for a leaf SPTE that is about to appear, under the
 * custody that its fault took (frame.h). */
void ledger_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, uint32_t custody,
		  bool write);
/* Grant write to an SPTE that granted read. */
void ledger_grant_write(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n,
			uint32_t custody);
/* Ungrant an SPTE's read and write, or write only; the frames' tags are advanced. */
void ledger_ungrant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, bool read, bool write);
/* Announce that a promiser other than KVM has taken away a right to this gfn: each later use of the frame behind it
 * asks the oracle. */
void ledger_announce(struct machine *m, uint32_t vm, uint64_t gfn);
/* Take one consistent copy. */
void ledger_copy(struct machine *m, uint32_t vm, uint64_t gfn, struct ledger_entry *out);

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

/* Add a grant.  If the host does not permit it, it grants nothing and marks the right revoked: the SPTE was installed
 * for a frame that its fault no longer owned, or for writes to a frame that the host protects. */
static inline void ledger_add(struct ledger_right *e, uint16_t *live, uint8_t which, bool permitted)
{
	if (__builtin_expect(permitted, 1))
		e->revoked &= (uint8_t)~which;
	else if (!*live)
		e->revoked |= which;
	*live += *live < UINT16_MAX;
}

/* Grant one gfn for a leaf SPTE that is about to appear.  reading: the SPTE's custody holds.  writing: the host permits
 * writes as well; only asked if the SPTE has W. */
static inline void ledger_grant_one(struct ledger_cursor *c, uint64_t gfn, uint32_t hfn, bool reading, bool write,
				    bool writing)
{
	struct ledger_right *e = ledger_at(c, gfn);

	if (e->hfn != hfn) {
		e->hfn = hfn & 0xffffff;
		e->live_read = 0;
		e->live_write = 0;
		e->revoked = write ? 0 : REVOKED_WRITE;
	}
	ledger_add(e, &e->live_read, REVOKED_READ, reading);
	if (write)
		ledger_add(e, &e->live_write, REVOKED_WRITE, writing);
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
