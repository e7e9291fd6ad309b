/* SRCU, a domain per VM.  A reader may sleep and may move to another CPU; it must pass the index that it got to
 * srcu_read_unlock().
 */
#ifndef FLUSHLAB_SRCU_H
#define FLUSHLAB_SRCU_H

#include "core/machine_types.h"
#include "sync/waiters.h"

/* api */
/* call: modelled; fence; keeps-gil */
int srcu_read_lock(struct machine *m, uint32_t cpu, uint32_t vm);
/* call: modelled; keeps-gil */
void srcu_read_unlock(struct machine *m, uint32_t cpu, uint32_t vm, int index);
/* call: modelled; fence */
int synchronize_srcu(struct machine *m, uint32_t cpu, uint32_t vm);
/* end api */

struct srcu {
	_Atomic uint32_t index;
	_Atomic uint64_t lock_count[2];
	_Atomic uint64_t unlock_count[2];
	_Atomic uint32_t synchronizing; /* CPU + 1 of the CPU that synchronizes, 0: none */
	_Atomic uint32_t waiting;       /* CPU + 1 of that CPU while it waits for readers */
	struct waiters queue;           /* CPUs that wait for their turn to synchronize */
};

int srcu_init(struct srcu *srcu, const struct machine *m);
void srcu_fini(struct srcu *srcu, const struct machine *m);

#endif
