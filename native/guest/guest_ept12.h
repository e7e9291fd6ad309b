/* L1's EPTs for its nested guests: L1 writes their tables in its own memory, and invalidates with INVEPT.
 *
 * The tables have four levels and map pages of 4 KiB and of 2 MiB (SDM vol. 3C, 29.3.2).  vm/ept12.h records their contents.  If an
 * access of a nested guest meets no mapping, the guest exits to L1.  If the page is one that the nested guest's OS
 * uses for its page tables, L1 maps it, to L1's page of the same number; L1 skips any other access, as if it emulated
 * a device.
 */
#ifndef FLUSHLAB_GUEST_EPT12_H
#define FLUSHLAB_GUEST_EPT12_H

#include "core/machine_types.h"
#include "walk/walk.h"

struct guest;
struct guest_op;

/* Do an operation GUEST_OP_EPT12_*: write an entry of an EPT, and first make the tables that are missing.  After
 * WALK_EXIT the operation is repeated from its start; KVM may have emulated a store by then. */
enum walk_result ept12_op(struct walk *w, const struct guest_op *op);
/* Make the root of an EPT if it has none, for the operand of an instruction that names it. */
enum walk_result ept12_root(struct walk *w, uint32_t number);
/* Return the EPTP of an EPT: its root, 4 levels, write-back, and accessed and dirty flags if `ad`. */
uint64_t ept12_eptp(const struct guest *l1, uint32_t number, bool ad);
/* Record that L1 has invalidated the EPT, or (number 0) all EPTs.  page: of L2, or EPT12_ANY_PAGE. */
#define EPT12_ANY_PAGE UINT64_MAX
void ept12_invalidated(struct machine *m, struct vcpu *vcpu, uint32_t number, uint64_t page);
/* Record that L1 enters a nested guest with this EPT, or (0) without one, or that the guest switches to it (VMFUNC). */
void ept12_entered(struct machine *m, struct vcpu *vcpu, uint32_t number);
/* Return whether the nested guest has exited to L1 for an access, which L1 has not handled yet. */
bool ept12_violation_pending(const struct guest *l1);
/* Handle that exit for L1, which then executes VMRESUME. */
enum walk_result ept12_violation(struct walk *w);
/* Free the EPTs of L1.  A nested guest has none of its own. */
void ept12s_destroy(struct machine *m, struct guest *l1);

#endif
