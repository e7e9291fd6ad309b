/* See bitops.h.  The memory is Python's (cffi), so its type cannot be atomic; every access to it goes through
 * here.  Sequentially consistent: a CPU that flushes clears or counts, then makes its requests.  A CPU that
 * loads a vCPU reads, and if it did not see this store, it sees the requests later (vcpu-requests.rst). */
#include "core/bitops.h"

#include <stdatomic.h>

#include "core/machine_types.h"

static _Atomic uint64_t *atomic_word(const uint64_t *word)
{
	return (_Atomic uint64_t *)(uintptr_t)word;
}

int test_bit(const uint64_t *words, uint32_t bit)
{
	return (atomic_load_explicit(atomic_word(&words[bit / 64]), memory_order_seq_cst) >> bit % 64) & 1;
}

int test_and_set_bit(uint64_t *words, uint32_t bit)
{
	uint64_t mask = UINT64_C(1) << bit % 64;

	if (test_bit(words, bit))
		return 1;
	return (atomic_fetch_or_explicit(atomic_word(&words[bit / 64]), mask, memory_order_seq_cst) & mask) != 0;
}

int test_and_clear_bit(uint64_t *words, uint32_t bit)
{
	uint64_t mask = UINT64_C(1) << bit % 64;

	return (atomic_fetch_and_explicit(atomic_word(&words[bit / 64]), ~mask, memory_order_seq_cst) & mask) != 0;
}

void set_bit(uint64_t *words, uint32_t bit)
{
	atomic_fetch_or_explicit(atomic_word(&words[bit / 64]), UINT64_C(1) << bit % 64, memory_order_seq_cst);
}

void clear_bit(uint64_t *words, uint32_t bit)
{
	atomic_fetch_and_explicit(atomic_word(&words[bit / 64]), ~(UINT64_C(1) << bit % 64), memory_order_seq_cst);
}

void bitmap_clear(uint64_t *words, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		atomic_store_explicit(atomic_word(&words[i]), 0, memory_order_seq_cst);
}

uint64_t atomic64_inc_return(uint64_t *counter)
{
	return atomic_fetch_add_explicit(atomic_word(counter), 1, memory_order_seq_cst) + 1;
}

uint64_t atomic64_read(const uint64_t *counter)
{
	return atomic_load_explicit(atomic_word(counter), memory_order_seq_cst);
}

void atomic64_set(uint64_t *counter, uint64_t value)
{
	atomic_store_explicit(atomic_word(counter), value, memory_order_seq_cst);
}
