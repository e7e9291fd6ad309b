/* See guest_hypervisor.h. */
#include "guest/guest_hypervisor.h"

#include "core/heap.h"
#include "core/machine_types.h"
#include "guest/guest.h"
#include "guest/guest_apic.h"
#include "guest/guest_ept12.h"
#include "guest/guest_insn.h"
#include "guest/guest_mapping.h"
#include "guest/guest_nested.h"
#include "guest/guest_os.h"
#include "guest/guest_pages.h"
#include "guest/guest_shadow.h"
#include "guest/program.h"
#include "guest/program_changes.h"
#include "vm/ept12.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/vmcs.h"
#include "walk/walk.h"
#include "walk/walk_shadow.h"

enum {
	OPERATIONS = 32,         /* at most, from an exit to the next entry */
	PAGES_AT_ONCE = 8,       /* at most, that L1 takes away before one INVEPT */
	PROTECT_ONE_IN = 4,      /* of them: only write access */
	APIC_AS_MEMORY_ONE_IN = 4, /* exits after which L1 writes to the page that is its guests' APIC-access page */
	APIC_EXIT_ONE_IN = 4,    /* exits of a nested guest for an access to its APIC, where it can reach one */
	LOOK_FOR_MAPPED = 32,
	INVVPID_TYPES = 4,
	INVVPID_ADDRESS = 0,
	INVVPID_SINGLE = 1,
	INVEPT_SINGLE = 1,
	INVEPT_GLOBAL = 2,
	/* A nested guest has VPIDs of its own: those that equal its number modulo NESTED_GUESTS. */
	VPIDS_EACH = NESTED_VPIDS / NESTED_GUESTS - 1,
};

struct hypervisor {
	struct hypervisor_config config;
	struct guest_op op[OPERATIONS]; /* until the next entry; repeated from its start behind an exit in its middle */
	uint32_t ops, next;
	uint32_t running;               /* the nested guest that L1 enters next */
	uint32_t vpids;                 /* that L1 has given to nested guests, modulo VPIDS_EACH */
	bool flush_asked;               /* the running one has left the invalidation of a page to L1 */
	uint64_t flush_page;
};

int guest_hypervise(struct machine *m, uint32_t vcpu, const struct hypervisor_config *config)
{
	struct guest **guests = m->vcpus[vcpu].guests;
	struct guest_vmx *l1 = &guests[0]->vmx;

	l1->hypervisor = heap_zalloc(m->heap, 1, sizeof(*l1->hypervisor));
	if (!l1->hypervisor)
		return MACHINE_NOMEM;
	l1->hypervisor->config = *config;
	for (uint32_t n = 1; n <= config->guests; n++)
		if (changes_reserve(m, guests[n], 1))
			return MACHINE_NOMEM;
	return 0;
}

/* --- planning ----------------------------------------------------------------------------------------------- */

static bool one_in(struct guest *l1, uint32_t every)
{
	return every && guest_random(l1) % every == 0;
}

static void add(struct hypervisor *h, struct guest_op op)
{
	if (h->ops < OPERATIONS)
		h->op[h->ops++] = op;
}

static void add_vmx(struct hypervisor *h, uint32_t insn, uint32_t type, uint64_t value)
{
	add(h, (struct guest_op){ .kind = GUEST_OP_VMX, .flags = insn | type << 8, .value = value });
}

static uint32_t next_vpid(struct hypervisor *h)
{
	h->vpids = (h->vpids + 1) % VPIDS_EACH;
	return h->running + NESTED_GUESTS * h->vpids;
}

/* The nested guest may have had the VPID before, and have invalidated mappings under another one since. */
static void give_vpid(struct hypervisor *h)
{
	uint32_t vpid = next_vpid(h);

	add(h, (struct guest_op){ .kind = GUEST_OP_VMX, .flags = GUEST_INSN_INVVPID | INVVPID_SINGLE << 8, .value = vpid });
	add_vmx(h, GUEST_INSN_VMWRITE, VMCS12_VPID, vpid);
}

static void start(struct hypervisor *h)
{
	add_vmx(h, GUEST_INSN_VMXON, 0, 0);
	for (uint32_t n = h->config.guests; n; n--) {
		h->running = n;
		add_vmx(h, GUEST_INSN_VMPTRLD, 0, n);
		if (h->config.vpid)
			give_vpid(h);
		if (h->config.apic_gfn)
			add_vmx(h, GUEST_INSN_VMWRITE, VMCS12_APIC_PAGE, h->config.apic_gfn);
		if (h->config.ept)
			add_vmx(h, GUEST_INSN_VMWRITE_EPTP, h->config.ad, n);
	}
}

static void switch_guest(struct guest *l1, struct hypervisor *h)
{
	uint32_t from = h->running;

	h->running = 1 + (from - 1 + 1 + (uint32_t)(guest_random(l1) % (h->config.guests - 1))) % h->config.guests;
	if (guest_random(l1) % 2)
		add_vmx(h, GUEST_INSN_VMCLEAR, 0, from);
	add_vmx(h, GUEST_INSN_VMPTRLD, 0, h->running);
}

