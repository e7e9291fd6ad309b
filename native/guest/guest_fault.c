/* See guest_fault.h. */
#include "guest/guest_fault.h"

#include "core/machine_types.h"
#include "vm/guest_state.h"
#include "vm/vm.h"
#include "walk/walk.h"

int guest_store_value(struct machine *m, uint32_t vcpu, uint64_t *value)
{
	const struct guest_store *store = &m->vcpus[vcpu].guest->store;

	*value = store->value;
	return store->faulted;
}

void guest_store_done(struct machine *m, uint32_t vcpu)
{
	struct guest *g = m->vcpus[vcpu].guest;
	struct guest_store *store = &g->store;

	store->done = store->faulted;
	store->faulted = false;
	/* The link to a new table is in place. */
	if (g->choices.table == (store->value & GPTE_ADDRESS) >> 12)
		g->choices.table = GUEST_NO_GFN;
}

void guest_inject_page_fault(struct machine *m, uint32_t vcpu, uint64_t linear, uint32_t error_code)
{
	m->vcpus[vcpu].guest->injected =
		(struct guest_fault){ .linear = linear, .error_code = error_code, .pending = true };
}

void guest_store_faulted(struct walk *w, uint64_t value)
{
	w->guest->store = (struct guest_store){ .linear = w->linear, .value = value, .faulted = true };
}
