/* See context.h. */
#include "walk/context.h"

#include "tlb/tlb.h"
#include "tlb/tlb_l1.h"
#include "tlb/tlb_types.h"
#include "vm/guest_state.h"

void hw_load_context(struct walk *w, const struct vmcs *vmcs)
{
	const struct guest *g = w->guest;

	w->vmcs = vmcs;
	w->life_bits = (vmcs->ept ? vmcs->life ^ nested_life(g->vmx.nested) : linear_life(vmcs->owner, g)) << 16;
	l1_set_life(&w->tlb->l1, w->life_bits);
	if (!vmcs->ept)
		tlb_switch(w->tlb, vmcs->vpid, vmcs->pcid, 0, 0);
	else if (g->config.paging)
		tlb_switch(w->tlb, vmcs->vpid, g->pcid, vmcs->root, 1);
	else
		tlb_switch_physical(w->tlb, vmcs->vpid, vmcs->root);
}
