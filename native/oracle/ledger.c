/* The ledger: the state of every right of a VM.  See oracle.h and ledger.h. */
#define _GNU_SOURCE
#include "oracle/ledger.h"

#include <sched.h>
#include <sys/mman.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "vm/vm.h"

/* Test-and-set; acquire pairs with the release of ledger_release.  Held only for a few SPTEs, but the holder's
 * thread may be preempted. */
void ledger_move(struct ledger_cursor *c, uint64_t group)
{
	uint32_t spins = 0;

	ledger_release(c);
	while (atomic_exchange_explicit(&c->ledger->lock[group], 1, memory_order_acquire)) {
		if (++spins < 64) {
			cpu_relax();
		} else {
			sched_yield();
			spins = 0;
		}
	}
	c->group = group;
}

/* Reserve address space for all of it; memory is used only for touched pages. */
static void *ledger_memory(struct machine *m, uint64_t bytes)
{
	void *memory;

	if (m->heap)
		return heap_zalloc_lines(m->heap, 1, bytes);
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	return memory == MAP_FAILED ? NULL : memory;
}

int ledger_create(struct machine *m, struct vm *vm)
{
	uint64_t groups = (vm->gfns >> LEDGER_GROUP_BITS) + 1;
	uint64_t bytes = CACHELINE + vm->gfns * (sizeof(struct ledger_right) + sizeof(struct ledger_promise)) +
			 groups * sizeof(_Atomic uint32_t);
	struct ledger *l = ledger_memory(m, bytes);

	if (!l)
		return MACHINE_NOMEM;
	l->bytes = bytes;
	l->right = (struct ledger_right *)(void *)((char *)l + CACHELINE);
	l->promise = (struct ledger_promise *)(void *)(l->right + vm->gfns);
	l->lock = (_Atomic uint32_t *)(void *)(l->promise + vm->gfns);
	for (uint64_t gfn = 0; gfn < vm->gfns; gfn++)
		l->right[gfn].hfn = LEDGER_NO_FRAME;
	vm->ledger = l;
	return 0;
}

void ledger_destroy(struct machine *m, struct vm *vm)
{
	if (m->heap)
		heap_free(m->heap, vm->ledger);
	else if (vm->ledger)
		munmap(vm->ledger, vm->ledger->bytes);
	vm->ledger = NULL;
}

void ledger_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, uint32_t custody,
		  bool write)
{
	struct ledger_cursor c = ledger_cursor(m, vm);

	for (uint64_t i = 0; i < n; i++) {
		uint32_t frame = hfn + (uint32_t)i;
		bool holds = frame_custody_holds(m->frames, frame, custody);

		ledger_grant_one(&c, gfn + i, frame, holds, write, holds && !frame_host_readonly(m->frames, frame));
	}
	ledger_release(&c);
}

void ledger_grant_write(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n,
			uint32_t custody)
{
	struct ledger_cursor c = ledger_cursor(m, vm);

	for (uint64_t i = 0; i < n; i++) {
		struct ledger_right *e = ledger_at(&c, gfn + i);

		if (e->hfn == hfn + i)
			ledger_add(e, &e->live_write, REVOKED_WRITE,
				   frame_custody_holds(m->frames, e->hfn, custody) &&
					   !frame_host_readonly(m->frames, e->hfn));
	}
	ledger_release(&c);
}

void ledger_ungrant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, bool read, bool write)
{
	struct ledger_cursor c = ledger_cursor(m, vm);

	for (uint64_t i = 0; i < n; i++)
		ledger_ungrant_one(&c, m->frames, gfn + i, hfn + (uint32_t)i, read, write);
	ledger_release(&c);
}

uint64_t oracle_ticket(struct machine *m, uint32_t vm)
{
	return atomic_fetch_add_explicit(&m->vms[vm].promise_clock, 1, memory_order_acq_rel) + 1;
}

/* Return the rights of an entry that this promise revokes.  A notifier's, a memslot's and kvm_zap_gfn_range()'s promise
 * is absolute: faults in the range retry until it is made, so nothing may be granted before.  A right that has an SPTE
 * all the same is one that the operation has missed, or that a fault has granted without a retry.  With the promise of a
 * dirty log, a fault may already have granted anew a right that the operation removed.  That right is valid and stays;
 * if it is removed once more after the flush, this operation's promise does not cover that removal. */
static uint8_t ends(const struct ledger_right *e, uint32_t promise, uint64_t ticket)
{
	uint8_t rights = 0;
	bool covered = e->ungranted < ticket;

	switch (promise) {
	case PROMISE_NOTIFIER:
	case PROMISE_MEMSLOT:
	case PROMISE_ZAP_RANGE:
	case PROMISE_FREE:
		rights = REVOKED_READ | REVOKED_WRITE;
		break;
	case PROMISE_NOTIFIER_WRITE:
		rights = REVOKED_WRITE;
		break;
	case PROMISE_DIRTY_LOG:
		rights = e->live_write || !covered ? 0 : REVOKED_WRITE;
		break;
	default:
		break;
	}
	return rights & (uint8_t)~e->revoked;
}

