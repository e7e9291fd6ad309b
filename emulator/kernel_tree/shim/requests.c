/* The primitives of kvm_main.c's requests and kicks.  The fields of a vCPU that CPUs share (mode, requests, cpu) and the
 * interrupts are the machine's: Python's model reads and changes them as its own code does. */
#include "linux.h"
#include "machine_internal.h"

#include <string.h>

enum { BITS = 64 };

unsigned long shim_vcpus, shim_vcpus_bytes;

/* --- fields of a vCPU ----------------------------------------------------------------------------------------------- */
static unsigned int vcpu_at(const volatile void *p, unsigned int wanted)
{
	unsigned int field, vcpu = glue_vcpu_at(p, &field);

	if (field == FIELD_NONE || (wanted != FIELD_NONE && field != wanted))
		shim_bug("struct kvm_vcpu", 0, "the shim has no such access to this field");
	return vcpu;
}

const void *shim_vcpu_value(const volatile void *p)
{
	unsigned int field, vcpu = vcpu_at(p, FIELD_NONE);

	glue_vcpu_at(p, &field);
	shim_python(CALL_VCPU, vcpu, field, NULL);
	here->value = here->api.value;
	return &here->value;
}

const void *shim_vcpu_cmpxchg(volatile void *p, u64 old, u64 value)
{
	unsigned int vcpu = vcpu_at(p, FIELD_MODE);

	if (!glue_exits_guest(old, value))
		shim_bug("vcpu->mode", 0, "the shim can exchange IN_GUEST_MODE for EXITING_GUEST_MODE only");
	shim_python(CALL_EXITING, vcpu, 0, NULL);
	here->value = here->api.value;
	return &here->value;
}

void shim_set_bit(long bit, volatile void *p)
{
	if (shim_is_vcpu(p))
		shim_python(CALL_REQUEST, vcpu_at(p, FIELD_REQUESTS), (u64)bit, NULL);
	else
		shim_test_and_set_bit(bit, p);
}

bool shim_test_and_set_bit(long bit, volatile void *p)
{
	u64 mask = 1ULL << bit % BITS;
	volatile u64 *word = (volatile u64 *)p + bit / BITS;

	if (shim_is_vcpu(p))
		shim_bug("vcpu->requests", 0, "the shim has no test_and_set_bit() of a request");
	shim_shared(word, true);
	return __atomic_fetch_or(word, mask, __ATOMIC_SEQ_CST) & mask;
}

bool shim_test_and_clear_bit(long bit, volatile void *p)
{
	u64 mask = 1ULL << bit % BITS;
	volatile u64 *word = (volatile u64 *)p + bit / BITS;

	if (shim_is_vcpu(p))
		return shim_python(CALL_CHECK, vcpu_at(p, FIELD_REQUESTS), (u64)bit, NULL);
	shim_shared(word, true);
	return __atomic_fetch_and(word, ~mask, __ATOMIC_SEQ_CST) & mask;
}

bool shim_test_bit(long bit, const volatile void *p)
{
	const volatile u64 *word = (const volatile u64 *)p + bit / BITS;

	if (shim_is_vcpu(p))
		return shim_python(CALL_TEST, vcpu_at(p, FIELD_REQUESTS), (u64)bit, NULL);
	shim_shared(word, false);
	return __atomic_load_n(word, __ATOMIC_ACQUIRE) >> bit % BITS & 1;
}

/* --- masks of pCPUs: each CPU has one of its own -------------------------------------------------------------------- */
int shim_this_cpu(void)
{
	return (int)here->api.id;
}

struct cpumask *shim_kick_mask(void)
{
	return (struct cpumask *)here->api.kick_mask;
}

void shim_cpumask_clear(struct cpumask *mask)
{
	for (unsigned int i = 0; i < MASK_WORDS; i++)
		((u64 *)mask)[i] = 0;
}

bool shim_cpumask_change(unsigned int cpu, struct cpumask *mask, bool set)
{
	u64 *word = (u64 *)mask + cpu / BITS, bit = 1ULL << cpu % BITS;
	bool was;

	if (cpu >= MASK_WORDS * BITS)
		shim_bug("cpumask", 0, "there is no such CPU");
	was = *word & bit;
	*word = set ? *word | bit : *word & ~bit;
	return was;
}

bool shim_cpumask_test(unsigned int cpu, const struct cpumask *mask)
{
	return cpu < MASK_WORDS * BITS && ((const u64 *)mask)[cpu / BITS] >> cpu % BITS & 1;
}

/* --- flushes and interrupts ----------------------------------------------------------------------------------------- */
/* Note that the flush is complete, which the CPU has begun. */
static void flushed(void)
{
	bool pending = here->unflushed;

	if (!here->flush_due)
		return;
	here->flush_due = false;
	shim_step(STEP_FLUSHED, 0, 0);
	here->unflushed = 0;
	here->flushed_last = pending;
	shim_python(CALL_FLUSHED, 0, 0, NULL);
}

bool shim_cpumask_empty(const struct cpumask *mask)
{
	for (unsigned int i = 0; i < MASK_WORDS; i++)
		if (((const u64 *)mask)[i])
			return false;
	flushed();
	return true;
}

void shim_call_function_many(const struct cpumask *mask, void (*function)(void *argument), bool wait)
{
	if (!glue_is_kick(function))
		shim_bug("smp_call_function_many", 0, "the shim can call ack_kick() only on other CPUs");
	if ((const void *)mask != here->api.kick_mask)
		memcpy(here->api.kick_mask, mask, sizeof(here->api.kick_mask));
	shim_python(CALL_KICK, wait, 0, NULL);
	flushed();
}

int shim_flush_on_hyperv(void)
{
	here->flush_due = true;
	if (shim_python(CALL_FLUSH_DUE, 0, 0, NULL))
		return -EOPNOTSUPP;
	flushed();
	return 0;
}

int shim_flush_range_on_hyperv(u64 gfn, u64 npages)
{
	bool pending = here->unflushed;

	if (shim_python(CALL_FLUSH_RANGE_DUE, gfn, npages, NULL))
		return -EOPNOTSUPP;
	shim_step(STEP_FLUSHED, gfn, npages);
	here->unflushed = 0;
	here->flushed_last = pending;
	return 0;
}
