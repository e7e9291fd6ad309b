#define _GNU_SOURCE
#include "machine/machine.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#ifdef __GLIBC__ /* from <stdio.h> */
#include <malloc.h>
#endif

#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "ept/shadow_mmu.h"
#include "machine/cpus.h"
#include "machine/digest.h"
#include "machine/vms.h"
#include "memory/frame.h"
#include "oracle/oracle.h"
#include "sync/cpu.h"
#include "sync/rcu.h"
#include "tlb/tlb_l1.h"
#include "walk/flush.h"
#include "walk/hypercall.h"
#include "walk/vmcs.h"

/* --- impossible configurations -------------------------------------------------------------------------- */

static uint64_t frames_wanted(const struct machine_config *config)
{
	return (uint64_t)config->root_frames + config->table_frames + config->guest_frames +
	       (uint64_t)config->guest_blocks * BLOCK_FRAMES;
}

static const char *cpus_impossible(const struct machine_config *config)
{
	if (!config->pcpus)
		return "pcpus is 0: a machine needs a physical CPU";
	if ((uint64_t)config->pcpus + config->housekeeping > MACHINE_CPUS_MAX)
		return "pcpus and housekeeping CPUs exceed 16384 in all";
	return NULL;
}

static const char *tlb_impossible(const struct machine_config *config)
{
	if (config->l1_ways != L1_WAYS)
		return "l1_ways must be 4: the first-level TLB has 64 entries in 4 ways";
	if (config->l2_entries && !config->l2_ways)
		return "l2_ways is 0: a second-level TLB that is bounded needs ways";
	if (config->l2_entries && config->l2_entries % config->l2_ways)
		return "l2_ways must divide l2_entries";
	return NULL;
}

/* Return a message, or NULL. */
static const char *impossible(const struct machine_config *config)
{
	const char *why = cpus_impossible(config);

	if (!why)
		why = tlb_impossible(config);
	if (!why && frames_wanted(config) > MACHINE_FRAMES_MAX)
		why = "more than 2^24 host frames: an SPTE has 24 bits for the frame number";
	return why;
}

/* --- parts ------------------------------------------------------------------------------------------ */

/* Spinning pays only if another core may serve the wait meanwhile. */
static uint32_t spin_time(void)
{
	cpu_set_t allowed;

	if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0 && CPU_COUNT(&allowed) < 2)
		return 0;
	return 1500;
}

/* --- the machine ------------------------------------------------------------------------------------ */

/* Build the parts in the order of need; returns the resource that ran short.  Callbacks that are still queued
 * free frames, so RCU is destroyed before the frames; VMs free theirs, too. */
static const char *build(struct machine *m)
{
	if (cpus_create(m))
		return "the CPUs and their TLBs";
	if (events_create(m))
		return "the events";
	if (oracle_create(m))
		return "the oracle";
	if (frames_create(m) || shadow_mmu_create(m))
		return "host frames";
	if (rcu_create(m))
		return "RCU";
	if (vms_create(m) || vmcss_create(m))
		return "VMs, vCPUs and VMCSs";
	return NULL;
}

static void dismantle(struct machine *m)
{
	struct heap *heap = m->heap;

	rcu_destroy(m);
	vmcss_destroy(m);
	if (m->vms)
		vms_destroy(m);
	shadow_mmu_destroy(m);
	if (m->frames)
		frames_destroy(m);
	if (m->oracle)
		oracle_destroy(m);
	events_destroy(m);
	cpus_destroy(m);
	heap_free(heap, m);
	heap_destroy(heap);
}

static struct machine *no_memory(char *error, uint32_t size)
{
	snprintf(error, size, "machine: not enough memory");
	return NULL;
}

/* Return the size of the frames, plus more than enough for all else: only memory that is used counts. */
static size_t heap_wanted(const struct machine_config *config)
{
	return ((size_t)256 << 20) + ((size_t)frames_wanted(config) << 13);
}

void machine_trim(const struct machine *m)
{
	(void)m; /* the process's own memory is meant */
#ifdef __GLIBC__
	malloc_trim(0);
#endif
}

struct machine *machine_create(const struct machine_config *config, char *error, uint32_t size)
{
	const char *why = impossible(config);
	struct heap *heap = NULL;
	struct machine *m;

	if (why) {
		snprintf(error, size, "machine: %s", why);
		return NULL;
	}
	if (config->snapshots) {
		heap = heap_create(heap_wanted(config));
		if (!heap)
			return no_memory(error, size);
	}
	m = heap_zalloc(heap, 1, sizeof(*m));
	if (!m) {
		heap_destroy(heap);
		return no_memory(error, size);
	}
	m->heap = heap;
	m->config = *config;
	m->cpu_count = config->pcpus + config->housekeeping;
	m->spin_ns = spin_time();
	flush_register();
	hypercall_register();
	ept_register();
	vmcs_register();
	why = build(m);
	if (why) {
		snprintf(error, size, "machine: not enough memory for %s", why);
		dismantle(m);
		return NULL;
	}
	return m;
}

void machine_destroy(struct machine *m)
{
	if (m)
		dismantle(m);
}

int machine_snapshot(struct machine *m)
{
	int r = m->heap ? digest_prepare(m) : MACHINE_MISUSE;

	return r ? r : heap_snapshot(m->heap);
}

int machine_restore(struct machine *m)
{
	return m->heap ? heap_restore(m->heap) : MACHINE_MISUSE;
}

int machine_digest(struct machine *m, uint64_t digest[2])
{
	return m->heap ? heap_digest(m->heap, digest) : MACHINE_MISUSE;
}

uint64_t machine_fingerprint(const struct machine *m)
{
	return m->heap ? heap_fingerprint(m->heap) : 0;
}

void machine_stop(struct machine *m)
{
	atomic_store_explicit(&m->stopping, 1, memory_order_seq_cst);
	for (uint32_t cpu = 0; cpu < m->cpu_count; cpu++)
		cpu_notify(m, cpu, ATTENTION_STOP);
}

int machine_stopping(const struct machine *m)
{
	return atomic_load_explicit(&m->stopping, memory_order_seq_cst) != 0;
}

const char *machine_error_text(struct machine *m, uint32_t cpu)
{
	return m->cpus[cpu].error;
}
