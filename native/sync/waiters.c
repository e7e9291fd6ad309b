#include "sync/waiters.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "sync/cpu.h"

/* P1 of cpu.h, from both sides. */
#define SEQ_CST memory_order_seq_cst

int waiters_init(struct waiters *waiters, const struct machine *m)
{
	waiters->words = (m->cpu_count + 63) / 64;
	waiters->mask = heap_zalloc(m->heap, waiters->words, sizeof(*waiters->mask));
	return waiters->mask ? 0 : MACHINE_NOMEM;
}

void waiters_fini(struct waiters *waiters, const struct machine *m)
{
	heap_free(m->heap, waiters->mask);
	waiters->mask = NULL;
}

void waiters_add(struct waiters *waiters, uint32_t cpu)
{
	_Atomic uint64_t *word = &waiters->mask[cpu / 64];
	uint64_t bit = 1ull << (cpu % 64);

	if (!(atomic_load_explicit(word, SEQ_CST) & bit))
		atomic_fetch_or_explicit(word, bit, SEQ_CST);
}

void waiters_wake(struct machine *m, struct waiters *waiters)
{
	for (uint32_t i = 0; i < waiters->words; i++) {
		uint64_t bits = atomic_load_explicit(&waiters->mask[i], SEQ_CST);

		if (bits)
			bits = atomic_exchange_explicit(&waiters->mask[i], 0, SEQ_CST);
		for (; bits; bits &= bits - 1)
			cpu_wake(m, i * 64 + (uint32_t)__builtin_ctzll(bits));
	}
}
