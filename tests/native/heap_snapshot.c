/* A machine's heap: its blocks, and that a restore brings every byte back, by both ways. */
#include "harness.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "core/heap.h"
#include "core/machine_types.h"

enum { BYTES = 8 << 20, BLOCKS = 200, PAGE = 4096 };

/* Files are opened through here: /proc/self/pagemap may be one that says nothing. */
static bool says_nothing;

int open(const char *path, int flags, ...)
{
	if (says_nothing && !strcmp(path, "/proc/self/pagemap"))
		path = "/dev/zero";
	return (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);
}

static uint64_t random_state = 88172645463325252ull;

static uint64_t next_random(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

/* The test's blocks, in an order of its own. */
static struct {
	uint8_t *memory;
	size_t bytes;
} blocks[BLOCKS];

static bool all_zero(const uint8_t *memory, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		if (memory[i])
			return false;
	return true;
}

static void allocate(struct heap *h, uint32_t i)
{
	size_t bytes = 1 + next_random() % (i % 8 ? 300 : 20000);

	blocks[i].memory = next_random() % 2 ? heap_zalloc(h, 1, bytes) : heap_zalloc_lines(h, bytes, 1);
	blocks[i].bytes = bytes;
	CHECK(blocks[i].memory);
	CHECK(!((uintptr_t)blocks[i].memory % CACHELINE));
	CHECK(bytes <= PAGE || !((uintptr_t)blocks[i].memory % PAGE));
	CHECK(all_zero(blocks[i].memory, bytes));
	memset(blocks[i].memory, (int)(1 + next_random() % 255), bytes);
}

static void release(struct heap *h, uint32_t i)
{
	heap_free(h, blocks[i].memory);
	blocks[i].memory = NULL;
}

/* A few hundred allocations, frees and stores. */
static void mess_about(struct heap *h, uint32_t turns)
{
	for (uint32_t turn = 0; turn < turns; turn++) {
		uint32_t i = next_random() % BLOCKS;

		if (!blocks[i].memory)
			allocate(h, i);
		else if (next_random() % 4)
			blocks[i].memory[next_random() % blocks[i].bytes] ^= 0x55;
		else
			release(h, i);
	}
}

static uint64_t sum_of_blocks(void)
{
	uint64_t sum = 14695981039346656037ull;

	for (uint32_t i = 0; i < BLOCKS; i++)
		for (size_t j = 0; blocks[i].memory && j < blocks[i].bytes; j++)
			sum = (sum ^ blocks[i].memory[j]) * 1099511628211ull;
	return sum;
}

static void test_hands_out(void)
{
	struct heap *h = heap_create(BYTES);
	uint8_t *large;

	harness_begin("zeroed memory on its own lines, used again after it was freed, until there is no more", 60);
	CHECK(h);
	memset(blocks, 0, sizeof(blocks));
	for (uint32_t i = 0; i < 100; i++)
		mess_about(h, 100);
	for (uint32_t i = 0; i < BLOCKS; i++)
		if (blocks[i].memory)
			release(h, i);
	CHECK(!heap_zalloc(h, BYTES, 2));
	CHECK(!heap_zalloc(h, SIZE_MAX / 2, 4));
	large = heap_zalloc(h, 1, BYTES / 8);
	CHECK(large);
	heap_free(h, large);
	CHECK(heap_zalloc(h, 1, BYTES / 8) == large);
	heap_free(h, NULL);
	CHECK(heap_restore(h) == MACHINE_MISUSE);
	heap_destroy(h);
}

static void test_restores(const char *name)
{
	struct heap *h = heap_create(BYTES);
	uint64_t sum, next;

	harness_begin(name, 60);
	CHECK(h);
	memset(blocks, 0, sizeof(blocks));
	mess_about(h, 500);
	for (uint32_t again = 0; again < 3; again++) {
		__typeof__(blocks[0]) before[BLOCKS], after[BLOCKS];

		memcpy(before, blocks, sizeof(before));
		sum = sum_of_blocks();
		CHECK(heap_snapshot(h) == 0);
		CHECK(sum_of_blocks() == sum);
		for (uint32_t i = 0; i < 50; i++) {
			uint64_t seed = random_state;

			mess_about(h, (uint32_t)(next_random() % 400));
			next = sum_of_blocks();
			memcpy(after, blocks, sizeof(after));
			CHECK(heap_restore(h) == 0);
			memcpy(blocks, before, sizeof(before));
			CHECK(sum_of_blocks() == sum);
			/* The allocator is back, too: the same requests get the same memory. */
			random_state = seed;
			mess_about(h, (uint32_t)(next_random() % 400));
			CHECK(sum_of_blocks() == next);
			CHECK(!memcmp(blocks, after, sizeof(after)));
			CHECK(heap_restore(h) == 0);
			memcpy(blocks, before, sizeof(before));
		}
		mess_about(h, 100); /* and the next snapshot is of something else */
	}
	heap_destroy(h);
}

/* Without /proc/self/pagemap, of which a process without free file descriptors knows nothing. */
static void test_kernel_restores(void)
{
	struct rlimit limit, none;
	struct heap *h = heap_create(BYTES);
	uint8_t *memory;

	harness_begin("where the kernel does not tell what was changed, it drops everything", 60);
	CHECK(h);
	memory = heap_zalloc(h, 10, PAGE);
	memory[5 * PAGE] = 1;
	CHECK(heap_snapshot(h) == 0);
	CHECK(!getrlimit(RLIMIT_NOFILE, &limit));
	none = limit;
	none.rlim_cur = 0;
	CHECK(!setrlimit(RLIMIT_NOFILE, &none));
	for (uint32_t i = 0; i < 10; i++) {
		memset(memory, 7, 10 * PAGE);
		CHECK(heap_restore(h) == 0);
		CHECK(!heap_dirty_pages(h));
		CHECK(memory[5 * PAGE] == 1 && !memory[4 * PAGE] && !memory[5 * PAGE + 1]);
	}
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit));
	memset(memory, 7, 10 * PAGE);
	CHECK(heap_restore(h) == 0);
	CHECK(heap_dirty_pages(h) >= 10);
	CHECK(memory[5 * PAGE] == 1 && !memory[4 * PAGE]);
	heap_destroy(h);
}

