/* The guest's configuration, processes and records.  See guest.h. */
#include "guest/guest.h"

#include <string.h>

#include "core/cpu_types.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/guest_pages.h"
#include "guest/guest_shadow.h"
#include "guest/program.h"
#include "memory/frame.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

enum { EVENT_SPREAD = 8 };

uint64_t guest_random(struct guest *g)
{
	/* xorshift64 (Marsaglia 2003); the state is never 0. */
	g->random ^= g->random << 13;
	g->random ^= g->random >> 7;
	g->random ^= g->random << 17;
	return g->random >> 11;
}

void guest_write_cr3(struct guest *g)
{
	const struct guest_process *p = &g->process[g->current];

	g->cr3_gfn = p->cr3_gfn;
	g->pcid = p->pcid;
}

struct guest *guest_new(struct machine *m, const struct vcpu *vcpu)
{
	struct guest *g = heap_zalloc(m->heap, 1, sizeof(*g));

	if (!g)
		return NULL;
	g->skip_gfn = GUEST_NO_GFN;
	g->kernel_pdpt = GUEST_NO_GFN;
	for (uint32_t i = 0; i < GUEST_KERNEL_PAGES; i++)
		guest_page_unmap(&g->kernel[i]);
	for (uint32_t i = 0; i < GUEST_EVENTS; i++)
		g->due[i] = UINT64_MAX;
	g->leader = g;
	g->vcpus = 1;
	os_choices_reset(g);
	g->random = 1;
	g->clock = (uint64_t)vcpu->id << GUEST_CLOCK_VCPU | 1;
	return g;
}

int guest_create(struct machine *m, struct vcpu *vcpu)
{
	vcpu->guest = vcpu->guests[0] = guest_new(m, vcpu);
	return vcpu->guest ? 0 : MACHINE_NOMEM;
}

static void destroy(struct machine *m, struct guest *g)
{
	for (uint32_t i = 0; i < g->processes; i++) {
		if (g->leader == g)
			heap_free(m->heap, g->process[i].page);
		heap_free(m->heap, g->process[i].place);
	}
	guest_memory_destroy(m, g);
	program_destroy(m, g);
	heap_free(m->heap, g->vmx.hypervisor);
	heap_free(m->heap, g);
}

void guest_destroy(struct machine *m, struct vcpu *vcpu)
{
	/* Nested guests first: L1's program is theirs, too, and is freed once. */
	for (uint32_t i = NESTED_GUESTS + 1; i-- > 0; vcpu->guests[i] = NULL) {
		if (!vcpu->guests[i])
			continue;
		if (i)
			vcpu->guests[i]->program = NULL;
		destroy(m, vcpu->guests[i]);
	}
	vcpu->guest = NULL;
}

static uint32_t interval(const struct guest *g, enum guest_event event)
{
	switch (event) {
	case GUEST_SWITCH:
		return g->config.switch_every;
	case GUEST_UNMAP:
		return g->config.unmap_every;
	case GUEST_PROTECT:
		return g->config.protect_every;
	case GUEST_TABLE:
		return g->config.table_every;
	case GUEST_WP:
		return g->config.wp_every;
	case GUEST_PG:
		return g->config.pg_every;
	case GUEST_SMEP:
		return g->config.smep_every;
	case GUEST_PCIDE:
		return g->config.pcide_every;
	case GUEST_TRANSITION:
		return g->config.transition_every;
	case GUEST_TICK:
		return g->config.tick_every;
	default:
		return g->config.halt_every;
	}
}

/* Set the next time, an eighth more or less than the interval, so that events drift against each other. */
void os_schedule(struct guest *g, enum guest_event event)
{
	uint64_t every = interval(g, event), spread = every / EVENT_SPREAD;

	g->due[event] = every ? g->clock + every - spread / 2 + (spread ? guest_random(g) % spread : 0)
			      : UINT64_MAX;
}

uint64_t os_next_event(const struct guest *g)
{
	uint64_t next = UINT64_MAX;

	for (uint32_t i = 0; i < GUEST_EVENTS; i++)
		next = g->due[i] < next ? g->due[i] : next;
	return next;
}

int guest_configure(struct machine *m, uint32_t vcpu, const struct guest_config *config)
{
	struct guest *g = m->vcpus[vcpu].guest;
	int r;

	guest_memory_destroy(m, g);
	g->config = *config;
	g->paged = config->paging;
	g->random = config->seed * 0x9e3779b97f4a7c15 + 0x632be59bd9b4e019;
	if (!g->random)
		g->random = 1;
	r = guest_memory_create(m, g);
	if (r)
		return r;
	for (uint32_t i = 0; i < GUEST_EVENTS; i++)
		os_schedule(g, (enum guest_event)i);
	return 0;
}

