/* See guest_nested.h. */
#include "guest/guest_nested.h"

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_ept12.h"
#include "guest/guest_insn.h"
#include "guest/guest_promise.h"
#include "guest/program.h"
#include "guest/program_changes.h"
#include "vm/ept12.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

/* Types of INVEPT (SDM vol. 3C, 31.3). */
enum { INVEPT_SINGLE = 1, INVEPT_GLOBAL = 2 };

int guest_create_nested(struct machine *m, uint32_t vcpu, uint32_t number)
{
	struct vcpu *v = &m->vcpus[vcpu];

	if (!number || number > NESTED_GUESTS || v->guests[number] || v->guests[0]->program)
		return MACHINE_MISUSE;
	v->guests[number] = guest_new(m, v);
	return v->guests[number] ? 0 : MACHINE_NOMEM;
}

void vcpu_set_guest_mode(struct machine *m, uint32_t vcpu, uint32_t number)
{
	struct vcpu *v = &m->vcpus[vcpu];
	struct guest *from = v->guest, *to = v->guests[number];

	/* One clock per vCPU, so that the fills and changes of all its guests are in one order. */
	to->clock = from->clock;
	to->vmx.nested = nested_of(number, vcpu, to->vmx.vpid12);
	to->vmx.ept12s = v->guests[0]->vmx.ept12s;
	v->guest = to;
}

uint32_t vcpu_guest_mode(struct machine *m, uint32_t vcpu)
{
	const struct vcpu *v = &m->vcpus[vcpu];
	uint32_t number = 0;

	while (v->guests[number] != v->guest)
		number++;
	return number;
}

/* Settle changes of a guest of this vCPU at the clock of the guest that runs. */
static void settle(struct machine *m, struct vcpu *v, struct guest *g, struct covered what)
{
	g->clock = v->guest->clock;
	changes_settle(m, v->vm, g, what, g == v->guests[0] ? INVALIDATED_BY_ITSELF : INVALIDATED_BY_L1);
	v->guest->clock = g->clock;
}

static void invalidates(struct walk *w, uint64_t page)
{
	count(w->cpu->counters, COUNT_GUEST_INVALIDATIONS, 1);
	event_record(w->m, w->cpu->id, event_of(w->vcpu->vm, EVENT_GUEST_INVALIDATE), w->vcpu->id, page);
}

/* VM entry or VM exit of a nested guest without a VPID: the mappings tagged with VPID 0 go, which are those of L1 and of
 * its nested guests without a VPID (SDM vol. 3C, 29.4.3.1). */
static void transition(struct machine *m, struct vcpu *v)
{
	for (uint32_t i = 0; i <= NESTED_GUESTS; i++) {
		struct guest *g = v->guests[i];

		if (g && (!i || !g->vmx.vpid12))
			settle(m, v, g, (struct covered){ .any_page = true, .any_process = true, .globals = true });
	}
}

static void transition_executed(struct walk *w)
{
	transition(w->m, w->vcpu);
	invalidates(w, UINT64_MAX);
}

void vmexit_executed(struct walk *w)
{
	if (!w->guest->vmx.vpid12)
		transition_executed(w);
}

/* VMLAUNCH or VMRESUME.  A VM entry that fails while it loads the guest's state invalidates as a VM exit does (SDM vol. 3C,
 * 27.8); one that fails for a control invalidates nothing. */
static void vmlaunch(struct walk *w, uint32_t check)
{
	const struct guest *l2 = w->vcpu->guests[w->vcpu->guests[0]->vmx.current];

	if (check == VMENTRY_SUCCEEDS || check == VMENTRY_HALTED)
		ept12_entered(w->m, w->vcpu, l2->vmx.ept12);
	if (check != VMENTRY_CONTROLS && !l2->vmx.vpid12)
		transition_executed(w);
}

/* INVVPID (SDM vol. 3C, 31.3): type 0 an address, 1 a VPID, 2 all VPIDs but 0, 3 a VPID without global translations. */
static void invvpid(struct walk *w, uint32_t type, uint64_t vpid, uint64_t page)
{
	for (uint32_t i = 1; i <= NESTED_GUESTS; i++) {
		struct guest *g = w->vcpu->guests[i];

		if (g && g->vmx.vpid12 && (type == 2 || g->vmx.vpid12 == vpid))
			settle(w->m, w->vcpu, g, (struct covered){ .page = page, .any_page = type != 0, .any_process = true,
						       .globals = type != 3 });
	}
	invalidates(w, type ? UINT64_MAX : page);
}

