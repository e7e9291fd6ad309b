/* The kernel primitives of a tree's TDP MMU that runs on many threads: frames, locks and RCU are the core's.
 *
 * A table lies in a frame of the machine's, where processors walk it.  A table's physical address holds the frame's
 * tag above the frame's number, so that a link says for which life of the frame it was made.  A leaf's address holds,
 * in the same place, the custody under which its fault took the frame.  The tree's code takes these bits for bits of
 * the pfn.
 */
#include "linux.h"
#include "machine_internal.h"
#include "tree.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { HFN_BITS = 24, HFN_MASK = (1 << HFN_BITS) - 1, TAG_MASK = 0x7fff, LEAF = 128, RWX = 7, WRITABLE = 2, OBJECTS = 1 << 18, QUARANTINE = 4096 };

__thread struct shim_cpu *here;
char shim_last_bug[BUG_TEXT];
struct tree_core core;

static struct shim_cpu *cpus;
static struct page *pages;      /* by frame */
static unsigned char *live;     /* by frame: it is a table of the tree's */
static unsigned char void_table[4096] __attribute__((aligned(4096))); /* empty: walks read it for a freed table */

/* --- operations ------------------------------------------------------------------------------------------------- */
struct shim_cpu *shim_cpu_of(unsigned int cpu)
{
	return &cpus[cpu];
}

struct tree_cpu *tree_cpu(unsigned int cpu)
{
	return &cpus[cpu].api;
}

void shim_begin(unsigned int cpu, enum operation kind)
{
	here = &cpus[cpu];
	here->operation = kind;
	here->entry_rcu = here->api.rcu_depth;
	here->entry_lock = here->api.lock;
	here->looked = here->unflushed = 0;
	here->flushed_last = false;
	here->last = NULL;
	here->spin = NULL;
	here->fresh_object = NULL;
	here->api.error = 0;
	here->api.changed = here->api.frozen = 0;
	here->api.inside = 1;
}

int shim_end(void)
{
	if (!here->api.error && (here->api.lock != here->entry_lock || here->api.rcu_depth != here->entry_rcu))
		shim_bug("tdp_mmu.c", 0, "an operation ends with other locks held than it began with");
	here->api.inside = 0;
	return here->api.error;
}

static void unlock(unsigned int how)
{
	here->api.lock = 0;
	(how == SHIM_WRITE ? core.write_unlock : core.read_unlock)(core.machine, here->api.id, here->api.vm);
}

/* End the operation from anywhere in the tree's code, and release the locks that it has taken since it began. */
void shim_give_up(int error)
{
	here->api.error = error;
	if (here->spin)
		shim_spin_unlock(here->spin);
	if (here->fresh_object)
		shim_object_free(here->fresh_object);
	while (here->api.rcu_depth > here->entry_rcu)
		rcu_read_unlock();
	if (here->api.lock && !here->entry_lock)
		unlock(here->api.lock);
	_longjmp(here->unwind, 1);
}

static int python(unsigned int what, u64 a, u64 b, const char *text)
{
	int r = core.call(here->api.id, what, a, b, text);

	if (r < 0)
		shim_give_up(r);
	return r;
}

static void point(unsigned int kind, bool write)
{
	if (here->api.points)
		python(CALL_POINT, kind, write, NULL);
}

/* --- complaints --------------------------------------------------------------------------------------------------- */
static void finding(unsigned int kind, const char *file, int line, const char *what)
{
	char text[512];
	const char *name = strstr(file, "arch/x86/kvm/");

	snprintf(text, sizeof(text), "%s:%d: %s", name ? name : file, line, what);
	python(CALL_WARN, kind, 0, text);
}

void shim_warn(const char *file, int line, const char *what)
{
	finding(FINDING_WARN, file, line, what);
}

void shim_bug(const char *file, int line, const char *what)
{
	snprintf(shim_last_bug, sizeof(shim_last_bug), "%s:%d: %s", file, line, what);
	abort();
}

void shim_say(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	vfprintf(stderr, format, list);
	va_end(list);
	fputc('\n', stderr);
}