int guest_add_process(struct machine *m, uint32_t vcpu, const uint64_t *records, uint64_t n,
		      const uint64_t *pages, uint64_t n_pages)
{
	struct guest *g = m->vcpus[vcpu].guest;
	struct guest_process *p = &g->process[g->processes];

	if (g->processes == GUEST_PROCESSES)
		return MACHINE_NOMEM;
	memset(p, 0, sizeof(*p));
	p->page = heap_zalloc(m->heap, n_pages + 1, sizeof(*p->page));
	if (!p->page)
		return MACHINE_NOMEM;
	for (uint64_t i = 0; i < n_pages; i++)
		guest_page_unmap(&p->page[i]);
	p->records = records;
	p->record_count = n;
	p->pages = pages;
	p->page_count = n_pages;
	p->cr3_gfn = p->cr3_building = p->pdpt_building = GUEST_NO_GFN;
	p->pcid = g->config.pcid ? (uint16_t)(g->processes + 1) : 0;
	/* Processes that replay one trace are not in step. */
	p->position = n ? guest_random(g) % n : 0;
	if (g->current == g->processes++)
		guest_write_cr3(g);
	return 0;
}

void guest_share_tables(struct machine *m, uint32_t vcpu, uint64_t cr3_gfn)
{
	struct guest *g = m->vcpus[vcpu].guest;

	g->process[g->processes - 1].cr3_gfn = cr3_gfn;
	guest_write_cr3(g);
}

void guest_run_threads(struct machine *m, uint32_t vcpu, uint32_t of)
{
	struct guest *g = m->vcpus[vcpu].guest, *leader = m->vcpus[of].guest;

	for (uint32_t i = 0; i < g->processes; i++) {
		heap_free(m->heap, g->process[i].page);
		g->process[i].page = leader->process[i].page;
	}
	guest_memory_destroy(m, g);
	g->leader = leader;
	leader->vcpus++;
}

static void join_process(struct guest_process *p, struct guest *other, uint32_t process)
{
	p->cr3_gfn = other->process[process].cr3_gfn;
	for (uint64_t i = 0; i < p->page_count; i++) {
		const struct guest_page *theirs = guest_page_find(other, process, p->pages[i]);

		if (theirs)
			guest_page_map(&p->page[i], guest_mapping_of(theirs));
	}
}

uint64_t guest_join_tables(struct machine *m, uint32_t vcpu, uint32_t other)
{
	struct guest *g = m->vcpus[vcpu].guest, *o = m->vcpus[other].guest;

	for (uint32_t i = 0; i < g->processes && i < o->processes; i++)
		join_process(&g->process[i], o, i);
	for (uint32_t i = 0; i < GUEST_KERNEL_PAGES; i++)
		guest_page_map(&g->kernel[i], guest_mapping_of(&o->kernel[i]));
	g->leader->kernel_pdpt = o->leader->kernel_pdpt;
	g->space++;
	guest_write_cr3(g);
	return g->cr3_gfn << 12 | (g->config.pcid ? g->pcid : 0);
}

uint64_t guest_set_process(struct machine *m, uint32_t vcpu, uint32_t process)
{
	struct guest *g = m->vcpus[vcpu].guest;

	if (process >= g->processes || g->process[process].cr3_gfn == GUEST_NO_GFN)
		return 0;
	g->current = process;
	if (!g->config.pcid)
		g->space++;
	guest_write_cr3(g);
	return g->cr3_gfn << 12 | (g->config.pcid ? g->pcid : 0);
}

void guest_skip(struct machine *m, uint32_t vcpu)
{
	struct guest *g = m->vcpus[vcpu].guest;

	g->skip_gfn = g->last_violation;
}

uint64_t guest_frames_used(struct machine *m, uint32_t vcpu)
{
	const struct guest *g = m->vcpus[vcpu].guest;
	uint64_t n = 0;

	for (uint64_t i = 0; g->users && i < g->config.end_gfn - g->config.first_gfn; i++)
		n += g->users[i] != 0;
	return n;
}

uint64_t guest_clock(struct machine *m, uint32_t vcpu)
{
	return m->vcpus[vcpu].guest->clock;
}
