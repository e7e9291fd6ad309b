/* See guest_insn.h. */
#include "guest/guest_insn.h"

#include <string.h>

#include "core/machine_types.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

int guest_execute(struct machine *m, uint32_t vcpu, uint32_t insn, uint64_t operand)
{
	struct guest *g = m->vcpus[vcpu].guest;

	/* Acquire: pairs with the release in guest_take_insn, the last operand was read. */
	if (atomic_load_explicit(&g->insn, memory_order_acquire))
		return MACHINE_AGAIN;
	g->insn_operand = operand;
	/* Release: pairs with the acquire in guest_take_insn. */
	atomic_store_explicit(&g->insn, insn, memory_order_release);
	return 0;
}

int guest_executed(struct machine *m, uint32_t vcpu)
{
	return !atomic_load_explicit(&m->vcpus[vcpu].guest->insn, memory_order_acquire);
}

uint32_t guest_take_insn(struct guest *g, uint64_t *operand)
{
	uint32_t insn = atomic_load_explicit(&g->insn, memory_order_acquire);

	if (insn) {
		*operand = g->insn_operand;
		atomic_store_explicit(&g->insn, GUEST_INSN_NONE, memory_order_release);
	}
	return insn;
}

void guest_set_smi_handler(struct machine *m, uint32_t vcpu, const uint64_t *records, uint64_t n)
{
	struct guest_process *p = &m->vcpus[vcpu].guest->smi_handler;

	p->records = records;
	p->record_count = n;
	p->position = 0;
	p->cr3_gfn = GUEST_NO_GFN;
}

void vcpu_set_smm(struct machine *m, uint32_t vcpu, int on)
{
	struct guest *g = m->vcpus[vcpu].guest;

	if (g->smm == (on != 0))
		return;
	g->smm = on != 0;
	g->space++;
	if (on) {
		g->paging_outside_smm = g->config.paging;
		g->config.paging = 0;
		g->injected_outside_smm = g->injected;
		g->injected.pending = false;
		g->smi_handler.position = 0;
	} else {
		g->config.paging = g->paging_outside_smm;
		g->injected = g->injected_outside_smm;
	}
}

void vcpu_set_paging(struct machine *m, uint32_t vcpu, int on)
{
	struct guest *g = m->vcpus[vcpu].guest;

	g->config.paging = on != 0;
	g->space++;
}

void vcpu_set_wp(struct machine *m, uint32_t vcpu, int on)
{
	struct guest *g = m->vcpus[vcpu].guest;

	if (g->wp_clear == !on)
		return;
	g->wp_clear = !on;
	g->space++;
}

void vcpu_set_tables(struct machine *m, uint32_t vcpu, uint32_t tables)
{
	struct guest *g = m->vcpus[vcpu].guest;

	if (g->tables == tables)
		return;
	g->tables = tables;
	g->space++;
}

void vcpu_set_pdptrs(struct machine *m, uint32_t vcpu, const uint64_t *pdptes)
{
	memcpy(m->vcpus[vcpu].guest->pdpte, pdptes, sizeof(m->vcpus[vcpu].guest->pdpte));
}

void vcpu_set_pcide(struct machine *m, uint32_t vcpu, int on)
{
	m->vcpus[vcpu].guest->config.pcid = on != 0;
}

uint32_t exit_instruction(struct walk *w, uint32_t insn, uint64_t operand)
{
	w->exit->access = insn;
	w->exit->linear = operand;
	return EXIT_INSTRUCTION;
}

uint32_t exit_of(const struct walk *w, enum walk_result r)
{
	return r == WALK_EXIT ? w->exit->reason : r == WALK_GUEST_FAULT ? EXIT_TRIPLE_FAULT : EXIT_REASONS;
}