void shim_missing(const char *name)
{
	char text[MOST_NAME];

	snprintf(text, sizeof(text), "%s", name);
	python(CALL_WARN, FINDING_MISSING, 0, text);
}

/* --- pages ---------------------------------------------------------------------------------------------------------- */
static bool in_frames(const volatile void *p, unsigned int *hfn)
{
	unsigned long at = (unsigned long)p - (unsigned long)core.memory;

	if ((unsigned long)p < (unsigned long)core.memory || at >> PAGE_SHIFT >= core.frames)
		return false;
	*hfn = (unsigned int)(at >> PAGE_SHIFT);
	return true;
}

unsigned long shim_page_alloc(gfp_t gfp)
{
	unsigned int kind = here->operation == OPERATION_ALLOC_ROOT ? core.root_frame : core.table_frame;
	long long hfn;

	point(POINT_FRAMES, true);
	hfn = core.table_alloc(core.machine, here->api.id, kind);
	if (hfn < 0) {
		if (gfp == GFP_NOWAIT)
			return 0;
		shim_give_up((int)hfn);
	}
	here->fresh_object = NULL;
	pages[hfn].private = 0;
	__atomic_store_n(&live[hfn], 1, __ATOMIC_RELEASE);
	return (unsigned long)core.memory + ((unsigned long)hfn << PAGE_SHIFT);
}

void shim_page_free(unsigned long page)
{
	unsigned int hfn;

	if (!page)
		return;
	if (!in_frames((void *)page, &hfn) || !__atomic_exchange_n(&live[hfn], 0, __ATOMIC_ACQ_REL))
		shim_bug("free_page", 0, "a page is freed that is not allocated, or freed twice");
	shim_step(STEP_FREED, hfn, 1);
	core.table_free(core.machine, here->api.id, hfn);
}

unsigned long shim_pa(const void *p)
{
	unsigned int hfn;

	if (p == void_table)
		return 0;
	if (!in_frames(p, &hfn))
		shim_bug("__pa", 0, "the address is no page table's");
	return ((unsigned long)core.frame_tag(core.machine, hfn) << HFN_BITS | hfn) << PAGE_SHIFT |
	       ((unsigned long)p & ~PAGE_MASK);
}

void *shim_va(unsigned long pa)
{
	unsigned int hfn = pa >> PAGE_SHIFT & HFN_MASK, tag = pa >> (PAGE_SHIFT + HFN_BITS) & TAG_MASK;

	if (hfn < core.frames && core.frame_tag(core.machine, hfn) == tag)
		return core.memory + ((unsigned long)hfn << PAGE_SHIFT) + (pa & ~PAGE_MASK);
	/* The table was freed: the oracle reports that a walk goes through it, and the walk finds nothing there. */
	core.table_holds(core.machine, here->api.id, here->api.vm, (u64)pa | RWX, here->at.level, here->at.gfn);
	memset(void_table, 0, sizeof(void_table));
	return void_table;
}

struct page *shim_page_of(unsigned long pfn)
{
	static struct page none;
	unsigned int hfn = pfn & HFN_MASK;

	if (hfn >= core.frames || !hfn)
		return &none;
	return &pages[hfn];
}

/* --- objects: after their end nothing can touch them --------------------------------------------------------------- */
static unsigned char *objects;
static unsigned char *object_live;
static unsigned int *free_objects; /* a ring: the object that was freed first is allocated first */
static unsigned long freed_first, freed_last, objects_used;
static spinlock_t objects_lock;

static void *object_at(unsigned int number)
{
	return objects + (unsigned long)number * PAGE_SIZE;
}

static unsigned int object_number(void)
{
	unsigned int number = OBJECTS;

	if (freed_last - freed_first > QUARANTINE || objects_used == OBJECTS) {
		if (freed_first != freed_last)
			number = free_objects[freed_first++ % OBJECTS];
	} else {
		number = (unsigned int)objects_used++;
	}
	return number;
}

void *shim_object_alloc(void)
{
	unsigned int number;

	shim_spin_lock(&objects_lock);
	number = object_number();
	shim_spin_unlock(&objects_lock);
	if (number == OBJECTS || mprotect(object_at(number), PAGE_SIZE, PROT_READ | PROT_WRITE))
		shim_bug("kmem_cache_alloc", 0, "the shim is out of objects");
	object_live[number] = 1;
	here->fresh_object = object_at(number);
	return object_at(number);
}

