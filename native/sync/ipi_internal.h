/* Internals of calls between CPUs, shared by ipi.c and smp.c. */
#ifndef FLUSHLAB_IPI_INTERNAL_H
#define FLUSHLAB_IPI_INTERNAL_H

#include "core/machine_types.h"

enum csd_flags {
	CSD_LOCKED = 1, /* in use: queued or being run */
	CSD_WAITED = 2, /* the sender sleeps until it is unlocked */
};

/* One per sender and target (cfd_data in kernel/smp.c), so that queueing never allocates.
 *
 * The plain fields are written by the sender before it queues the node (release, acquired by the CPU that takes
 * the queue) and read before the node is unlocked (release, acquired by csd_lock_wait).
 */
struct csd {
	alignas(CACHELINE) struct csd *next;
	_Atomic uint32_t flags;
	uint32_t sender;
	uint32_t function;
	uint32_t sync;
	uint64_t argument;
};

#endif
