/* Frames and user memory under several threads: no two owners share a frame, contents survive every move, and the
 * custody that a fault takes belongs to the frame that it takes. */
#include "harness.h"

#include <string.h>

#include "core/machine_types.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "memory/mm.h"
#include "memory/mm_huge.h"
#include "memory/mm_image.h"

enum { THREADS = 4, REGIONS = 2, PAGES = REGIONS * BLOCK_FRAMES, HELD = 24, NO_FRAME = 0xffffffff };

static struct machine *m;
static _Atomic uint32_t stop;
static uint32_t scale = 1;

static void machine_begin(uint32_t guest_frames)
{
	struct machine_config config = {
		.pcpus = 1, .housekeeping = THREADS, .vms = 1, .vcpus = 1,
		.root_frames = 4, .table_frames = 16, .guest_frames = guest_frames, .guest_blocks = REGIONS + 1,
		.l1_ways = 4, .l2_entries = 64, .l2_ways = 4, .psc_entries = 16, .seed = 1,
	};
	char error[200] = "";

	m = machine_create(&config, error, sizeof(error));
	CHECK(m && vm_create(m, PAGES) == 0);
	atomic_store(&stop, 0);
}

static void machine_end(void)
{
	vm_destroy(m, 0);
	for (uint32_t kind = 0; kind < FRAME_KINDS; kind++)
		CHECK(!frames_in_use(m, kind));
	machine_destroy(m);
}

static uint32_t next_random(uint32_t *state)
{
	*state = *state * 1664525 + 1013904223;
	return *state >> 8;
}

static void run(uint32_t n, void *(*const *bodies)(void *), uint32_t rounds)
{
	struct actor actors[THREADS] = { 0 };

	for (uint32_t i = 0; i < n; i++) {
		actors[i] = (struct actor){ .m = m, .cpu = 1 + i, .rounds = rounds };
		actor_start(&actors[i], bodies[i]);
	}
	actor_join(&actors[0]);
	atomic_store(&stop, 1);
	for (uint32_t i = 1; i < n; i++)
		actor_join(&actors[i]);
}

/* --- frames -------------------------------------------------------------------------------------------- */

static void drop(struct actor *a, uint32_t hfn, uint32_t kind)
{
	uint32_t tag = frame_tag_of(m, hfn), life = frame_life_of(m, hfn), n = kind == FRAME_BLOCK ? BLOCK_FRAMES : 1;

	for (uint32_t i = 0; i < n; i++) {
		CHECK(frame_read(m, hfn + i, 17) == ((uint64_t)a->cpu << 32 | hfn));
		frame_free(m, a->cpu, hfn + i);
	}
	CHECK(frame_life_of(m, hfn) != life && frame_tag_of(m, hfn) != tag);
}

static void *churns_frames(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu, hfn[HELD] = { 0 }, kind[HELD];

	for (uint32_t round = 0; round < a->rounds; round++) {
		uint32_t i = next_random(&random) % HELD;
		int64_t first;

		if (hfn[i]) {
			drop(a, hfn[i], kind[i]);
			hfn[i] = 0;
			continue;
		}
		kind[i] = next_random(&random) % 64 ? next_random(&random) % FRAME_BLOCK : FRAME_BLOCK;
		first = frame_alloc(m, a->cpu, kind[i]);
		CHECK(first == MACHINE_NOMEM || frame_read(m, (uint32_t)first, 17) ==
							(kind[i] <= FRAME_TABLE ? 0 : FRAME_POISON));
		hfn[i] = first < 0 ? 0 : (uint32_t)first;
		for (uint32_t n = 0; hfn[i] && n < (kind[i] == FRAME_BLOCK ? BLOCK_FRAMES : 1); n++)
			frame_write(m, hfn[i] + n, 17, (uint64_t)a->cpu << 32 | hfn[i]);
	}
	for (uint32_t i = 0; i < HELD; i++)
		if (hfn[i])
			drop(a, hfn[i], kind[i]);
	return NULL;
}

static void test_frames(void)
{
	void *(*const bodies[])(void *) = { churns_frames, churns_frames, churns_frames };

	harness_begin("a frame has one owner", 120);
	machine_begin(32);
	run(3, bodies, 20000 * scale);
	machine_end();
}

/* By one operation of the host. */
static void take(uint32_t hfn, uint32_t n)
{
	struct taking t = { 0 };

	for (uint32_t i = 0; i < n; i++)
		frame_take(m->frames, &t, hfn + i);
	frame_taken(m->frames, &t);
}