/* INVVPID of any type; of the page that the nested guest has asked for, or of any. */
static void invvpid(struct guest *l1, struct hypervisor *h, const struct guest *l2)
{
	const struct guest_process *p = &l2->process[l2->current];
	uint32_t type = (uint32_t)(guest_random(l1) % INVVPID_TYPES);
	uint64_t page = h->flush_asked ? h->flush_page : p->pages[guest_random(l1) % p->page_count];

	h->flush_asked = false;
	add(h, (struct guest_op){ .kind = GUEST_OP_VMX, .flags = GUEST_INSN_INVVPID | type << 8, .value = l2->vmx.vpid12,
				  .linear = page << 12 });
}

static void take_pages(struct guest *l1, struct hypervisor *h, const struct guest *l2)
{
	uint32_t number = l2->vmx.ept12, most = 1 + (uint32_t)(guest_random(l1) % PAGES_AT_ONCE), taken = 0;
	uint64_t first = l2->config.first_gfn, pages = l2->config.end_gfn - first;
	const struct ept12 *ept = &l1->vmx.ept12s->ept[number];
	bool single = guest_random(l1) % 4;

	for (uint32_t i = 0; i < LOOK_FOR_MAPPED && taken < most; i++) {
		uint64_t page = first + guest_random(l1) % pages;
		bool protects = one_in(l1, PROTECT_ONE_IN);

		if (ept12_mapping(ept, page).gfn == (uint32_t)GUEST_NO_GFN)
			continue;
		taken++;
		add(h, (struct guest_op){ .kind = protects ? GUEST_OP_EPT12_PROTECT : GUEST_OP_EPT12_UNMAP,
					  .flags = number << 8, .linear = page << 12 });
	}
	add_vmx(h, GUEST_INSN_INVEPT, single ? INVEPT_SINGLE : INVEPT_GLOBAL, single ? number : 0);
}

/* Switch between the nested guest's own EPT and one that all of them take in turn. */
static void switch_ept(struct hypervisor *h, const struct guest *l2)
{
	add_vmx(h, GUEST_INSN_VMWRITE_EPTP, h->config.ad, l2->vmx.ept12 == EPT12S ? h->running : EPT12S);
}

/* Choose what L1 does before it enters a nested guest. */
static void plan(struct walk *w, struct hypervisor *h)
{
	const struct hypervisor_config *c = &h->config;
	struct guest *l1 = w->guest;

	h->ops = h->next = 0;
	if (!h->running) {
		start(h);
	} else {
		const struct guest *l2 = w->vcpu->guests[h->running];

		if (h->flush_asked)
			invvpid(l1, h, l2);
		if (c->ept && one_in(l1, c->unmap_every))
			take_pages(l1, h, l2);
		if (c->ept && one_in(l1, c->eptp_every))
			switch_ept(h, l2);
		if (c->vpid && one_in(l1, c->vpid_every))
			give_vpid(h);
		if (c->vpid && one_in(l1, c->invvpid_every))
			invvpid(l1, h, l2);
		if (c->apic_gfn && one_in(l1, APIC_AS_MEMORY_ONE_IN))
			add(h, (struct guest_op){ .kind = GUEST_OP_WRITE, .value = c->apic_gfn });
		if (c->guests > 1 && one_in(l1, c->switch_every))
			switch_guest(l1, h);
		if (one_in(l1, c->vmxoff_every)) {
			add_vmx(h, GUEST_INSN_VMXOFF, 0, 0);
			add_vmx(h, GUEST_INSN_VMXON, 0, 0);
			add_vmx(h, GUEST_INSN_VMPTRLD, 0, h->running);
		}
	}
	add_vmx(h, GUEST_INSN_VMLAUNCH, 0, 0);
}

/* --- execution ---------------------------------------------------------------------------------------------- */

/* Access a page by the map of all memory that an OS has for itself: with EPT by its guest-physical address, and without
 * by the linear one.  Return that address's page as *page. */
static enum walk_result access_page(struct walk *w, uint64_t gfn, uint32_t type, struct tlb_entry *e, uint64_t *page)
{
	enum walk_result r;

	*page = w->vmcs->ept ? gfn : os_linear(w->guest, gfn);
	w->linear = os_linear(w->guest, gfn) << 12;
	if (w->vmcs->ept)
		return walk_physical(w, gfn, type, e);
	w->supervisor = true;
	r = walk_shadow_cached(w, *page, type, e);
	w->supervisor = false;
	return r;
}

static enum walk_result access_memory(struct walk *w, const struct guest_op *op)
{
	struct tlb_entry e;
	uint64_t page;

	if (!op)
		return ept12_violation(w);
	if (op->kind == GUEST_OP_WRITE)
		return access_page(w, op->value, ACCESS_WRITE, &e, &page);
	return op->kind == GUEST_OP_VMX ? vmx_prepare(w, op) : ept12_op(w, op);
}

/* Do the accesses of an operation of L1's, or (NULL) those with which it handles an EPT violation of its nested guest. */
static enum walk_result accesses_of(struct walk *w, const struct guest_op *op)
{
	enum walk_result r = access_memory(w, op);

