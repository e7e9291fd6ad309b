/* The ledger: the state of every right of a VM, one entry per gfn.  See oracle.h. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "frame.h"
#include "oracle.h"
#include "vm.h"

enum { REVOKED_READ = 1, REVOKED_WRITE = 2, NO_FRAME = 0xffffffff };

/* Test-and-set; acquire pairs with the release of ledger_unlock.  Held for a few dozen instructions, but its
 * holder's thread may lose the processor. */
static struct ledger_entry *ledger_lock(struct machine *m, uint32_t vm, uint64_t gfn)
{
	struct ledger_entry *e = &m->vms[vm].ledger[gfn];
	uint32_t spins = 0;

	while (atomic_exchange_explicit(&e->lock, 1, memory_order_acquire)) {
		if (++spins < 64) {
			cpu_relax();
		} else {
			sched_yield();
			spins = 0;
		}
	}
	return e;
}

static void ledger_unlock(struct ledger_entry *e)
{
	atomic_store_explicit(&e->lock, 0, memory_order_release);
}

int ledger_create(struct machine *m, struct vm *vm)
{
	uint64_t bytes = vm->gfns * sizeof(struct ledger_entry);
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	(void)m;
	if (memory == MAP_FAILED)
		return MACHINE_NOMEM;
	vm->ledger = memory;
	for (uint64_t gfn = 0; gfn < vm->gfns; gfn++)
		vm->ledger[gfn].hfn = NO_FRAME;
	return 0;
}

void ledger_destroy(struct vm *vm)
{
	if (vm->ledger)
		munmap(vm->ledger, vm->gfns * sizeof(struct ledger_entry));
	vm->ledger = NULL;
}

/* A grant under a custody that the host has withdrawn meanwhile grants nothing: it is the mark that an
 * SPTE was installed for a frame which its fault no longer owned. */
static void grant(struct ledger_entry *e, bool custody_holds, bool read, bool write)
{
	if (read) {
		if (custody_holds)
			e->revoked &= (uint8_t)~REVOKED_READ;
		else if (!e->live_read)
			e->revoked |= REVOKED_READ;
		if (e->live_read < UINT8_MAX)
			e->live_read++;
	}
	if (write) {
		if (custody_holds)
			e->revoked &= (uint8_t)~REVOKED_WRITE;
		else if (!e->live_write)
			e->revoked |= REVOKED_WRITE;
		if (e->live_write < UINT8_MAX)
			e->live_write++;
	}
}

static void grant_one(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, bool custody_holds,
		      bool write)
{
	struct ledger_entry *e = ledger_lock(m, vm, gfn);

	if (e->hfn != hfn) {
		e->hfn = hfn;
		e->live_read = 0;
		e->live_write = 0;
		e->revoked = write ? 0 : REVOKED_WRITE;
	}
	grant(e, custody_holds, true, write);
	ledger_unlock(e);
}

void ledger_grant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n, uint32_t custody,
		  bool write)
{
	/* A huge leaf's custody is that of its first frame. */
	bool custody_holds = custody == frame_host_tag(m->frames, hfn);

	for (uint64_t i = 0; i < n; i++)
		grant_one(m, vm, gfn + i, hfn + (uint32_t)i, custody_holds, write);
}

void ledger_grant_write(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, uint64_t n,
			uint32_t custody)
{
	bool custody_holds = custody == frame_host_tag(m->frames, hfn);

	for (uint64_t i = 0; i < n; i++) {
		struct ledger_entry *e = ledger_lock(m, vm, gfn + i);

		if (e->hfn == hfn + i)
			grant(e, custody_holds, false, true);
		ledger_unlock(e);
	}
}

void ledger_ungrant(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t hfn, bool read, bool write)
{
	struct ledger_entry *e = ledger_lock(m, vm, gfn);

	if (e->hfn == hfn) {
		if (read && e->live_read)
			e->live_read--;
		if (write && e->live_write)
			e->live_write--;
		/* Acquire: pairs with oracle_ticket, whose flush comes after it. */
		e->ungranted = atomic_load_explicit(&m->vms[vm].promise_clock, memory_order_acquire);
	}
	ledger_unlock(e);
}

uint64_t oracle_ticket(struct machine *m, uint32_t vm)
{
	return atomic_fetch_add_explicit(&m->vms[vm].promise_clock, 1, memory_order_acq_rel) + 1;
}

