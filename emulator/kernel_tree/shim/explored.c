/* Steps of an explored execution: what the tree's code is about to read or write, told to Python before it does.
 *
 * Python may let other tasks run meanwhile, on other CPUs of the machine and on this thread.  So an access first tells
 * its step, and only then looks at memory.
 *
 * A walk reads hundreds of SPTEs that are not present.  Neighbours of such an SPTE that are not present either belong
 * to its step: a run of them is read, or frozen, at once. */
#include "linux.h"
#include "machine_internal.h"

bool shim_explored(void)
{
	return here && here->api.inside && here->api.points == POINTS_STEPS;
}

int shim_tell(unsigned int what, u64 a, u64 b)
{
	struct shim_cpu *cpu = here;
	int r;

	if (!shim_explored())
		return 0;
	r = core.call(cpu->api.id, what, a, b, NULL);
	here = cpu;
	return r;
}

/* Return the bits of an SPTE's level and gfn.  A huge leaf has all of them: the right of each of its pages is one. */
static u64 bits_of(u64 access)
{
	static const unsigned int first[] = { 0, 0, 8, 12, 14, 15 }, count[] = { 1, 8, 4, 2, 1, 1 };
	unsigned int level = here->at.level < 5 ? here->at.level : 5;

	if (access & ACCESS_LEAF && level > 1)
		return (1 << SPTE_BITS) - 1;
	return 1 << (first[level] + (here->at.gfn >> 9 * (level - 1)) % count[level]);
}

/* Return whether a change between these values neither grants a right nor takes one away. */
static bool idle(u64 spte, bool write, u64 value)
{
	return !glue_present(spte) && (!write || !glue_present(value));
}

static u64 access_of(u64 spte, bool write, u64 value)
{
	bool leaf = spte_is_leaf(spte, here->at.level) || (write && spte_is_leaf(value, here->at.level));

	return (write ? ACCESS_WRITE : 0) | (leaf ? ACCESS_LEAF : 0);
}

/* Add the access to the step of the one before, which was one to an SPTE that is not present. */
static void in_run(unsigned int table, u64 access)
{
	u64 bits = bits_of(access), told = access & ACCESS_WRITE ? here->told_writes : here->told_reads;

	if (table == here->told_table && !(bits & ~told))
		return;
	shim_tell(CALL_MORE, access, bits);
	here->told_table = table;
	*(access & ACCESS_WRITE ? &here->told_writes : &here->told_reads) |= bits;
}

void shim_spte_step(const volatile u64 *sptep, unsigned int table, bool write, u64 value)
{
	u64 access, bits, later;

	here->api.table = table;
	here->api.index = (unsigned int)((unsigned long)sptep & ~PAGE_MASK) / 8;
	here->at = glue_place(shim_table_sp(table), here->api.index);
	access = access_of(*sptep, write, value);
	if (here->in_run && idle(*sptep, write, value)) {
		in_run(table, access);
		return;
	}
	bits = bits_of(access);
	shim_python(CALL_STEP, access, bits, NULL);
	/* Other tasks may have changed the SPTE since. */
	later = access_of(*sptep, write, value);
	if (later != access)
		shim_tell(CALL_MORE, later, bits_of(later));
	here->in_run = idle(*sptep, write, value);
	here->told_table = table;
	here->told_reads = write ? 0 : bits;
	here->told_writes = write ? bits : 0;
}

/* Do rwlock_needbreak(); in a run, once in a chunk of SPTEs, as the model does. */
bool shim_needbreak_step(void)
{
	if (here->in_run && here->looked % here->api.chunk)
		return false;
	return shim_python(CALL_NEEDBREAK, 0, 0, NULL);
}

void shim_shared(const volatile void *p, bool write)
{
	if (shim_explored())
		shim_python(CALL_SHARED, (u64)(unsigned long)p, write || here->operation == OPERATION_INVALIDATE, NULL);
}