	for (int i = 0; r == WALK_GUEST_FAULT && i < RECLAIM_TRIES; i++) {
		r = os_reclaim(w);
		if (r == WALK_DONE)
			r = access_memory(w, op);
	}
	return r;
}

/* Events of a guest's OS are due by the vCPU's clock, which goes on while another guest runs. */
static void schedule(struct walk *w, struct guest *g, enum guest_event event)
{
	g->clock = w->guest->clock;
	os_schedule(g, event);
}

static uint32_t enter(struct walk *w)
{
	vmx_execute(w, &(struct guest_op){ .kind = GUEST_OP_VMX, .flags = GUEST_INSN_VMLAUNCH });
	return EXIT_INSTRUCTION;
}

static uint32_t l1_step(struct walk *w, struct hypervisor *h)
{
	const struct guest_op *op;
	enum walk_result r;

	if (ept12_violation_pending(w->guest)) {
		r = accesses_of(w, NULL);
		return r == WALK_DONE ? enter(w) : exit_of(w, r);
	}
	if (h->next == h->ops) {
		if (w->guest->clock < w->guest->due[GUEST_TRANSITION])
			return EXIT_REASONS;
		plan(w, h);
	}
	op = &h->op[h->next];
	r = accesses_of(w, op);
	if (r != WALK_DONE)
		return exit_of(w, r);
	if (++h->next == h->ops)
		schedule(w, w->vcpu->guests[h->running], GUEST_TRANSITION);
	if (op->kind != GUEST_OP_VMX)
		return EXIT_REASONS;
	vmx_execute(w, op);
	return EXIT_INSTRUCTION;
}

/* The nested guest accesses its APIC, which exits to L1. */
static enum walk_result access_apic(struct walk *w, uint64_t gfn)
{
	struct tlb_entry e;
	uint64_t page;
	enum walk_result r = access_page(w, gfn, ACCESS_WRITE, &e, &page);

	return r == WALK_DONE ? apic_accessed(w, page, ACCESS_WRITE, &e) : r;
}

/* Unmap a page, and leave its invalidation to L1, as a guest does that asks its hypervisor to flush. */
static enum walk_result ask_for_flush(struct walk *w, struct hypervisor *h)
{
	struct guest *g = w->guest;
	struct guest_process *p = &g->process[g->current];
	uint64_t hand = p->hand, at = os_find_mapped(p, false);
	struct guest_page *gp = &p->page[at];
	enum walk_result r;

	if (at == p->page_count || guest_mapping_of(gp).huge)
		return WALK_DONE;
	r = os_clear_entry(w, p, p->pages[at], false);
	if (r == WALK_EXIT) {
		p->hand = hand; /* the same page after the exit */
		return r;
	}
	changes_note(g, p->pages[at], gp, true, false);
	guest_gfn_put(g, guest_mapping_of(gp).gfn);
	guest_page_unmap(gp);
	h->flush_asked = true;
	h->flush_page = p->pages[at];
	return WALK_DONE;
}

/* Exit to L1. */
static uint32_t exit_to_l1(struct walk *w, struct hypervisor *h)
{
	struct guest *l1 = w->vcpu->guests[0], *g = w->guest;
	const struct hypervisor_config *c = &h->config;
	enum walk_result r;

	if (w->vmcs->ept && !h->flush_asked && !g->changes && g->vmx.vpid12 && one_in(l1, c->invvpid_every)) {
		r = ask_for_flush(w, h);
		if (r == WALK_EXIT)
			return exit_of(w, r);
	}
	/* An L1 with an EPT maps no APIC-access page in it. */
	if (!h->flush_asked && w->vmcs->apic_page && !c->ept && one_in(l1, APIC_EXIT_ONE_IN)) {
		r = access_apic(w, c->apic_gfn);
		if (w->exit->reason != EXIT_APIC_ACCESS || r != WALK_EXIT)
			return exit_of(w, r);
		schedule(w, l1, GUEST_TRANSITION);
		vmexit_executed(w);
		return EXIT_APIC_ACCESS;
	}
	schedule(w, l1, GUEST_TRANSITION);
	vmx_execute(w, &(struct guest_op){ .kind = GUEST_OP_VMX, .flags = GUEST_INSN_VMCALL });
	return EXIT_INSTRUCTION;
}

static uint32_t nested_step(struct walk *w, struct hypervisor *h)
{
	struct guest *g = w->guest;

	if (g->clock >= g->due[GUEST_TICK]) {
		os_schedule(g, GUEST_TICK);
		return EXIT_PREEMPTION_TIMER;
	}
	if (g->clock < g->due[GUEST_TRANSITION])
		return EXIT_REASONS;
	return exit_to_l1(w, h);
}

uint32_t hypervisor_step(struct walk *w)
{
	struct hypervisor *h = w->vcpu->guests[0]->vmx.hypervisor;

	if (!h)
		return EXIT_REASONS;
	return w->guest == w->vcpu->guests[0] ? l1_step(w, h) : nested_step(w, h);
}