static void test_tags(void)
{
	uint32_t hfn, custody;

	harness_begin("15-bit tags: wrapped, and older than the last free", 30);
	machine_begin(8);
	hfn = (uint32_t)frame_alloc(m, 1, FRAME_GUEST);
	for (uint32_t i = 1; i <= 70000; i++) {
		CHECK(frame_tag_advance(m->frames, hfn) == (i & FRAME_TAG_MASK));
		take(hfn, 1);
		CHECK(!frame_freed_since(m->frames, hfn, i & FRAME_TAG_MASK));
	}
	custody = frame_host_tag_of(m, hfn);
	frame_free(m, 1, hfn);
	CHECK(frame_freed_since(m->frames, hfn, custody));
	CHECK(!frame_freed_since(m->frames, hfn, frame_host_tag_of(m, hfn)));
	CHECK((uint32_t)frame_alloc(m, 1, FRAME_GUEST) == hfn);
	/* A fault in the new life, then as many promises as 15 bits can count, and more. */
	custody = frame_host_tag_of(m, hfn);
	for (uint32_t i = 0; i < FRAME_TAG_MASK; i++) {
		CHECK(!frame_freed_since(m->frames, hfn, custody));
		take(hfn, 1);
	}
	for (uint32_t i = 0; i < 70000; i++) {
		CHECK(!frame_freed_since(m->frames, hfn, frame_host_tag_of(m, hfn)));
		take(hfn, 1);
	}
	frame_free(m, 1, hfn);
	machine_end();
}

static bool holds(uint32_t hfn, uint32_t custody)
{
	return frame_custody_holds(m->frames, hfn, custody | CUSTODY_OF_BLOCK);
}

static void test_block_custody(void)
{
	uint32_t block, first, later, one;

	harness_begin("a huge leaf's custody is void for the frames that were taken since", 30);
	machine_begin(8);
	block = (uint32_t)frame_alloc(m, 1, FRAME_BLOCK);
	first = frame_block_custody(m, block);
	CHECK(block % BLOCK_FRAMES == 0 && holds(block, first) && holds(block + 511, first));
	one = frame_custody_of_one(m->frames, block + 7, first | CUSTODY_OF_BLOCK);
	CHECK(one == frame_host_tag_of(m, block + 7));
	take(block + 7, 1);
	later = frame_block_custody(m, block);
	CHECK(!holds(block + 7, first) && holds(block + 7, later) && holds(block + 6, first) && holds(block + 8, first));
	/* A split: only the child of the frame that was taken has a void custody. */
	CHECK(frame_custody_of_one(m->frames, block + 7, first | CUSTODY_OF_BLOCK) != frame_host_tag_of(m, block + 7));
	CHECK(frame_custody_of_one(m->frames, block + 8, first | CUSTODY_OF_BLOCK) == frame_host_tag_of(m, block + 8));
	/* A void custody of a frame is never granted again; a valid one is the frame's current custody. */
	CHECK(!holds(block + 7, frame_custody_of_block(m->frames, block + 7, one)));
	CHECK(frame_custody_of_block(m->frames, block + 8, frame_host_tag_of(m, block + 8)) == later);
	for (uint32_t i = 0; i < BLOCK_FRAMES; i++) {
		CHECK(frames_in_use(m, FRAME_BLOCK) == 1);
		CHECK(!frame_freed_since(m->frames, block + (i * 7) % BLOCK_FRAMES, later | CUSTODY_OF_BLOCK));
		frame_free(m, 1, block + (i * 7) % BLOCK_FRAMES);
		CHECK(frame_freed_since(m->frames, block + (i * 7) % BLOCK_FRAMES, later | CUSTODY_OF_BLOCK));
	}
	CHECK(!frames_in_use(m, FRAME_BLOCK));
	CHECK((uint32_t)frame_alloc(m, 1, FRAME_BLOCK) == block);
	CHECK(!holds(block, later) && holds(block, frame_block_custody(m, block)));
	CHECK(!frame_freed_since(m->frames, block, frame_block_custody(m, block) | CUSTODY_OF_BLOCK));
	for (uint32_t i = 0; i < BLOCK_FRAMES; i++)
		frame_free(m, 1, block + i);
	machine_end();
}

/* One frame is never taken while the host takes the others more often than 15 bits can count. */
static void test_block_clock_wraps(void)
{
	uint32_t block;

	harness_begin("a block's clock wraps, and a frame that was taken long ago is still held", 60);
	machine_begin(8);
	block = (uint32_t)frame_alloc(m, 1, FRAME_BLOCK);
	take(block + 3, 1);
	for (uint32_t i = 0; i < 100000; i++) {
		uint32_t custody = frame_block_custody(m, block);

		CHECK(holds(block, custody) && holds(block + 3, custody) && holds(block + 511, custody));
		CHECK(!frame_freed_since(m->frames, block + 3, custody | CUSTODY_OF_BLOCK));
		take(block + 4, 2);
		CHECK(!holds(block + 4, custody) && !holds(block + 5, custody) && holds(block + 3, custody));
	}
	for (uint32_t i = 0; i < BLOCK_FRAMES; i++)
		frame_free(m, 1, block + i);
	machine_end();
}

