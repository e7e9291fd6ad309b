/* The hardware's context in guest mode: the tags of its TLB and the root of its walks. */
#ifndef FLUSHLAB_CONTEXT_H
#define FLUSHLAB_CONTEXT_H

#include "walk/vmcs.h"
#include "walk/walk.h"

/* Load the context of a VMCS and of the guest's CR0.PG and CR3: at VM entry, and when the guest loads CR3. */
void hw_load_context(struct walk *w, const struct vmcs *vmcs);

#endif
