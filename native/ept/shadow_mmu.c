/* Steps of the shadow MMU.  See shadow_mmu.h.
 *
 * The gfns of a table's entries are kept beside the table's frame, and stay with it when it is freed: the next shadow
 * page on that frame overwrites them before it publishes an SPTE.
 */
#include "ept/shadow_mmu.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/spte.h"
#include "memory/frame.h"
#include "sync/cpu.h"
#include "sync/ipi.h"

static _Atomic(_Atomic uint64_t *) *gfns_of(const struct machine *m, uint32_t table)
{
	return &m->shadowed[table];
}

const _Atomic uint64_t *shadowed_gfns(const struct machine *m, uint32_t table)
{
	/* Acquire: pairs with the release of shadow_page_alloc(). */
	return atomic_load_explicit(gfns_of(m, table), memory_order_acquire);
}

static _Atomic uint64_t *writable_gfns(const struct machine *m, uint32_t table)
{
	return atomic_load_explicit(gfns_of(m, table), memory_order_acquire);
}

int64_t shadow_page_alloc(struct machine *m, uint32_t cpu, uint32_t kind)
{
	int64_t table = ept_table_alloc(m, cpu, kind);
	_Atomic uint64_t *gfns;

	if (table < 0 || shadowed_gfns(m, (uint32_t)table))
		return table;
	gfns = heap_zalloc(m->heap, FRAME_WORDS, sizeof(*gfns));
	if (!gfns) {
		ept_table_free(m, cpu, (uint32_t)table);
		return MACHINE_NOMEM;
	}
	/* Release: a CPU that finds the array sees its zeros. */
	atomic_store_explicit(gfns_of(m, (uint32_t)table), gfns, memory_order_release);
	return table;
}

uint64_t make_shadow_spte(uint32_t hfn, uint32_t custody, uint32_t level, uint32_t access, int host_writable)
{
	uint64_t spte = make_spte(hfn, custody, level, access & SPTE_WRITABLE, host_writable);

	return (spte & ~(uint64_t)SPTE_EXECUTABLE) | (access & (SPTE_EXECUTABLE | SPTE_USER | SPTE_GLOBAL));
}

static int misuse(struct machine *m, uint32_t cpu, const char *what, uint64_t value)
{
	return cpu_misuse(m, cpu, "set shadow SPTE: %s (0x%llx)", what, (unsigned long long)value);
}

static int check(struct machine *m, uint32_t cpu, uint32_t table, uint32_t index)
{
	if (!table || !ept_is_table(m, table) || !shadowed_gfns(m, table))
		return misuse(m, cpu, "not a shadow page", table);
	if (index >= FRAME_WORDS)
		return misuse(m, cpu, "index", index);
	return 0;
}

uint64_t shadow_mmu_set_spte(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			     uint32_t level, uint64_t gfn, uint64_t new_spte)
{
	struct spte_place at = { table, index, level, gfn };
	_Atomic uint64_t *recorded;
	uint64_t before;

	if (check(m, cpu, table, index))
		return UINT64_MAX;
	recorded = &writable_gfns(m, table)[index];
	/* Relaxed here and below: written under mmu_lock; a walker reads it between two acquire loads of the SPTE. */
	before = atomic_load_explicit(recorded, memory_order_relaxed);
	if (!is_last_spte(new_spte, level)) {
		at.gfn = before;
		return spte_set(m, cpu, vm, &at, new_spte);
	}
	if (before != gfn && is_last_spte(spte_read(m, table, index), level)) {
		misuse(m, cpu, "a leaf replaces that of another gfn", gfn);
		return UINT64_MAX;
	}
	/* Before the SPTE, which is stored with release: a walker that reads the new SPTE reads its gfn. */
	atomic_store_explicit(recorded, gfn, memory_order_relaxed);
	return spte_set(m, cpu, vm, &at, new_spte);
}

int shadow_mmu_set_spte_atomic(struct machine *m, uint32_t cpu, uint32_t vm, uint32_t table, uint32_t index,
			       uint32_t level, uint64_t old_spte, uint64_t new_spte)
{
	struct spte_place at = { table, index, level, 0 };

	if (check(m, cpu, table, index))
		return MACHINE_MISUSE;
	if (!is_last_spte(old_spte, level) || !is_last_spte(new_spte, level))
		return misuse(m, cpu, "compare and swap of what is no leaf", new_spte);
	at.gfn = kvm_mmu_page_get_gfn(m, table, index);
	return spte_set_atomic(m, cpu, vm, &at, old_spte, new_spte);
}

uint64_t mmu_spte_get_lockless(struct machine *m, uint32_t cpu, uint32_t vm, uint64_t link, uint32_t level,
			       uint64_t page)
{
	uint64_t spte;

	ipi_drain(m, cpu);
	if (!spte_child_holds(m, cpu, vm, link, level + 1, page))
		return 0;
	spte = spte_read(m, spte_hfn(link), page >> (level - 1) * 9 & 511);
	/* The table may have been freed, and reused, before the entry was read. */
	return spte_child_holds(m, cpu, vm, link, level + 1, page) ? spte : 0;
}

uint32_t spte_next(struct machine *m, uint32_t table, uint32_t index)
{
	while (index < FRAME_WORDS && !spte_read(m, table, index))
		index++;
	return index;
}

uint64_t kvm_mmu_page_get_gfn(struct machine *m, uint32_t table, uint32_t index)
{
	const _Atomic uint64_t *gfns = ept_is_table(m, table) ? shadowed_gfns(m, table) : NULL;

	return gfns ? atomic_load_explicit(&gfns[index % FRAME_WORDS], memory_order_relaxed) : 0;
}

int shadow_mmu_create(struct machine *m)
{
	m->shadowed = heap_zalloc(m->heap, m->frames->pool[FRAME_GUEST].first, sizeof(*m->shadowed));
	return m->shadowed ? 0 : MACHINE_NOMEM;
}

void shadow_mmu_destroy(struct machine *m)
{
	uint32_t tables = m->frames && m->shadowed ? m->frames->pool[FRAME_GUEST].first : 0;

	for (uint32_t table = 0; table < tables; table++)
		heap_free(m->heap, writable_gfns(m, table));
	heap_free(m->heap, m->shadowed);
	m->shadowed = NULL;
}