void vcpu_nested_ept_violation(struct machine *m, uint32_t vcpu, uint64_t gpa, int mapped)
{
	struct vcpu *v = &m->vcpus[vcpu];

	if (!v->guests[0]->vmx.ept12s)
		return;
	v->guests[0]->vmx.ept12s->violation = gpa >> 12;
	if (mapped)
		ept12_invalidated(m, v, v->guest->vmx.ept12, gpa >> 12);
	if (!v->guest->vmx.vpid12)
		transition(m, v);
}

int vcpu_handles_violation(struct machine *m, uint32_t vcpu)
{
	return ept12_violation_pending(m->vcpus[vcpu].guest);
}

enum walk_result vmx_prepare(struct walk *w, const struct guest_op *op)
{
	uint32_t insn = op->flags & 0xff;
	bool names = insn == GUEST_INSN_VMWRITE_EPTP || (insn == GUEST_INSN_INVEPT && op->flags >> 8 == INVEPT_SINGLE);

	return names && op->value ? ept12_root(w, (uint32_t)op->value) : WALK_DONE;
}

/* Return the operand of a VMX instruction as KVM sees it. */
static uint64_t operand_of(const struct guest *l1, const struct guest_op *op)
{
	uint32_t insn = op->flags & 0xff, type = op->flags >> 8;

	if (insn == GUEST_INSN_INVVPID)
		return canonical_address(op->linear);
	if (insn == GUEST_INSN_VMWRITE_EPTP || insn == GUEST_INSN_VMFUNC)
		return ept12_eptp(l1, (uint32_t)op->value, type);
	if (insn == GUEST_INSN_INVEPT)
		return type == INVEPT_SINGLE ? ept12_eptp(l1, (uint32_t)op->value, false) : 0;
	return op->value;
}

void vmx_execute(struct walk *w, const struct guest_op *op)
{
	struct guest *const *guests = w->vcpu->guests;
	struct guest_vmx *l1 = &guests[0]->vmx;
	uint32_t type = op->flags >> 8, insn = op->flags & 0xff;

	switch (insn) {
	case GUEST_INSN_VMPTRLD:
		l1->current = (uint32_t)op->value;
		break;
	case GUEST_INSN_VMCLEAR:
		if (l1->current == op->value)
			l1->current = 0;
		break;
	case GUEST_INSN_VMXOFF:
		l1->current = 0;
		break;
	case GUEST_INSN_VMWRITE:
		/* KVM alone keeps the other fields of the VMCS12. */
		if (type == VMCS12_VPID)
			guests[l1->current]->vmx.vpid12 = (uint16_t)op->value;
		break;
	case GUEST_INSN_VMWRITE_EPTP:
		guests[l1->current]->vmx.ept12 = (uint32_t)op->value;
		guests[l1->current]->vmx.ept12_ad = type != 0;
		break;
	case GUEST_INSN_INVEPT:
		ept12_invalidated(w->m, w->vcpu, type == INVEPT_SINGLE ? (uint32_t)op->value : 0, EPT12_ANY_PAGE);
		invalidates(w, UINT64_MAX);
		break;
	case GUEST_INSN_VMLAUNCH:
		vmlaunch(w, type);
		break;
	case GUEST_INSN_VMCALL:
		vmexit_executed(w);
		break;
	case GUEST_INSN_VMFUNC:
		w->guest->vmx.ept12 = (uint32_t)op->value;
		w->guest->vmx.ept12_ad = type != 0;
		ept12_entered(w->m, w->vcpu, w->guest->vmx.ept12);
		break;
	case GUEST_INSN_INVVPID:
		invvpid(w, type, op->value, op->linear >> 12 & GUEST_PAGE_MASK);
		break;
	default:
		break;
	}
	w->exit->access = insn;
	w->exit->linear = operand_of(guests[0], op);
	w->exit->invpcid_type = type;
	w->exit->invpcid_pcid = op->value;
}
