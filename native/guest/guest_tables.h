/* Guest page-table pages as the guest OS handles them.  Results as in walk.h. */
#ifndef FLUSHLAB_GUEST_TABLES_H
#define FLUSHLAB_GUEST_TABLES_H

#include "core/machine_types.h"
#include "walk/walk.h"

struct guest_process;

/* Allocate a page and zero it.  WALK_GUEST_FAULT: none left. */
enum walk_result os_alloc_zeroed(struct walk *w, bool mmio, uint64_t *gfn);
/* Zero a page.  Without EPT it may be repeated after a store that KVM has emulated; so may os_write_entry(). */
enum walk_result os_zero_page(struct walk *w, uint64_t gfn);
enum walk_result os_write_entry(struct walk *w, uint64_t table_gfn, uint32_t index, uint64_t value);
/* Find the table that holds the entry of `level` for a page, and that entry; a 2 MiB leaf above `level` ends
 * the search early.  Makes missing tables; without `create`, a missing table is WALK_GUEST_FAULT. */
enum walk_result os_find_table(struct walk *w, const struct guest_process *p, uint64_t page, uint32_t level,
			       bool create, uint64_t *table_gfn, uint64_t *entry);

#endif