/* Return whether the promise withdraws custody: the frame is not its user's any more, or not through this slot,
 * or not as a fault has found it (kvm_zap_gfn_range).  An SPTE that still points to it, or that a fault
 * installs later from an earlier look-up, has no custody of it.  A fault that looks it up later has custody, so
 * its grants stay. */
static bool withdraws_custody(uint32_t promise)
{
	return promise == PROMISE_NOTIFIER || promise == PROMISE_NOTIFIER_WRITE || promise == PROMISE_MEMSLOT ||
	       promise == PROMISE_ZAP_RANGE;
}

struct revocation {
	struct ledger_cursor cursor;
	struct frames *frames;
	struct taking taking;
	uint32_t cpu;
	uint32_t promise;
	uint64_t ticket;
	uint64_t now;
};

static uint64_t revoke(struct revocation *r, uint64_t gfn)
{
	struct ledger_right *e = ledger_at(&r->cursor, gfn);
	struct ledger_promise *p = &r->cursor.ledger->promise[gfn];
	uint8_t rights;

	if (e->hfn == LEDGER_NO_FRAME)
		return 0;
	rights = ends(e, r->promise, r->ticket);
	/* Also if an earlier promise has ended all rights, because a fault may have looked the frame up since.
	 * Not if the frame is another page's by now: then it was freed, which has advanced its tag. */
	if (withdraws_custody(r->promise) && (rights || p->host_tag == frame_host_tag(r->frames, e->hfn)))
		p->host_tag = (uint16_t)frame_take(r->frames, &r->taking, e->hfn);
	if (!rights)
		return 0;
	e->revoked |= rights;
	p->promise = (uint8_t)r->promise;
	p->time = r->now;
	p->cpu = r->cpu;
	frame_tag_advance(r->frames, e->hfn);
	return 1;
}

static struct revocation revocation(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t promise, uint64_t ticket)
{
	return (struct revocation){ .cursor = ledger_cursor(m, vm), .frames = m->frames, .cpu = cpu,
				    .promise = promise, .ticket = ticket, .now = monotonic_ns() };
}

static void revocation_end(struct revocation *r)
{
	frame_taken(r->frames, &r->taking);
	ledger_release(&r->cursor);
}

uint64_t oracle_revoke(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end,
		       uint32_t promise, uint64_t ticket)
{
	struct revocation r = revocation(m, cpu, vm, promise, ticket);
	uint64_t revoked = 0;

	if (end > m->vms[vm].gfns)
		end = m->vms[vm].gfns;
	for (uint64_t gfn = start; gfn < end; gfn++)
		revoked += revoke(&r, gfn);
	revocation_end(&r);
	event_record_more(m, cpu, event_of(vm, EVENT_PROMISE), promise, start, end - start);
	return revoked;
}

uint64_t oracle_revoke_mask(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t base, uint64_t mask,
			    uint32_t promise, uint64_t ticket)
{
	struct revocation r = revocation(m, cpu, vm, promise, ticket);
	uint64_t revoked = 0;

	for (; mask; mask &= mask - 1) {
		uint64_t gfn = base + (uint32_t)__builtin_ctzll(mask);

		if (gfn < m->vms[vm].gfns)
			revoked += revoke(&r, gfn);
	}
	revocation_end(&r);
	event_record_more(m, cpu, event_of(vm, EVENT_PROMISE), promise, base, 64);
	return revoked;
}

void ledger_copy(struct machine *m, uint32_t vm, uint64_t gfn, struct ledger_entry *out)
{
	struct ledger_cursor c = ledger_cursor(m, vm);
	const struct ledger_right *e = ledger_at(&c, gfn);
	const struct ledger_promise *p = &c.ledger->promise[gfn];

	*out = (struct ledger_entry){ .hfn = e->hfn == LEDGER_NO_FRAME ? UINT32_MAX : e->hfn,
				      .live_read = e->live_read, .live_write = e->live_write, .revoked = e->revoked,
				      .promise = p->promise, .promise_cpu = p->cpu, .promise_time = p->time,
				      .ungranted = e->ungranted };
	ledger_release(&c);
}

void ledger_announce(struct machine *m, uint32_t vm, uint64_t gfn)
{
	struct ledger_entry e;

	if (gfn >= m->vms[vm].gfns)
		return;
	ledger_copy(m, vm, gfn, &e);
	if (e.hfn < m->frames->count)
		frame_tag_advance(m->frames, e.hfn);
}

uint32_t oracle_right(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t *hfn)
{
	struct ledger_entry e;

	ledger_copy(m, vm, gfn, &e);
	*hfn = e.hfn;
	return (e.live_read ? 1u : 0) | (e.live_write ? 2u : 0) | (uint32_t)e.revoked << 2;
}