/* Two operations at a time: a fault that looks before the last frame of one is taken has looked before that one. */
static void test_taking_overlaps(void)
{
	struct taking a = { 0 }, b = { 0 };
	uint32_t block, custody;

	harness_begin("frames are taken at one time", 30);
	machine_begin(8);
	block = (uint32_t)frame_alloc(m, 1, FRAME_BLOCK);
	frame_take(m->frames, &a, block);
	custody = frame_block_custody(m, block);
	frame_take(m->frames, &a, block + 1);
	CHECK(!holds(block + 1, custody) && !holds(block, custody) && holds(block + 2, custody));
	frame_take(m->frames, &b, block);
	frame_taken(m->frames, &b);
	frame_taken(m->frames, &a);
	custody = frame_block_custody(m, block);
	CHECK(holds(block, custody) && holds(block + 1, custody));
	/* The older time does not come back. */
	frame_take(m->frames, &a, block + 9);
	frame_take(m->frames, &b, block + 9);
	frame_taken(m->frames, &b);
	custody = frame_block_custody(m, block);
	frame_take(m->frames, &a, block + 9);
	frame_taken(m->frames, &a);
	CHECK(frame_block_custody(m, block) == custody && holds(block + 9, custody));
	for (uint32_t i = 0; i < BLOCK_FRAMES; i++)
		frame_free(m, 1, block + i);
	machine_end();
}

/* --- user memory --------------------------------------------------------------------------------------- */

/* Takes frame and custody, then looks the page up again.  If it has another frame by now, the first one was freed
 * before this look-up, and a custody taken before that is void. */
static void *faults(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	for (uint32_t i = 0; i < a->rounds; i++) {
		uint64_t hva = next_random(&random) % PAGES;
		struct mm_page page;
		uint32_t hfn = NO_FRAME, tag, writable;
		int r = mm_fault(m, a->cpu, 0, hva, 0, &page);

		CHECK(!r || r == MACHINE_NOMEM);
		if (r)
			continue;
		if (i % 64 == 0)
			sched_yield();
		CHECK(mm_fault_range(m, a->cpu, 0, hva, 1, 0, &hfn, &tag, &writable) >= 0);
		if (hfn != page.hfn)
			CHECK(frame_host_tag_of(m, page.hfn) != page.tag);
		CHECK(mm_read(m, 0, hva, 3) == hva + 1);
	}
	return NULL;
}

static void *faults_too(void *argument)
{
	struct actor a = *(struct actor *)argument;

	a.rounds = 1024;
	while (!atomic_load(&stop))
		faults(&a);
	return NULL;
}

static void *reclaims(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	while (!atomic_load(&stop)) {
		uint64_t start = next_random(&random) % PAGES, n = 1 + next_random(&random) % 8;

		mm_unmap(m, a->cpu, 0, start, start + n, 1);
		start = next_random(&random) % PAGES;
		mm_migrate(m, a->cpu, 0, start, start + n);
		sched_yield();
	}
	return NULL;
}

static void *collapses(void *argument)
{
	struct actor *a = argument;
	uint32_t random = a->cpu;

	while (!atomic_load(&stop)) {
		uint64_t hva = next_random(&random) % REGIONS * BLOCK_FRAMES;
		int r = mm_collapse(m, a->cpu, 0, hva);

		CHECK(!r || r == MACHINE_AGAIN || r == MACHINE_NOMEM);
		mm_split(m, a->cpu, 0, hva);
		mm_image_copy(m, 0, next_random(&random) % PAGES, 0x8421);
		sched_yield();
	}
	return NULL;
}

static void test_contents(void)
{
	void *(*const bodies[])(void *) = { faults, reclaims, collapses, faults_too };

	harness_begin("custody is the frame's, contents survive", 120);
	machine_begin(PAGES + 8);
	CHECK(!mm_image_create(m, 0, 0, PAGES));
	for (uint64_t hva = 0; hva < PAGES; hva++) {
		struct mm_page page;

		CHECK(!mm_fault(m, 1, 0, hva, 1, &page));
		CHECK(frame_read(m, page.hfn, 3) == 0);
		frame_write(m, page.hfn, 3, hva + 1);
	}
	run(4, bodies, 100000 * scale);
	for (uint64_t hva = 0; hva < PAGES; hva++)
		mm_image_copy(m, 0, hva, 1);
	CHECK(mm_image_differs(m, 0, 0) == -1);
	machine_end();
}

int main(int argc, char **argv)
{
	if (argc > 1)
		scale = (uint32_t)strtoul(argv[1], NULL, 10);
	test_tags();
	test_block_custody();
	test_block_clock_wraps();
	test_taking_overlaps();
	test_frames();
	test_contents();
	return 0;
}
