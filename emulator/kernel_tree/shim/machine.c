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

__thread struct shim_cpu *here;
char shim_last_bug[BUG_TEXT];
struct tree_core core;

static struct shim_cpu *cpus;
static struct page *pages;      /* by frame */
static unsigned char *live;     /* by frame: it is a table of the tree's */
/* Empty: walks read it for a freed table. */
static __thread unsigned char void_table[4096] __attribute__((aligned(4096)));

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
	here->flushed_last = here->in_run = here->flush_due = false;
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

void shim_release(unsigned int how)
{
	here->api.lock = 0;
	if (shim_explored())
		shim_tell(CALL_UNLOCK, how == SHIM_WRITE, 0);
	else
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
		shim_release(here->api.lock);
	_longjmp(here->unwind, 1);
}

int shim_python(unsigned int what, u64 a, u64 b, const char *text)
{
	struct shim_cpu *cpu = here;
	int r;

	cpu->in_run = false;
	r = core.call(cpu->api.id, what, a, b, text);
	/* Operations on other CPUs may have begun on this thread meanwhile. */
	here = cpu;
	if (r < 0)
		shim_give_up(r);
	return r;
}

void shim_point(unsigned int kind, bool write)
{
	if (here->api.points == POINTS_DELAYS)
		shim_python(CALL_POINT, kind, write, NULL);
}

/* --- complaints --------------------------------------------------------------------------------------------------- */
void shim_finding(unsigned int kind, const char *file, int line, const char *function, const char *what)
{
	char text[512];
	const char *name = strstr(file, "arch/x86/kvm/");

	snprintf(text, sizeof(text), "%s:%d%s%s%s: %s", name ? name : file, line, function ? " in " : "",
		 function ? function : "", function ? "()" : "", what);
	shim_python(CALL_WARN, kind, 0, text);
}

void shim_warn(const char *file, int line, const char *function, const char *what)
{
	shim_finding(FINDING_WARN, file, line, function, what);
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
	shim_python(CALL_WARN, FINDING_MISSING, 0, text);
}

/* --- pages ---------------------------------------------------------------------------------------------------------- */
bool shim_in_frames(const volatile void *p, unsigned int *hfn)
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

	shim_point(POINT_FRAMES, true);
	hfn = shim_explored() ? shim_tell(CALL_ALLOC, kind, 0) : core.table_alloc(core.machine, here->api.id, kind);
	if (hfn < 0) {
		if (gfp == GFP_NOWAIT && hfn == core.nomem)
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
	if (!shim_in_frames((void *)page, &hfn) || !__atomic_exchange_n(&live[hfn], 0, __ATOMIC_ACQ_REL))
		shim_bug("free_page", 0, "a page is freed that is not allocated, or freed twice");
	shim_step(STEP_FREED, hfn, 1);
	if (shim_explored())
		shim_python(CALL_FREE, hfn, 0, NULL);
	else
		core.table_free(core.machine, here->api.id, hfn);
}

unsigned long shim_pa(const void *p)
{
	unsigned int hfn;

	if (p == void_table)
		return 0;
	if (!shim_in_frames(p, &hfn))
		shim_bug("__pa", 0, "the address is no page table's");
	return ((unsigned long)core.frame_tag(core.machine, hfn) << HFN_BITS | hfn) << PAGE_SHIFT |
	       ((unsigned long)p & ~PAGE_MASK);
}

void *shim_va(unsigned long pa)
{
	unsigned int hfn = pa >> PAGE_SHIFT & HFN_MASK, tag = pa >> (PAGE_SHIFT + HFN_BITS) & TAG_MASK;

	shim_tell(CALL_TABLE, hfn, 0);
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

bool shim_table_lives(unsigned int hfn)
{
	return __atomic_load_n(&live[hfn], __ATOMIC_ACQUIRE);
}

void *shim_table_sp(unsigned int hfn)
{
	return (void *)pages[hfn].private;
}

bool shim_keep_memory(void)
{
	return shim_keep(cpus, core.cpus * sizeof(*cpus)) && shim_keep(pages, core.frames * sizeof(*pages)) &&
	       shim_keep(live, core.frames);
}

/* --- beginning -------------------------------------------------------------------------------------------------------- */
int shim_attach(const struct tree_core *given, unsigned int object_size, int report_fd)
{
	core = *given;
	free(cpus);
	free(pages);
	free(live);
	cpus = calloc(core.cpus, sizeof(*cpus));
	pages = calloc(core.frames, sizeof(*pages));
	live = calloc(core.frames, 1);
	if (!cpus || !pages || !live || object_size > PAGE_SIZE || !shim_make_objects())
		return core.nomem;
	for (unsigned int i = 0; i < core.cpus; i++)
		cpus[i].api.id = i;
	shim_make_steps();
	shim_catch_crashes(report_fd);
	return 0;
}
