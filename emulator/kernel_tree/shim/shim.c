/* The machine under a tree's TDP MMU: pages, locks, RCU, and a log of events.
 *
 * One thread.  An RCU callback runs as soon as no reader is left, which is the earliest moment that a kernel allows.  A
 * freed page table is not used again before the next start, so that every later access to it is noticed.
 */
#include "linux.h"
#include "shim.h"
#include "tree.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGES = 4096, OBJECTS = 8192, OBJECT = 1024, FIRST_PFN = 0x100000 };

struct shim shim;

static unsigned char pool[PAGES][4096] __attribute__((aligned(4096)));
static struct page pages[PAGES];
static unsigned char freed[PAGES];
static unsigned int next_page, live_pages;
static unsigned char objects[OBJECTS][OBJECT] __attribute__((aligned(64)));
static unsigned int next_object;
static struct rcu_head *callbacks, **last_callback = &callbacks;
static char words[256];
static rwlock_t *mmu_lock; /* the one that was taken last: there is one */

void shim_reset(void)
{
	memset(pool, 0, (size_t)next_page * 4096);
	memset(pages, 0, sizeof(pages));
	memset(freed, 0, sizeof(freed));
	memset(objects, 0, (size_t)next_object * OBJECT);
	next_page = live_pages = next_object = 0;
	callbacks = NULL;
	last_callback = &callbacks;
	memset(&shim, 0, sizeof(shim));
}

void shim_event(unsigned int kind, u64 a, u64 b, const char *text, int with_state)
{
	struct shim_event *e;

	if (shim.n_events >= MAX_EVENTS)
		return;
	e = &shim.events[shim.n_events++];
	*e = (struct shim_event){ .kind = kind, .rcu = shim.rcu_depth, .lock = (unsigned int)shim.lock,
				  .a = a, .b = b, .text = text };
	e->state = with_state ? glue_record() : -1;
}

void shim_shared(const volatile void *p, bool write)
{
	(void)p;
	(void)write;
}

/* --- complaints ------------------------------------------------------------------------------------------------ */
void shim_warn(const char *file, int line, const char *function, const char *what)
{
	(void)file;
	(void)function;
	shim_event(EVENT_WARN, (u64)line, 0, what, 0);
}

void shim_bug(const char *file, int line, const char *what)
{
	fprintf(stderr, "%s:%d: BUG: %s\n", file, line, what);
	fflush(stderr);
	abort();
}

void shim_say(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	vsnprintf(words, sizeof(words), format, list);
	va_end(list);
	fprintf(stderr, "the tree says: %s\n", words);
}

void shim_missing(const char *name)
{
	shim_event(EVENT_MISSING, 0, 0, name, 0);
}

/* --- pages ----------------------------------------------------------------------------------------------------- */
unsigned long shim_page_alloc(gfp_t gfp)
{
	(void)gfp;
	if (next_page == PAGES)
		shim_bug(__FILE__, __LINE__, "the shim is out of pages");
	live_pages++;
	return (unsigned long)pool[next_page++];
}

void shim_page_free(unsigned long page)
{
	unsigned long at = (page - (unsigned long)pool) / 4096;

	if (!page)
		return;
	if (at >= next_page || freed[at])
		shim_bug(__FILE__, __LINE__, "a page is freed that is not allocated");
	freed[at] = 1;
	live_pages--;
}

unsigned int tree_pages(void)
{
	return live_pages;
}

void *shim_object_alloc(void)
{
	if (next_object == OBJECTS)
		shim_bug(__FILE__, __LINE__, "the shim is out of objects");
	return objects[next_object++];
}

void shim_object_free(void *object)
{
	(void)object;
}

unsigned long shim_pa(const void *p)
{
	return FIRST_PFN * 4096UL + ((unsigned long)p - (unsigned long)pool);
}

void *shim_va(unsigned long pa)
{
	return (void *)((unsigned long)pool + (pa - FIRST_PFN * 4096UL));
}

struct page *shim_page_of(unsigned long pfn)
{
	if (pfn < FIRST_PFN || pfn - FIRST_PFN >= PAGES)
		shim_bug(__FILE__, __LINE__, "a pfn that is no page table's is taken for one");
	return &pages[pfn - FIRST_PFN];
}

bool shim_in_table(const volatile void *p, bool *was_freed)
{
	unsigned long at = ((unsigned long)p - (unsigned long)pool) / 4096;

	if (p < (const volatile void *)pool || at >= PAGES)
		return false;
	*was_freed = freed[at];
	return true;
}

