/* A guest OS's mappings, in its records and in the guest's tables, and the invalidations that each change owes (SDM
 * vol. 3A, 4.10.4).  Each function may be repeated from its start after a VM exit, as those of guest_os.h. */
#ifndef FLUSHLAB_GUEST_MAPPING_H
#define FLUSHLAB_GUEST_MAPPING_H

#include "core/machine_types.h"
#include "vm/guest_state.h"
#include "walk/walk.h"

/* Choose a frame or a 2 MiB block for a page that is not mapped, and map it.  WALK_GUEST_FAULT: no memory is left. */
enum walk_result os_map(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp);
/* Write a mapping into the page's entry, or none. */
enum walk_result os_install(struct walk *w, const struct guest_process *p, uint64_t page, struct guest_mapping to);
enum walk_result os_clear_entry(struct walk *w, const struct guest_process *p, uint64_t page, bool huge);
/* Record the mapping of a page, and with a 2 MiB page of all that it maps. */
void os_map_pages(struct guest_process *p, uint64_t page, struct guest_page *gp, struct guest_mapping to);
/* Unmap a page, with its neighbours if a 2 MiB page maps them, and invalidate it. */
enum walk_result os_unmap(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp);
/* Unmap it without an invalidation: of a process that no translation is cached of. */
enum walk_result os_unmap_uncached(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp);
/* Take write access to a page away, and invalidate it. */
enum walk_result os_protect(struct walk *w, struct guest_process *p, uint64_t page, struct guest_page *gp);
enum { LOOK_FOR_PAGE = 256 }; /* pages tried in a search for a mapped one */
/* Return the index of the process's next page that is mapped (and writable), from where the last search ended; page_count:
 * the search found none. */
uint64_t os_find_mapped(struct guest_process *p, bool writable);
/* The same for a page that is mapped read-only. */
uint64_t os_find_read_only(struct guest_process *p);

#endif
