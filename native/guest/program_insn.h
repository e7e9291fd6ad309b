/* Instructions of guest programs that invalidate translations. */
#ifndef FLUSHLAB_PROGRAM_INSN_H
#define FLUSHLAB_PROGRAM_INSN_H

#include "core/machine_types.h"
#include "walk/walk.h"

/* api */
/* Called by the vCPU's thread, outside guest mode: KVM emulates a guest instruction that invalidates every
 * translation of the guest's page tables (CR0.PG cleared).  Dropping them is left to KVM. */
/* call: aside */
void guest_invalidates_all(struct machine *m, uint32_t vcpu);
/* Likewise, for an instruction that invalidates the translations of the current PCID, global ones included
 * (CR4.SMEP set, CR4.PAE toggled). */
/* call: aside */
void guest_invalidates_pcid(struct machine *m, uint32_t vcpu);
/* end api */

struct guest_op;
/* Execute INVLPG, INVPCID or MOV to CR3.  Without EPT they exit, as guest_exit_insn(). */
enum walk_result program_invlpg(struct walk *w, const struct guest_op *op);
enum walk_result program_invpcid(struct walk *w, const struct guest_op *op);
enum walk_result program_mov_cr3(struct walk *w, const struct guest_op *op);

#endif