void shim_object_free(void *object)
{
	unsigned int number = (unsigned int)(((unsigned long)object - (unsigned long)objects) / PAGE_SIZE);

	if (!object)
		return;
	if ((unsigned char *)object < objects || number >= OBJECTS ||
	    !__atomic_exchange_n(&object_live[number], 0, __ATOMIC_ACQ_REL))
		shim_bug("kmem_cache_free", 0, "an object is freed that is not allocated, or freed twice");
	if (mmap(object, PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != object)
		shim_bug("kmem_cache_free", 0, "mmap failed");
	shim_spin_lock(&objects_lock);
	free_objects[freed_last++ % OBJECTS] = number;
	shim_spin_unlock(&objects_lock);
}

bool shim_is_object(const void *p)
{
	return (const unsigned char *)p >= objects && (const unsigned char *)p < objects + (unsigned long)OBJECTS * PAGE_SIZE;
}

/* --- accesses to SPTEs --------------------------------------------------------------------------------------------- */
enum where { ELSEWHERE, IN_TABLE, IN_FREED_TABLE };

static enum where spte_at(const volatile void *p, unsigned int *hfn)
{
	u64 link;

	if (!in_frames(p, hfn))
		return ELSEWHERE;
	if (!__atomic_load_n(&live[*hfn], __ATOMIC_ACQUIRE)) {
		/* Make the link of the frame's earlier life, so that the oracle reports it. */
		link = (u64)(core.frame_tag(core.machine, *hfn) - 1 & TAG_MASK) << HFN_BITS | *hfn;
		core.table_holds(core.machine, here->api.id, here->api.vm, link << PAGE_SHIFT | RWX, here->at.level,
				 here->at.gfn);
		return IN_FREED_TABLE;
	}
	here->at = glue_place((void *)pages[*hfn].private, (unsigned int)((unsigned long)p & ~PAGE_MASK) / 8);
	here->last = p;
	return IN_TABLE;
}

static bool is_leaf(u64 spte, unsigned int level)
{
	return (spte & RWX) && (level == 1 || spte & LEAF);
}

static bool is_link(u64 spte, unsigned int level)
{
	return (spte & RWX) && level > 1 && !(spte & LEAF);
}

/* Return for how many SPTEs the one that was read counts: a whole chunk if the operation looks for such an SPTE. */
static unsigned int time_of(u64 spte)
{
	bool sought = here->operation == OPERATION_SPLIT ? is_leaf(spte, here->at.level) :
							    here->operation == OPERATION_RECOVER &&
							    is_link(spte, here->at.level);

	return sought && here->at.level == 2 && here->api.chunk ? here->api.chunk : 1;
}

void shim_reads(const volatile void *p)
{
	unsigned int hfn, before;

	if (spte_at(p, &hfn) != IN_TABLE)
		return;
	if (!here->api.rcu_depth && here->api.lock != SHIM_WRITE)
		finding(FINDING_LOCKDEP, "tdp_mmu.c", 0, "an SPTE is read outside of RCU and of mmu_lock for write");
	here->flushed_last = false;
	here->last_value = *(const volatile u64 *)p;
	before = here->looked;
	here->looked += time_of(here->last_value);
	if (!before || before / here->api.chunk != here->looked / here->api.chunk)
		point(POINT_SPTES, here->operation != OPERATION_FAULT);
}

/* Return the SPTE of a huge leaf that replaces a table of 4K leafs (recover_huge_pages_range()), with the custody of
 * its block of frames. */
static u64 recovered(u64 link, u64 leaf)
{
	const u64 *table = (const u64 *)(core.memory + ((link >> PAGE_SHIFT & HFN_MASK) << PAGE_SHIFT));
	const u64 custody_mask = (u64)TAG_MASK << (PAGE_SHIFT + HFN_BITS);
	u64 hva = here->api.slot_hva + here->at.gfn - here->api.slot_base;
	int custody;

	for (unsigned int i = 0; i < 512; i++) {
		u64 child = __atomic_load_n(&table[i], __ATOMIC_ACQUIRE);

		if (!is_leaf(child, 1))
			continue;
		custody = core.huge_custody(core.machine, here->api.vm, hva + i, child >> PAGE_SHIFT & HFN_MASK,
					    child >> (PAGE_SHIFT + HFN_BITS) & TAG_MASK);
		if (custody >= 0)
			return (leaf & ~custody_mask) | (u64)custody << (PAGE_SHIFT + HFN_BITS);
		break;
	}
	return leaf;
}

static u64 with_custody(u64 old, u64 value)
{
	if (here->operation == OPERATION_RECOVER && is_link(old, here->at.level) && is_leaf(value, here->at.level))
		return recovered(old, value);
	if (here->at.level > 1 && is_leaf(old, here->at.level) && is_link(value, here->at.level))
		core.split_custody(core.machine, value >> PAGE_SHIFT & HFN_MASK, old, here->at.level);
	return value;
}

/* Note as a step the right that a change of an SPTE takes away. */
static void note(u64 old, u64 value)
{
	u64 npages = 1ULL << 9 * (here->at.level - 1);
	bool link = is_link(old, here->at.level);

	if (!(old & RWX))
		return;
	if (!(value & RWX))
		here->unflushed++;
	if (link && !is_link(value, here->at.level))
		shim_step(STEP_UNLINKED, here->at.gfn, npages);
	else if (!link && !(value & RWX))
		shim_step(STEP_ZAPPED, here->at.gfn, npages);
	else if (!link && old & ~value & WRITABLE)
		shim_step(STEP_PROTECTED, here->at.gfn, npages);
}

enum { STEP_CMPXCHG, STEP_XCHG, STEP_STORE, STEP_FETCH_AND };

/* Change an SPTE; return false if p is none.  In a freed table change nothing, and set *old to a value that no caller
 * expects. */
static bool change(volatile void *p, unsigned int step, u64 *old, u64 value)
{
	enum where where;
	unsigned int hfn;
	int r;

	where = spte_at(p, &hfn);
	if (where == IN_FREED_TABLE)
		*old = ~*old & ~(u64)RWX;
	if (where != IN_TABLE)
		return where == IN_FREED_TABLE;
	point(POINT_SPTE, true);
	if (step != STEP_FETCH_AND)
		value = with_custody(step == STEP_CMPXCHG ? *old : *(volatile u64 *)p, value);
	r = core.spte_change(core.machine, here->api.id, here->api.vm, hfn,
			     (unsigned int)((unsigned long)p & ~PAGE_MASK) / 8, here->at.level, here->at.gfn, step, old,
			     value);
	if (r && r != core.again)
		shim_give_up(r);
	here->last_value = *old;
	here->pfn_set = false;
	if (!r && step == STEP_FETCH_AND)
		value &= *old;
	if (!r && *old != value) {
		here->api.changed++;
		note(*old, value);
	}
	return true;
}

bool shim_stores(volatile void *p, u64 value)
{
	u64 old = 0;

	return change(p, STEP_STORE, &old, value);
}

u64 shim_xchg(volatile void *p, u64 value)
{
	u64 old = 0;

	if (change(p, STEP_XCHG, &old, value))
		return old;
	return __atomic_exchange_n((volatile u64 *)p, value, __ATOMIC_SEQ_CST);
}

u64 shim_cmpxchg(volatile void *p, u64 old, u64 value)
{
	if (!change(p, STEP_CMPXCHG, &old, value))
		__atomic_compare_exchange_n((volatile u64 *)p, &old, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	return old;
}

u64 shim_fetch_and(volatile void *p, u64 mask)
{
	u64 old = 0;

	if (change(p, STEP_FETCH_AND, &old, mask))
		return old;
	return __atomic_fetch_and((volatile u64 *)p, mask, __ATOMIC_SEQ_CST);
}

/* --- locks ----------------------------------------------------------------------------------------------------------- */
void cpu_relax(void)
{
	sched_yield();
}

void shim_spin_lock(spinlock_t *lock)
{
	int free;

	while (free = 0, !__atomic_compare_exchange_n(&lock->held, &free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		sched_yield();
	if (lock != &objects_lock)
		here->spin = lock;
}

void shim_spin_unlock(spinlock_t *lock)
{
	if (!lock->held)
		shim_bug("spin_unlock", 0, "the lock is not held");
	if (lock != &objects_lock)
		here->spin = NULL;
	__atomic_store_n(&lock->held, 0, __ATOMIC_RELEASE);
}

void shim_lock(rwlock_t *lock, int how)
{
	int r;

	(void)lock;
	if (here->api.lock)
		shim_bug("mmu_lock", 0, "it is taken twice by a thread");
	point(POINT_MMU_LOCK, how == SHIM_WRITE);
	r = (how == SHIM_WRITE ? core.write_lock : core.read_lock)(core.machine, here->api.id, here->api.vm);
	if (r)
		shim_give_up(r);
	here->api.lock = (unsigned int)how;
}

void shim_unlock(rwlock_t *lock, int how)
{
	(void)lock;
	if (here->api.lock != (unsigned int)how)
		shim_bug("mmu_lock", 0, "it is released by a thread that does not hold it so");
	unlock((unsigned int)how);
	point(POINT_MMU_LOCK, how == SHIM_WRITE);
}

int shim_mmu_lock_held(const void *lock)
{
	(void)lock;
	return (int)here->api.lock;
}

void shim_assert_lock(int held, int how, const char *file, int line)
{
	if (!(held & how) && !(how == SHIM_READ && held == SHIM_WRITE))
		finding(FINDING_LOCKDEP, file, line, "lockdep: the lock is not held");
}

bool shim_need_resched(void)
{
	return here->api.resched && here->looked >= here->api.resched;
}

bool shim_needbreak(void)
{
	return core.needbreak(core.machine, here->api.vm);
}

void shim_yield(rwlock_t *lock, int how)
{
	bool scheduled = shim_need_resched(), pending = here->unflushed || here->flushed_last;
	unsigned int hfn = 0;
	const void *sp = here->last && in_frames(here->last, &hfn) ? (void *)pages[hfn].private : NULL;
	bool was_valid = sp && !glue_root_invalid(sp);

	if (here->api.rcu_depth)
		finding(FINDING_LOCKDEP, "tdp_mmu.c", 0, "mmu_lock is dropped for another thread inside RCU");
	shim_step(STEP_YIELDED, here->at.gfn, 1);
	shim_unlock(lock, how);
	if (scheduled)
		python(CALL_SCHEDULE, 0, 0, NULL);
	shim_lock(lock, how);
	here->looked = here->unflushed = 0;
	here->flushed_last = false;
	/* The walk has a reference on its root, but the table of its last SPTE may be gone. */
	python(CALL_YIELDED, pending, was_valid && live[hfn] && glue_root_invalid(sp), NULL);
}

/* --- RCU -------------------------------------------------------------------------------------------------------------- */
void rcu_read_lock(void)
{
	core.rcu_read_lock(core.machine, here->api.id);
	here->api.rcu_depth++;
}

void rcu_read_unlock(void)
{
	if (!here->api.rcu_depth)
		shim_bug("rcu_read_unlock", 0, "RCU's read section is left twice");
	here->api.rcu_depth--;
	core.rcu_read_unlock(core.machine, here->api.id);
	if (!here->api.error)
		point(POINT_RCU, true);
}

static void run_callback(unsigned int cpu, u64 argument)
{
	struct rcu_head *head = (struct rcu_head *)(unsigned long)argument;
	struct shim_cpu *before = here;

	here = &cpus[cpu];
	here->api.inside = 1;
	here->entry = __builtin_frame_address(0);
	head->func(head);
	here->api.inside = 0;
	here = before;
}

void shim_call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head))
{
	int r;

	point(POINT_CALL_RCU, true);
	head->func = func;
	r = core.queue_callback(core.machine, here->api.id, core.rcu_function, (u64)(unsigned long)head);
	if (r < 0)
		shim_give_up(r);
}

void rcu_barrier(void)
{
	int r = core.rcu_barrier(core.machine, here->api.id);

	if (r < 0)
		shim_give_up(r);
}

/* --- work queues: the thread that flushes a queue executes its work ---------------------------------------------- */
static spinlock_t works_lock;

bool queue_work(struct workqueue_struct *queue, struct work_struct *work)
{
	shim_spin_lock(&works_lock);
	work->next = queue->first;
	queue->first = work;
	shim_spin_unlock(&works_lock);
	return true;
}

void flush_workqueue(struct workqueue_struct *queue)
{
	for (;;) {
		struct work_struct *work;

		shim_spin_lock(&works_lock);
		work = queue->first;
		if (work)
			queue->first = work->next;
		shim_spin_unlock(&works_lock);
		if (!work)
			return;
		work->func(work);
	}
}

/* --- the rest of KVM: this file includes no prototypes of the tree's, because versions differ in them ------------- */
static void flush(unsigned int what, u64 a, u64 b)
{
	bool pending = here->unflushed;

	python(what, a, b, NULL);
	shim_step(STEP_FLUSHED, a, b);
	here->unflushed = 0;
	here->flushed_last = pending;
}

void kvm_flush_remote_tlbs(void *kvm)
{
	(void)kvm;
	flush(CALL_FLUSH, 0, 0);
}

void kvm_flush_remote_tlbs_range(void *kvm, u64 gfn, u64 npages)
{
	(void)kvm;
	flush(CALL_FLUSH_RANGE, gfn, npages);
}

void kvm_flush_remote_tlbs_with_address(void *kvm, u64 gfn, u64 npages)
{
	kvm_flush_remote_tlbs_range(kvm, gfn, npages);
}

void kvm_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	(void)kvm;
	(void)slot;
	flush(CALL_FLUSH_SLOT, 0, 0);
}

void kvm_arch_flush_remote_tlbs_memslot(void *kvm, const void *slot)
{
	kvm_flush_remote_tlbs_memslot(kvm, slot);
}

void mark_page_dirty_in_slot(void *kvm, const void *slot, u64 gfn)
{
	(void)kvm;
	(void)slot;
	python(CALL_DIRTY, gfn, 0, NULL);
}

/* Do kvm_set_pfn_dirty() or kvm_set_pfn_accessed(): the pfn is that of the SPTE that this CPU changed last. */
static void set_pfn(void)
{
	if (!here->pfn_set)
		core.set_pfn(core.machine, here->api.id, here->api.vm, here->at.gfn, here->last_value, here->at.level);
	here->pfn_set = true;
}

void kvm_set_pfn_dirty(u64 pfn)
{
	(void)pfn;
	set_pfn();
}

void kvm_set_pfn_accessed(u64 pfn)
{
	(void)pfn;
	set_pfn();
}

int mmu_try_to_unsync_pages(void)
{
	return 0;
}

int kvm_mmu_max_mapping_level(u64 kvm, u64 second, u64 third, u64 fourth)
{
	u64 arguments[] = { kvm, second, third, fourth };

	return python(CALL_MAX_LEVEL, arguments[TREE_ARG_kvm_mmu_max_mapping_level_gfn], 0, NULL);
}

/* --- beginning -------------------------------------------------------------------------------------------------------- */
static int make_objects(void)
{
	objects = mmap(NULL, (unsigned long)OBJECTS * PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	object_live = calloc(OBJECTS, 1);
	free_objects = calloc(OBJECTS, sizeof(*free_objects));
	return objects != MAP_FAILED && object_live && free_objects;
}

int shim_attach(const struct tree_core *given, unsigned int object_size, int report_fd)
{
	core = *given;
	free(cpus);
	free(pages);
	free(live);
	cpus = calloc(core.cpus, sizeof(*cpus));
	pages = calloc(core.frames, sizeof(*pages));
	live = calloc(core.frames, 1);
	if (!cpus || !pages || !live || object_size > PAGE_SIZE || (!objects && !make_objects()))
		return core.nomem;
	for (unsigned int i = 0; i < core.cpus; i++)
		cpus[i].api.id = i;
	shim_catch_crashes(report_fd);
	return 0;
}

void *shim_rcu_function(void)
{
	return run_callback;
}
