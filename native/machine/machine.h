/* Building, stopping and restoring a machine. */
#ifndef FLUSHLAB_MACHINE_H
#define FLUSHLAB_MACHINE_H

#include "core/machine_types.h"

/* api */
/* Build a machine; NULL if memory is short, and then error holds a message. */
/* call: aside */
struct machine *machine_create(const struct machine_config *config, char *error, uint32_t size);
/* Free the machine.  No other thread may be inside a call on it. */
/* call: aside */
void machine_destroy(struct machine *m);
/* Make every wait, current and future, return MACHINE_STOPPED, and every guest leave guest mode. */
/* call: aside */
void machine_stop(struct machine *m);
/* call: aside; keeps-gil */
int machine_stopping(const struct machine *m);
/* Save the state of a machine that was built with `snapshots`.  No other thread may be inside a call on it, now
 * or at the restore.  0 or MACHINE_NOMEM, or MACHINE_MISUSE without `snapshots`. */
/* call: anything */
int machine_snapshot(struct machine *m);
/* Restore the last machine_snapshot(), counters, events and reports included.  Its cost depends on how much was
 * changed since then.  0, or MACHINE_MISUSE if there was none. */
/* call: anything */
int machine_restore(struct machine *m);
/* Return a hash of all its memory; equal for equal states of one machine.  0 without `snapshots`. */
/* call: anything */
uint64_t machine_fingerprint(const struct machine *m);
/* Compute two hashes of all memory that differs from the last snapshot, except memory on which no later step depends
 * (digest.c): equal for equal states.  Return 0, or MACHINE_MISUSE where the kernel cannot tell which pages differ. */
/* call: anything */
int machine_digest(struct machine *m, uint64_t digest[2]);
/* Give the memory that the process has freed back to the kernel.  malloc(3) keeps it for later, and decoding
 * traces frees a hundred MiB that a run does not need again. */
/* call: aside */
void machine_trim(const struct machine *m);
/* Return the message of the last MACHINE_MISUSE on this CPU. */
/* call: aside */
const char *machine_error_text(struct machine *m, uint32_t cpu);
/* end api */

#endif
