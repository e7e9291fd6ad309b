/* L1's EPTs for its nested guests: L1 writes their tables in its own memory, and invalidates with INVEPT.
 *
 * Four levels of 4 KiB pages (SDM vol. 3C, 29.3.2).  The records are in ept12.h.  A nested guest whose access meets no
 * mapping exits to L1.  L1 maps the pages that the nested guest's OS uses for its page tables, to L1's pages of the same
 * numbers; any other access it skips, as a hypervisor that emulates a device does.
 */
#ifndef FLUSHLAB_GUEST_EPT12_H
#define FLUSHLAB_GUEST_EPT12_H

#include "core/machine_types.h"
#include "walk/walk.h"

struct guest;
struct guest_op;

/* Operations GUEST_OP_EPT12_*: write an entry of an EPT, whose tables are made when they are missing.  Each may be repeated
 * from its start after WALK_EXIT; KVM may have emulated a store then. */
enum walk_result ept12_op(struct walk *w, const struct guest_op *op);
/* Make the root of an EPT if it has none, for the operand of an instruction that names it. */
enum walk_result ept12_root(struct walk *w, uint32_t number);
/* Return the EPTP of an EPT: its root, 4 levels, write-back, and accessed and dirty flags if `ad`. */
uint64_t ept12_eptp(const struct guest *l1, uint32_t number, bool ad);
/* L1 has invalidated the EPT; number 0: all of them.  page: of L2, or EPT12_ANY_PAGE. */
#define EPT12_ANY_PAGE UINT64_MAX
void ept12_invalidated(struct machine *m, struct vcpu *vcpu, uint32_t number, uint64_t page);
/* A nested guest is entered with this EPT, or (0) without one. */
void ept12_entered(struct machine *m, struct vcpu *vcpu, uint32_t number);
/* Return whether the nested guest has exited to L1 for an access, which L1 has not handled yet. */
bool ept12_violation_pending(const struct guest *l1);
/* Handle it: L1 executes VMRESUME next. */
enum walk_result ept12_violation(struct walk *w);
/* L1's; a nested guest has none of its own. */
void ept12s_destroy(struct machine *m, struct guest *l1);

#endif
