/* Instructions of guest programs that invalidate translations, and the changes of mappings that wait for them.
 *
 * A program that changes a mapping invalidates nothing.  Its change waits until an invalidation that covers it was executed
 * on this vCPU: by the program, or by an instruction that KVM emulates.  Only then the old translation is stale.
 */
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

struct guest;
struct guest_op;
struct guest_page;
/* Make room for a change by each of n operations, besides those that are not invalidated yet.  An operation that a VM
 * exit interrupts notes its change once, when it is complete. */
int program_reserve_changes(struct machine *m, struct guest *g, uint32_t n);
/* A page of the current process is no longer mapped as gp says: all of the mapping is gone, or write access alone. */
void program_note_change(struct walk *w, uint64_t page, const struct guest_page *gp, bool all, bool global);
/* Execute INVLPG, INVPCID or MOV to CR3.  Without EPT they exit, as guest_exit_insn(). */
enum walk_result program_invlpg(struct walk *w, const struct guest_op *op);
enum walk_result program_invpcid(struct walk *w, const struct guest_op *op);
enum walk_result program_mov_cr3(struct walk *w, const struct guest_op *op);

#endif
