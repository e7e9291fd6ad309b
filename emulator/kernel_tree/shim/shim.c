/* The machine under a tree's TDP MMU that is compared with the model: pages, accesses to SPTEs, and a log of events.
 *
 * One thread.  A freed page table is not used again before the next start, so that every later access to it is noticed.
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
static char words[256];

void shim_reset(void)
{
	memset(pool, 0, (size_t)next_page * 4096);
	memset(pages, 0, sizeof(pages));
	memset(freed, 0, sizeof(freed));
	memset(objects, 0, (size_t)next_object * OBJECT);
	next_page = live_pages = next_object = 0;
	shim_reset_rcu();
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
