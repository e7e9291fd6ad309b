/* The last steps by which the tree's code took a right away, flushed, yielded or freed, with the functions on the
 * stack. */
#include "linux.h"
#include "machine_internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct tree_step *steps; /* the last MOST_STEPS; NULL if there is no memory for them */
static unsigned long next_step;

/* Follow the frame pointers from the shim's function up to the one that Python called. */
static void places_of(struct tree_step *step)
{
	void *const *frame = __builtin_frame_address(0);

	for (unsigned int n = 0; n < MOST_PLACES; ) {
		void *const *outer = frame[0];

		if (outer <= frame || (const void *)outer > here->entry)
			return;
		step->places[n++] = (long)((unsigned long)frame[1] - shim_base);
		frame = outer;
	}
}

static struct tree_step *noted(unsigned int kind, u64 gfn, u64 npages)
{
	struct tree_step *step;
	struct timespec now;

	if (!steps)
		return NULL;
	step = &steps[__atomic_fetch_add(&next_step, 1, __ATOMIC_RELAXED) % MOST_STEPS];
	clock_gettime(CLOCK_MONOTONIC, &now);
	memset(step, 0, sizeof(*step));
	step->time = (u64)now.tv_sec * 1000000000 + (u64)now.tv_nsec;
	step->gfn = gfn;
	step->pages = npages;
	step->cpu = here->api.id;
	step->vm = here->api.vm;
	step->kind = kind;
	return step;
}

void shim_step(unsigned int kind, u64 gfn, u64 npages)
{
	struct tree_step *step = noted(kind, gfn, npages);

	if (step)
		places_of(step);
}

void shim_passed(u64 start, u64 end, const void *function)
{
	struct tree_step *step = noted(STEP_PASSED, start, end - start);

	/* A return address is one behind the instruction that is meant. */
	if (step)
		step->places[0] = (long)((unsigned long)function + 1 - shim_base);
}

void shim_make_steps(void)
{
	if (!steps)
		steps = calloc(MOST_STEPS, sizeof(*steps));
}

unsigned int tree_steps(struct tree_step *out, unsigned int most)
{
	unsigned long end = __atomic_load_n(&next_step, __ATOMIC_RELAXED);
	unsigned long begin = end > MOST_STEPS ? end - MOST_STEPS : 0;
	unsigned int n = 0;

	if (end - begin > most)
		begin = end - most;
	while (begin < end)
		out[n++] = steps[begin++ % MOST_STEPS];
	return n;
}