static void test_kernel_says_nothing(void)
{
	struct heap *h = heap_create(BYTES);
	uint8_t *memory;

	harness_begin("where it tells nothing of any page, neither", 60);
	CHECK(h);
	memory = heap_zalloc(h, 10, PAGE);
	memory[5 * PAGE] = 1;
	says_nothing = true;
	CHECK(heap_snapshot(h) == 0);
	for (uint32_t i = 0; i < 10; i++) {
		memset(memory, 7, 10 * PAGE);
		CHECK(heap_restore(h) == 0);
		CHECK(memory[5 * PAGE] == 1 && !memory[4 * PAGE] && !memory[5 * PAGE + 1]);
	}
	says_nothing = false;
	heap_destroy(h);
}

static void test_copies_what_changed(void)
{
	struct heap *h = heap_create(BYTES);
	uint8_t *memory;

	harness_begin("a restore costs what was changed, not what there is", 60);
	CHECK(h);
	memory = heap_zalloc(h, 1000, PAGE);
	memset(memory, 1, 1000 * PAGE);
	CHECK(heap_snapshot(h) == 0);
	for (uint32_t i = 0; i < 20; i++) {
		memory[i % 5 * PAGE] = 2;
		CHECK(heap_restore(h) == 0);
		CHECK(heap_dirty_pages(h) <= i + 3); /* and the books' page */
	}
	CHECK(heap_dirty_pages(h) >= 5 && heap_dirty_pages(h) <= 7);
	heap_destroy(h);
}

/* One in parent and child, which do not see each other's. */
static void test_fork(void)
{
	struct heap *h = heap_create(BYTES);
	uint32_t *memory;
	int status;
	pid_t child;

	harness_begin("after a fork each process restores its own", 60);
	CHECK(h);
	memory = heap_zalloc(h, 64, PAGE);
	memory[0] = 1;
	CHECK(heap_snapshot(h) == 0);
	memory[0] = 2;
	CHECK(heap_restore(h) == 0);
	child = fork();
	if (!child) {
		for (uint32_t i = 0; i < 64; i++) {
			memory[i * PAGE / sizeof(*memory)] = 3;
			CHECK(heap_restore(h) == 0);
			CHECK(memory[i * PAGE / sizeof(*memory)] == !i);
		}
		memory[0] = 4;
		CHECK(heap_snapshot(h) == 0); /* its own, too */
		memory[0] = 5;
		CHECK(heap_restore(h) == 0 && memory[0] == 4);
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
	CHECK(memory[0] == 1);
	memory[0] = 6;
	CHECK(heap_restore(h) == 0 && memory[0] == 1);
	heap_destroy(h);
}

static long faults(void)
{
	struct rusage usage;

	CHECK(!getrusage(RUSAGE_SELF, &usage));
	return usage.ru_minflt + usage.ru_majflt;
}

static void fault(void)
{
	uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(page != MAP_FAILED);
	*page = 1;
	CHECK(!munmap(page, PAGE));
}

/* A child counts its page faults from 0: that it has had as many as its parent says nothing. */
static void test_fork_counts_anew(void)
{
	struct heap *h = heap_create(BYTES);
	volatile uint8_t *memory;
	long before;
	int status;
	pid_t child;

	harness_begin("a child that has had as many page faults as its parent", 60);
	CHECK(h);
	memory = heap_zalloc(h, 64, PAGE);
	CHECK(heap_snapshot(h) == 0);
	do {
		before = faults();
		memory[0] = 2;
		CHECK(heap_restore(h) == 0);
	} while (faults() != before);
	child = fork();
	if (!child) {
		while (faults() < before - 1)
			fault();
		memory[9 * PAGE] = 3;
		CHECK(heap_restore(h) == 0);
		CHECK(memory[9 * PAGE] == 0);
		_exit(0);
	}
	CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
	heap_destroy(h);
}

int main(void)
{
	test_hands_out();
	test_restores("a restore brings back every byte, and the allocator");
	test_kernel_restores();
	test_kernel_says_nothing();
	test_copies_what_changed();
	test_fork();
	test_fork_counts_anew();
	return 0;
}