/* Which rights this promise ends for an entry.  A notifier's and a memslot's promise is absolute: nothing may
 * be granted before the host or user space says so again.  After the others a fault may already have granted
 * anew what the operation took away; then the right is valid and stays, and if somebody else takes it away once
 * more, after the flush, that is not this operation's to promise. */
static uint8_t ends(const struct ledger_entry *e, uint32_t promise, uint64_t ticket)
{
	uint8_t rights = 0;
	bool covered = e->ungranted < ticket;

	switch (promise) {
	case PROMISE_NOTIFIER:
	case PROMISE_MEMSLOT:
	case PROMISE_FREE:
		rights = REVOKED_READ | REVOKED_WRITE;
		break;
	case PROMISE_NOTIFIER_WRITE:
		rights = REVOKED_WRITE;
		break;
	case PROMISE_ZAP_RANGE:
		rights = (e->live_read || !covered ? 0 : REVOKED_READ) |
			 (e->live_write || !covered ? 0 : REVOKED_WRITE);
		break;
	case PROMISE_DIRTY_LOG:
		rights = e->live_write || !covered ? 0 : REVOKED_WRITE;
		break;
	default:
		break;
	}
	return rights & (uint8_t)~e->revoked;
}

/* The frame is not its user's any more, or not through this slot: an SPTE that still points to it, or appears
 * later from a fault that took it before, has no custody of it. */
static bool withdraws_custody(uint32_t promise)
{
	return promise == PROMISE_NOTIFIER || promise == PROMISE_NOTIFIER_WRITE || promise == PROMISE_MEMSLOT;
}

static uint64_t revoke(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t gfn, uint32_t promise,
		       uint64_t ticket, uint64_t now)
{
	struct ledger_entry *e = ledger_lock(m, vm, gfn);
	uint8_t rights = 0;

	if (e->hfn != NO_FRAME)
		rights = ends(e, promise, ticket);
	if (rights) {
		e->revoked |= rights;
		e->promise = (uint8_t)promise;
		e->promise_cpu = cpu;
		e->promise_time = now;
		if (withdraws_custody(promise))
			frame_host_tag_advance(m->frames, e->hfn);
		frame_tag_advance(m->frames, e->hfn);
	}
	ledger_unlock(e);
	return rights ? 1 : 0;
}

uint64_t oracle_revoke(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t start, uint64_t end,
		       uint32_t promise, uint64_t ticket)
{
	uint64_t now = monotonic_ns(), revoked = 0;

	if (end > m->vms[vm].gfns)
		end = m->vms[vm].gfns;
	for (uint64_t gfn = start; gfn < end; gfn++)
		revoked += revoke(m, cpu, vm, gfn, promise, ticket, now);
	event_record(m, cpu, EVENT_PROMISE, promise, start);
	return revoked;
}

uint64_t oracle_revoke_mask(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t base, uint64_t mask,
			    uint32_t promise, uint64_t ticket)
{
	uint64_t now = monotonic_ns(), revoked = 0;

	for (; mask; mask &= mask - 1) {
		uint64_t gfn = base + (uint32_t)__builtin_ctzll(mask);

		if (gfn < m->vms[vm].gfns)
			revoked += revoke(m, cpu, vm, gfn, promise, ticket, now);
	}
	event_record(m, cpu, EVENT_PROMISE, promise, base);
	return revoked;
}

void ledger_copy(struct machine *m, uint32_t vm, uint64_t gfn, struct ledger_entry *out)
{
	struct ledger_entry *e = ledger_lock(m, vm, gfn);

	out->hfn = e->hfn;
	out->live_read = e->live_read;
	out->live_write = e->live_write;
	out->revoked = e->revoked;
	out->promise = e->promise;
	out->promise_cpu = e->promise_cpu;
	out->promise_time = e->promise_time;
	ledger_unlock(e);
}

uint32_t oracle_right(struct machine *m, uint32_t vm, uint64_t gfn, uint32_t *hfn)
{
	struct ledger_entry e;

	ledger_copy(m, vm, gfn, &e);
	*hfn = e.hfn;
	return (e.live_read ? 1u : 0) | (e.live_write ? 2u : 0) | (uint32_t)e.revoked << 2;
}