/* --- accesses to SPTEs ------------------------------------------------------------------------------------------- */
void shim_reads(const volatile void *p)
{
	bool was_freed;

	if (!shim_in_table(p, &was_freed))
		return;
	shim.last_spte = p;
	if (was_freed)
		shim_event(EVENT_FREED_USE, 0, 0, "read", 0);
	else if (!shim.rcu_depth && shim.lock != SHIM_WRITE)
		shim_event(EVENT_FREED_USE, 1, 0, "read outside of RCU and of mmu_lock for write", 0);
}

static void shim_writes(const volatile void *p, u64 value)
{
	bool was_freed;

	(void)value;
	if (shim_in_table(p, &was_freed) && was_freed)
		shim_event(EVENT_FREED_USE, 0, 1, "write", 0);
}

bool shim_stores(volatile void *p, u64 value)
{
	shim_writes(p, value);
	return false;
}

u64 shim_xchg(volatile void *p, u64 value)
{
	u64 old;

	shim_reads(p);
	old = *(volatile u64 *)p;
	shim_writes(p, value);
	*(volatile u64 *)p = value;
	return old;
}

u64 shim_cmpxchg(volatile void *p, u64 old, u64 value)
{
	u64 was;

	shim_reads(p);
	was = *(volatile u64 *)p;
	if (was == old) {
		shim_writes(p, value);
		*(volatile u64 *)p = value;
	}
	return was;
}

u64 shim_fetch_and(volatile void *p, u64 mask)
{
	u64 old;

	shim_reads(p);
	old = *(volatile u64 *)p;
	shim_writes(p, old & mask);
	*(volatile u64 *)p = old & mask;
	return old;
}

/* No vCPU here: the functions of kvm_main.c are no part of a comparison. */
unsigned long shim_vcpus, shim_vcpus_bytes;

const void *shim_vcpu_value(const volatile void *p)
{
	(void)p;
	abort();
}

const void *shim_vcpu_cmpxchg(volatile void *p, u64 old, u64 value)
{
	(void)old;
	(void)value;
	return shim_vcpu_value(p);
}

void cpu_relax(void)
{
}

/* --- mmu_lock -------------------------------------------------------------------------------------------------- */
void shim_lock(rwlock_t *lock, int how)
{
	if (shim.lock || shim.rcu_depth)
		shim_bug(__FILE__, __LINE__, "mmu_lock is taken twice, or inside RCU");
	mmu_lock = lock;
	shim.lock = lock->held = how;
	shim_event(EVENT_LOCK, (u64)how, 0, NULL, 0);
}

void shim_unlock(rwlock_t *lock, int how)
{
	if (shim.lock != how)
		shim_bug(__FILE__, __LINE__, "mmu_lock is released by a thread that does not hold it so");
	shim_event(EVENT_UNLOCK, (u64)how, 0, NULL, 0);
	shim.lock = lock->held = 0;
}

int shim_mmu_lock_held(const void *lock)
{
	return ((const rwlock_t *)lock)->held;
}

void shim_spin_lock(spinlock_t *lock)
{
	if (lock->held)
		shim_bug(__FILE__, __LINE__, "a spinlock is taken twice");
	lock->held = 1;
}

void shim_spin_unlock(spinlock_t *lock)
{
	if (!lock->held)
		shim_bug(__FILE__, __LINE__, "a spinlock is released that is not held");
	lock->held = 0;
}

void shim_assert_lock(int held, int how, const char *file, int line, const char *function)
{
	if (!(held & how) && !(how == SHIM_READ && held == SHIM_WRITE))
		shim_warn(file, line, function, "lockdep: the lock is not held");
}

/* Return the point that the walk has reached, if it has. */
static struct shim_point *point_reached(void)
{
	struct shim_point *point = &shim.points[shim.next_point];

	if (shim.next_point >= shim.n_points || !shim.last_spte || glue_gfn_of(shim.last_spte) < point->gfn)
		return NULL;
	return point;
}

static void other_runs(void)
{
	const volatile void *last = shim.last_spte;
	int lock = shim.lock;
	unsigned int depth = shim.rcu_depth;

	/* Another CPU's view: it holds nothing.  The caller has chosen an operation that may run beside this one. */
	shim.lock = mmu_lock->held = 0;
	shim.rcu_depth = 0;
	shim.other();
	shim.lock = mmu_lock->held = lock;
	shim.rcu_depth = depth;
	shim.last_spte = last;
}

