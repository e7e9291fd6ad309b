/* Words of user memory.  See mm_word.h. */
#include "memory/mm_word.h"

#include "core/machine_types.h"
#include "memory/frame.h"
#include "memory/mm.h"
#include "memory/mm_internal.h"
#include "vm/vm.h"

/* Lock the region of a page and find a word of it.  0: *at may be used until mm_region_unlock(*r); else nothing is
 * locked. */
static int word_lock(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, bool write,
		     struct mm_region **r, _Atomic uint64_t **at)
{
	struct mm *mm = m->vms[vm].mm;
	uint64_t entry;

	if (hva >= mm->pages || word >= FRAME_WORDS)
		return mm_misuse(m, cpu, "access beyond it", hva);
	*r = mm_region_lock(mm, hva);
	entry = mm_get(mm, hva);
	if (!(entry & MM_PRESENT) || (write && (entry & (MM_READONLY | MM_COW)))) {
		mm_region_unlock(*r);
		return MACHINE_AGAIN;
	}
	*at = frame_words(m->frames, mm_hfn(entry)) + word;
	return 0;
}

int mm_read_word(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, uint64_t *value)
{
	_Atomic uint64_t *at;
	struct mm_region *r;
	int error = word_lock(m, cpu, vm, hva, word, false, &r, &at);

	if (error)
		return error;
	/* Relaxed here and below: guest memory, which only the guest orders. */
	*value = atomic_load_explicit(at, memory_order_relaxed);
	mm_region_unlock(r);
	return 0;
}

int mm_write_word(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, uint64_t value)
{
	_Atomic uint64_t *at;
	struct mm_region *r;
	int error = word_lock(m, cpu, vm, hva, word, true, &r, &at);

	if (error)
		return error;
	atomic_store_explicit(at, value, memory_order_relaxed);
	mm_region_unlock(r);
	return 0;
}

int mm_cmpxchg_word(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t hva, uint32_t word, uint64_t *old,
		    uint64_t value)
{
	_Atomic uint64_t *at;
	struct mm_region *r;
	int error = word_lock(m, cpu, vm, hva, word, true, &r, &at);
	bool swapped;

	if (error)
		return error;
	swapped = atomic_compare_exchange_strong_explicit(at, old, value, memory_order_relaxed, memory_order_relaxed);
	mm_region_unlock(r);
	return !swapped;
}
