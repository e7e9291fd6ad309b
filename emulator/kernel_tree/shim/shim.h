/* Shared by shim.c, compared.c and glue.c. */
#ifndef FLUSHLAB_SHIM_H
#define FLUSHLAB_SHIM_H

#include "api.h"

struct shim {
	struct shim_event events[MAX_EVENTS];
	unsigned int n_events;
	unsigned int rcu_depth;
	int lock; /* of mmu_lock: 0, SHIM_READ, SHIM_WRITE */
	const volatile void *last_spte;
	struct shim_point points[MAX_POINTS];
	unsigned int n_points, next_point;
	void (*other)(void);
	int slots_logging[2];
	const void *slots[2];
	unsigned char levels[2][64];
};

extern struct shim shim;

void shim_event(unsigned int kind, u64 a, u64 b, const char *text, int with_state);
void shim_reset(void);
void shim_reset_rcu(void);
/* Whether this address is in a page table; *freed: in one that was freed. */
bool shim_in_table(const volatile void *p, bool *freed);
/* In glue.c, where the tree's structures are known: the first gfn that an SPTE maps; record the SPTEs of now. */
u64 glue_gfn_of(const volatile void *sptep);
int glue_record(void);

#endif
