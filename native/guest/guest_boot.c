/* See guest_boot.h. */
#include "guest/guest_boot.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_batch.h"
#include "guest/guest_flush.h"
#include "guest/guest_insn.h"
#include "guest/guest_pages.h"
#include "guest/guest_promise.h"
#include "guest/guest_shadow.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

/* The reset has invalidated the translation: a vCPU that still has it cached must ask the oracle before using
 * it. */
static void lose(struct machine *m, struct vcpu *v, struct guest_page *gp)
{
	if (!guest_page_mapped(gp))
		return;
	guest_promise(m, v->vm, v->guest, gp, guest_mapping_of(gp).gfn, true, INVALIDATED_BY_ITSELF);
	guest_page_unmap(gp);
}

static void lose_process(struct machine *m, struct vcpu *v, struct guest_process *p)
{
	for (uint64_t i = 0; i < p->page_count; i++)
		lose(m, v, &p->page[i]);
	p->hand = 0;
	p->cr3_gfn = GUEST_NO_GFN;
}

void guest_boot(struct machine *m, uint32_t vcpu)
{
	struct vcpu *v = &m->vcpus[vcpu];
	struct guest *g = v->guest;

	g->halted_until = 0;
	g->skip_gfn = GUEST_NO_GFN;
	/* A program is not an OS that boots: its next operations decide. */
	if (g->program)
		return;
	g->clock++;
	os_batch_covered(&(struct walk){ .m = m, .vcpu = v, .guest = g }, UINT64_MAX);
	os_choices_reset(g);
	for (uint32_t i = 0; i < g->processes; i++)
		lose_process(m, v, &g->process[i]);
	for (uint32_t i = 0; i < GUEST_KERNEL_PAGES; i++)
		lose(m, v, &g->kernel[i]);
	g->kernel_pdpt = GUEST_NO_GFN;
	g->current = 0;
	guest_write_cr3(g);
	guest_memory_reset(g);
	for (uint32_t i = 0; i < GUEST_EVENTS; i++)
		os_schedule(g, (enum guest_event)i);
	g->boot = g->paged ? GUEST_BOOT_CR4 : GUEST_BOOT_DONE;
}

/* Each miss looks up its page, to ask whether the guest's tables agree.  Without memory it is searched for. */
static void place_pages(const struct machine *m, struct guest_process *p)
{
	uint32_t bits = 1;

	while (UINT64_C(1) << bits < 2 * (p->page_count + 1))
		bits++;
	heap_free(m->heap, p->place);
	p->place = heap_zalloc(m->heap, UINT64_C(1) << bits, sizeof(*p->place));
	p->place_bits = bits;
	for (uint64_t i = 0; p->place && i < p->page_count; i++) {
		uint32_t at = guest_place_of(p, p->pages[i]);

		while (p->place[at])
			at = (at + 1) & ((1u << bits) - 1);
		p->place[at] = (uint32_t)i + 1;
	}
}

void guest_power_on(struct machine *m, uint32_t vcpu)
{
	struct guest *g = m->vcpus[vcpu].guest;

	if (!g->paged)
		return;
	for (uint32_t i = 0; i < g->processes; i++)
		place_pages(m, &g->process[i]);
	vcpu_set_paging(m, vcpu, 0);
	g->boot = GUEST_BOOT_CR4;
}

/* guest_boot_step() that builds the tables which map the OS first: once CR0.PG is set, the OS can reach nothing else.  The
 * guest sets CR4.PCIDE after CR0.PG, while the PCID is 0 (SDM vol. 3A, 4.10.1). */
static uint32_t boot_without_ept(struct walk *w)
{
	struct guest *g = w->guest;
	const struct guest_process *p = &g->process[g->current];
	enum walk_result r;

	switch (g->boot) {
	case GUEST_BOOT_CR4:
		if (!os_enter(w))
			return os_spin(w);
		r = os_leave(w, os_boot_tables(w));
		if (r != WALK_DONE)
			return exit_of(w, r);
		g->boot = GUEST_BOOT_EFER;
		return exit_instruction(w, GUEST_INSN_MOV_CR4, CR4_PAE | CR4_PGE);
	case GUEST_BOOT_EFER:
		g->boot = GUEST_BOOT_CR3;
		return exit_instruction(w, GUEST_INSN_WRMSR_EFER, EFER_LME | EFER_NX);
	case GUEST_BOOT_CR3:
		g->boot = GUEST_BOOT_CR0;
		return exit_instruction(w, GUEST_INSN_MOV_CR3, p->cr3_gfn << 12);
	case GUEST_BOOT_CR0:
		g->boot = g->config.pcid ? GUEST_BOOT_PCIDE : GUEST_BOOT_DONE;
		return exit_instruction(w, GUEST_INSN_MOV_CR0, CR0_PE | CR0_WP | CR0_PG);
	case GUEST_BOOT_PCIDE:
		g->boot = GUEST_BOOT_PCID;
		return exit_instruction(w, GUEST_INSN_MOV_CR4, CR4_PAE | CR4_PGE | CR4_PCIDE);
	default:
		g->boot = GUEST_BOOT_DONE;
		return exit_instruction(w, GUEST_INSN_MOV_CR3, os_cr3_of(p, false));
	}
}

/* SDM vol. 3A, 10.8.5: the OS prepares four-level paging in CR4 and EFER, enables it with CR0.PG, then sets CR4.PCIDE.  With
 * EPT, KVM intercepts MOV to CR0 and CR4, and leaves CR3 to the guest. */
uint32_t guest_boot_step(struct walk *w)
{
	struct guest *g = w->guest;

	if (!w->vmcs->ept)
		return boot_without_ept(w);
	switch (g->boot) {
	case GUEST_BOOT_CR4:
		g->boot = GUEST_BOOT_EFER;
		return exit_instruction(w, GUEST_INSN_MOV_CR4, CR4_PAE | CR4_PGE);
	case GUEST_BOOT_EFER:
		g->boot = GUEST_BOOT_CR0;
		return exit_instruction(w, GUEST_INSN_WRMSR_EFER, EFER_LME | EFER_NX);
	case GUEST_BOOT_CR0:
		g->boot = g->config.pcid ? GUEST_BOOT_PCIDE : GUEST_BOOT_DONE;
		return exit_instruction(w, GUEST_INSN_MOV_CR0, CR0_PE | CR0_WP | CR0_PG);
	default:
		g->boot = GUEST_BOOT_DONE;
		return exit_instruction(w, GUEST_INSN_MOV_CR4, CR4_PAE | CR4_PGE | CR4_PCIDE);
	}
}
