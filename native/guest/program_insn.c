/* See program_insn.h. */
#include "guest/program_insn.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/guest_flush.h"
#include "guest/guest_os.h"
#include "guest/guest_promise.h"
#include "guest/guest_shadow.h"
#include "guest/program.h"
#include "guest/program_changes.h"
#include "tlb/tlb_flush.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"

static void invalidated(struct walk *w, struct covered what)
{
	changes_settle(w->m, w->vcpu->vm, w->guest, what, INVALIDATED_BY_ITSELF);
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id,
		     what.any_page ? UINT64_MAX : what.page);
}

void guest_invalidates_all(struct machine *m, uint32_t vcpu)
{
	struct vcpu *v = &m->vcpus[vcpu];

	changes_settle(m, v->vm, v->guest, (struct covered){ .any_page = true, .any_process = true, .globals = true },
		       INVALIDATED_BY_ITSELF);
	os_batch_covered(&(struct walk){ .m = m, .vcpu = v, .guest = v->guest }, UINT64_MAX);
}

void guest_invalidates_pcid(struct machine *m, uint32_t vcpu)
{
	const struct vcpu *v = &m->vcpus[vcpu];
	struct guest *g = v->guest;

	changes_settle(m, v->vm, g, (struct covered){ .process = g->current, .any_page = true, .globals = true,
						      .any_process = !g->config.pcid }, INVALIDATED_BY_ITSELF);
}

static uint32_t pcid_of(const struct guest *g, uint64_t process)
{
	return process < g->processes ? g->process[process].pcid : 0;
}

enum walk_result program_invlpg(struct walk *w, const struct guest_op *op)
{
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	enum walk_result r = WALK_DONE;

	if (w->vmcs->ept)
		invlpg(w->tlb, page);
	else
		r = guest_exit_insn(w, GUEST_INSN_INVLPG, canonical_address(page << 12));
	if (r != WALK_DONE)
		return r;
	invalidated(w, (struct covered){ .page = page, .process = w->guest->current, .globals = true,
					 .any_process = !w->guest->config.pcid });
	return r;
}

/* SDM vol. 2A, INVPCID: types. */
enum walk_result program_invpcid(struct walk *w, const struct guest_op *op)
{
	uint64_t page = op->linear >> 12 & GUEST_PAGE_MASK;
	uint32_t pcid = pcid_of(w->guest, op->value);
	struct covered what = { .page = page, .process = (uint32_t)op->value, .any_page = op->flags > 0,
				.any_process = op->flags >= 2 || !w->guest->config.pcid,
				.globals = op->flags == 2 };
	enum walk_result r = WALK_DONE;

	if (!w->vmcs->ept)
		r = guest_exit_invpcid(w, op->flags, pcid, page << 12);
	else if (op->flags == 0)
		invpcid_address(w->tlb, pcid, page);
	else if (op->flags == 1)
		invpcid_single(w->tlb, pcid);
	else if (op->flags == 2)
		invpcid_all(w->tlb);
	else
		invpcid_retain_globals(w->tlb);
	if (r == WALK_DONE)
		invalidated(w, what);
	return r;
}

static void flushed_by_cr3(struct walk *w)
{
	struct guest *g = w->guest;

	invalidated(w, (struct covered){ .process = g->current, .any_page = true, .any_process = !g->config.pcid });
}

/* program_mov_cr3() without EPT, where it exits. */
static enum walk_result exit_by_cr3(struct walk *w, const struct guest_op *op)
{
	struct guest *g = w->guest;
	uint32_t next = op->value < g->processes ? (uint32_t)op->value : g->current;
	bool noflush = op->flags & GUEST_OP_NOFLUSH && g->config.pcid;
	enum walk_result r = os_new_pml4(w, &g->process[next]);
	uint64_t cr3 = os_cr3_of(&g->process[next], noflush);

	if (r == WALK_DONE)
		r = guest_exit_insn(w, GUEST_INSN_MOV_CR3, cr3);
	if (r != WALK_DONE)
		return r;
	os_cr3_written(w, next, cr3);
	if (!noflush)
		flushed_by_cr3(w);
	return r;
}

enum walk_result program_mov_cr3(struct walk *w, const struct guest_op *op)
{
	struct guest *g = w->guest;

	if (!w->vmcs->ept)
		return exit_by_cr3(w, op);
	if (op->value < g->processes)
		g->current = (uint32_t)op->value;
	os_load_cr3(w);
	count(w->cpu->counters, COUNT_GUEST_SWITCHES, 1);
	/* Bit 63 has a meaning only with CR4.PCIDE. */
	if (op->flags & GUEST_OP_NOFLUSH && g->config.pcid)
		return WALK_DONE;
	mov_to_cr3(w->tlb, pcid_of(g, g->current));
	flushed_by_cr3(w);
	return WALK_DONE;
}