bool shim_needbreak(void)
{
	struct shim_point *point = point_reached();

	if (!point)
		return false;
	if (point->what & POINT_YIELD)
		return true;
	shim.next_point++;
	other_runs();
	return false;
}

bool shim_need_resched(void)
{
	return shim_needbreak();
}

void shim_yield(rwlock_t *lock, int how)
{
	struct shim_point *point = point_reached();

	if (shim.rcu_depth)
		shim_warn(__FILE__, __LINE__, __func__, "mmu_lock is dropped for another thread inside RCU");
	shim_event(EVENT_YIELD, point ? point->gfn : 0, 0, NULL, 1);
	shim_unlock(lock, how);
	if (point) {
		shim.next_point++;
		if (point->what & POINT_OTHER)
			other_runs();
	}
	shim_lock(lock, how);
}

int tree_locks(void)
{
	return shim.lock | (int)shim.rcu_depth << 8;
}

/* --- RCU ------------------------------------------------------------------------------------------------------- */
static void run_callbacks(void)
{
	while (callbacks && !shim.rcu_depth) {
		struct rcu_head *head = callbacks;

		callbacks = head->next;
		if (!callbacks)
			last_callback = &callbacks;
		head->func(head);
	}
}

void rcu_read_lock(void)
{
	shim.rcu_depth++;
}

void rcu_read_unlock(void)
{
	if (!shim.rcu_depth)
		shim_bug(__FILE__, __LINE__, "RCU's read section is left twice");
	if (!--shim.rcu_depth)
		run_callbacks();
}

void shim_call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head))
{
	shim_event(EVENT_CALL_RCU, 0, 0, NULL, 0);
	head->func = func;
	head->next = NULL;
	*last_callback = head;
	last_callback = &head->next;
	run_callbacks();
}

void rcu_barrier(void)
{
	run_callbacks();
}

/* --- work queues ------------------------------------------------------------------------------------------------ */
bool queue_work(struct workqueue_struct *queue, struct work_struct *work)
{
	work->next = queue->first;
	queue->first = work;
	return true;
}

void flush_workqueue(struct workqueue_struct *queue)
{
	while (queue->first) {
		struct work_struct *work = queue->first;

		queue->first = work->next;
		work->func(work);
	}
}

/* --- the rest of KVM: no prototypes of the tree's are in sight, because they differ between versions --------------- */
void kvm_flush_remote_tlbs(void *kvm)
{
	(void)kvm;
	shim_event(EVENT_FLUSH, 0, 0, NULL, 1);
}

void kvm_flush_remote_tlbs_range(void *kvm, u64 gfn, u64 pages_)
{
	(void)kvm;
	shim_event(EVENT_FLUSH_RANGE, gfn, pages_, NULL, 1);
}

void kvm_flush_remote_tlbs_with_address(void *kvm, u64 gfn, u64 pages_)
{
	kvm_flush_remote_tlbs_range(kvm, gfn, pages_);
}

static u64 slot_number(const void *slot)
{
	return slot == shim.slots[1];
}

void kvm_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	(void)kvm;
	shim_event(EVENT_FLUSH_SLOT, slot_number(slot), 0, NULL, 1);
}

void kvm_arch_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	kvm_flush_remote_tlbs_memslot(kvm, slot);
}

void mark_page_dirty_in_slot(void *kvm, const void *slot, u64 gfn)
{
	(void)kvm;
	if (shim.slots_logging[slot_number(slot)])
		shim_event(EVENT_DIRTY, slot_number(slot), gfn, NULL, 0);
}

void kvm_set_pfn_dirty(u64 pfn)
{
	(void)pfn;
}

void kvm_set_pfn_accessed(u64 pfn)
{
	(void)pfn;
}

int mmu_try_to_unsync_pages(void)
{
	return 0;
}

int kvm_mmu_max_mapping_level(u64 kvm, u64 second, u64 third, u64 fourth)
{
	u64 arguments[] = { kvm, second, third, fourth };

	const void *slot = (const void *)(unsigned long)arguments[TREE_ARG_kvm_mmu_max_mapping_level_slot];

	return shim.levels[slot_number(slot)][arguments[TREE_ARG_kvm_mmu_max_mapping_level_gfn] >> 9 & 63];
}
