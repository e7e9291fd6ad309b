/* Guest-physical memory of one guest OS: free lists, last in first out, and users of each page. */
#include "guest/guest_pages.h"

#include <string.h>

#include "core/heap.h"
#include "core/machine_types.h"
#include "vm/guest_state.h"

enum { BLOCK_GFNS = 512 };

static uint64_t ram_gfns(const struct guest *g)
{
	return g->config.end_gfn - g->config.first_gfn;
}

static uint64_t mmio_gfns(const struct guest *g)
{
	return g->config.mmio_gfn ? g->config.mmio_end_gfn - g->config.mmio_gfn : 0;
}

static bool is_mmio(const struct guest *g, uint64_t gfn)
{
	return g->config.mmio_gfn && gfn >= g->config.mmio_gfn && gfn < g->config.mmio_end_gfn;
}

static uint16_t *users_of(struct guest *g, uint64_t gfn)
{
	return is_mmio(g, gfn) ? &g->mmio_users[gfn - g->config.mmio_gfn]
			       : &g->users[gfn - g->config.first_gfn];
}

/* Pages of vCPUs that share a range lie side by side, so that they share EPT pages, too. */
static bool is_own(const struct guest *g, uint64_t unit)
{
	return !g->config.stride || unit % g->config.stride == g->config.phase;
}

/* Put the upper half of memory in blocks for 2 MiB pages, if the guest uses them; the rest singly. */
static void fill_stacks(struct guest *g)
{
	uint64_t first = g->config.first_gfn, end = g->config.end_gfn;

	if (g->config.hugepages) {
		uint64_t half = first + ram_gfns(g) / 2;
		uint64_t block = (half + BLOCK_GFNS - 1) / BLOCK_GFNS * BLOCK_GFNS;

		for (uint64_t gfn = block; gfn + BLOCK_GFNS <= end; gfn += BLOCK_GFNS)
			if (is_own(g, gfn / BLOCK_GFNS))
				g->free_block[g->free_blocks++] = (uint32_t)gfn;
		if (block < end)
			end = block;
	}
	for (uint64_t gfn = end; gfn > first; gfn--)
		if (is_own(g, gfn - 1))
			g->free_gfn[g->free_count++] = (uint32_t)(gfn - 1);
	for (uint64_t gfn = g->config.mmio_end_gfn; mmio_gfns(g) && gfn > g->config.mmio_gfn; gfn--)
		if (is_own(g, gfn - 1))
			g->free_mmio[g->free_mmio_count++] = (uint32_t)(gfn - 1);
}

void guest_memory_reset(struct guest *g)
{
	if (!g->users)
		return;
	memset(g->users, 0, ram_gfns(g) * sizeof(*g->users));
	memset(g->mmio_users, 0, mmio_gfns(g) * sizeof(*g->mmio_users));
	g->free_count = g->free_blocks = g->free_mmio_count = 0;
	fill_stacks(g);
}

int guest_memory_create(struct machine *m, struct guest *g)
{
	uint64_t ram = ram_gfns(g), mmio = mmio_gfns(g);

	g->free_gfn = heap_zalloc(m->heap, ram + 1, sizeof(*g->free_gfn));
	g->free_block = heap_zalloc(m->heap, ram / BLOCK_GFNS + 1, sizeof(*g->free_block));
	g->users = heap_zalloc(m->heap, ram + 1, sizeof(*g->users));
	g->free_mmio = heap_zalloc(m->heap, mmio + 1, sizeof(*g->free_mmio));
	g->mmio_users = heap_zalloc(m->heap, mmio + 1, sizeof(*g->mmio_users));
	if (!g->free_gfn || !g->free_block || !g->users || !g->free_mmio || !g->mmio_users) {
		guest_memory_destroy(m, g);
		return MACHINE_NOMEM;
	}
	fill_stacks(g);
	return 0;
}

void guest_memory_destroy(struct machine *m, struct guest *g)
{
	heap_free(m->heap, g->free_gfn);
	heap_free(m->heap, g->free_block);
	heap_free(m->heap, g->users);
	heap_free(m->heap, g->free_mmio);
	heap_free(m->heap, g->mmio_users);
	g->free_gfn = g->free_block = g->free_mmio = NULL;
	g->users = g->mmio_users = NULL;
	g->free_count = g->free_blocks = g->free_mmio_count = 0;
}

uint64_t guest_gfn_alloc(struct guest *g, bool mmio)
{
	uint64_t gfn;

	g = g->leader;
	if (mmio && g->free_mmio_count)
		gfn = g->free_mmio[--g->free_mmio_count];
	else if (g->free_count)
		gfn = g->free_gfn[--g->free_count];
	else
		return GUEST_NO_GFN;
	*users_of(g, gfn) = 1;
	return gfn;
}

uint64_t guest_block_alloc(struct guest *g)
{
	uint64_t gfn;

	g = g->leader;
	if (!g->free_blocks)
		return GUEST_NO_GFN;
	gfn = g->free_block[--g->free_blocks];
	*users_of(g, gfn) = 1;
	return gfn;
}

void guest_gfn_get(struct guest *g, uint64_t gfn)
{
	++*users_of(g->leader, gfn);
}

void guest_gfn_put(struct guest *g, uint64_t gfn)
{
	uint16_t *users;
	uint64_t single_end;

	g = g->leader;
	users = users_of(g, gfn);
	if (!*users || --*users)
		return;
	if (is_mmio(g, gfn)) {
		g->free_mmio[g->free_mmio_count++] = (uint32_t)gfn;
		return;
	}
	single_end = g->config.first_gfn + ram_gfns(g) / 2;
	single_end = (single_end + BLOCK_GFNS - 1) / BLOCK_GFNS * BLOCK_GFNS;
	if (g->config.hugepages && gfn >= single_end)
		g->free_block[g->free_blocks++] = (uint32_t)gfn;
	else
		g->free_gfn[g->free_count++] = (uint32_t)gfn;
}
