/* A machine's memory, and its snapshots.  See heap.h. */
#define _GNU_SOURCE
#include "core/heap.h"

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/machine_types.h"
#include "core/spin.h"

enum { PAGE_BYTES = 4096, CLASSES = 48, BLOCK_MAGIC = 0x48454150 };

/* In front of each block, on a line of its own. */
struct block {
	struct block *next; /* while it is free */
	size_t bytes;
	uint32_t magic; /* while it is not */
	uint8_t pad[CACHELINE - sizeof(void *) - sizeof(size_t) - sizeof(uint32_t)];
};

/* The allocator's state: the first page of the region. */
struct books {
	_Atomic uint32_t lock;
	size_t used; /* bytes of the region, from its start; memory beyond was never allocated: zeroes */
	struct block *free[CLASSES]; /* lists of blocks of 2^i bytes or more, and fewer than twice that */
};

/* Kept outside the region. */
struct heap {
	uint8_t *memory;
	size_t bytes;
	const uint8_t *saved; /* the snapshot, or NULL */
	/* Pages that have a private copy, as known when the process had had `faults` page faults. */
	uint32_t *dirty;
	uint8_t *is_dirty; /* a byte per page */
	uint32_t dirty_count;
	bool told; /* the kernel does report which pages have a copy */
	pid_t pid;
	long faults;
	uint8_t *left_out; /* by word, a bit: heap_digest() leaves it out; or NULL */
};

static struct books *books_of(const struct heap *h)
{
	return (struct books *)(void *)h->memory;
}

/* --- allocation ----------------------------------------------------------------------------------------- */

struct heap *heap_create(size_t bytes)
{
	struct heap *h = calloc(1, sizeof(*h));

	if (!h)
		return NULL;
	h->bytes = (bytes + 2 * PAGE_BYTES) & ~(size_t)(PAGE_BYTES - 1);
	h->memory = mmap(NULL, h->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->memory == MAP_FAILED) {
		free(h);
		return NULL;
	}
	/* A huge page would be copied whole; a kernel without huge pages refuses. */
	(void)madvise(h->memory, h->bytes, MADV_NOHUGEPAGE);
	books_of(h)->used = PAGE_BYTES;
	return h;
}

void heap_destroy(struct heap *h)
{
	if (!h)
		return;
	munmap(h->memory, h->bytes);
	if (h->saved)
		munmap((void *)(uintptr_t)h->saved, h->bytes);
	free(h->dirty);
	free(h->is_dirty);
	free(h->left_out);
	free(h);
}

static struct block **free_blocks(struct books *books, size_t bytes)
{
	return &books->free[63 - __builtin_clzll(bytes)];
}

/* Reuse a free block of exactly that size, because most frees are followed by allocations of equal size. */
static struct block *reuse(struct books *books, size_t bytes)
{
	struct block **link = free_blocks(books, bytes), *block;

	while (*link && (*link)->bytes != bytes)
		link = &(*link)->next;
	block = *link;
	if (block)
		*link = block->next;
	return block;
}

/* Carve a block from the end of the part in use.  A block of a page or more begins on a page boundary, so that
 * it shares few pages with others. */
static struct block *carve(struct heap *h, size_t bytes)
{
	struct books *books = books_of(h);
	size_t start = books->used + sizeof(struct block);
	struct block *block;

	if (bytes >= PAGE_BYTES)
		start = (start + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1);
	if (start > h->bytes || bytes > h->bytes - start)
		return NULL;
	books->used = start + bytes;
	block = (struct block *)(void *)(h->memory + start) - 1;
	block->bytes = bytes;
	return block;
}

static void *region_zalloc(struct heap *h, size_t n, size_t size)
{
	struct books *books = books_of(h);
	struct block *block;
	size_t bytes;
	bool reused;

	if (size && n > h->bytes / size)
		return NULL;
	bytes = (n * size + CACHELINE - 1) & ~(size_t)(CACHELINE - 1);
	if (!bytes)
		bytes = CACHELINE;
	spin_lock(&books->lock);
	block = reuse(books, bytes);
	reused = block;
	if (!block)
		block = carve(h, bytes);
	spin_unlock(&books->lock);
	if (!block)
		return NULL;
	block->magic = BLOCK_MAGIC;
	return reused ? memset(block + 1, 0, bytes) : block + 1;
}

static void region_free(struct heap *h, void *memory)
{
	struct block *block = (struct block *)memory - 1;
	struct books *books = books_of(h);

	if (block->magic != BLOCK_MAGIC) {
		fprintf(stderr, "native: BUG: %p freed but not in use\n", memory);
		abort();
	}
	block->magic = 0;
	spin_lock(&books->lock);
	block->next = *free_blocks(books, block->bytes);
	*free_blocks(books, block->bytes) = block;
	spin_unlock(&books->lock);
}

void *heap_zalloc(struct heap *h, size_t n, size_t size)
{
	return h ? region_zalloc(h, n, size) : calloc(n, size);
}

void *heap_zalloc_lines(struct heap *h, size_t n, size_t size)
{
	size_t bytes = (n * size + CACHELINE - 1) & ~(size_t)(CACHELINE - 1);
	void *memory;

	if (h)
		return region_zalloc(h, n, size);
	memory = aligned_alloc(CACHELINE, bytes ? bytes : CACHELINE);
	return memory ? memset(memory, 0, bytes) : NULL;
}

void heap_free(struct heap *h, void *memory)
{
	if (!h)
		free(memory);
	else if (memory)
		region_free(h, memory);
}

/* --- finding the pages that were stored to -------------------------------------------------------------- */

static long faults_so_far(void)
{
	struct rusage usage;

	return getrusage(RUSAGE_SELF, &usage) ? -1 : usage.ru_minflt + usage.ru_majflt;
}

static uint32_t pages_in_use(const struct heap *h)
{
	return (uint32_t)((books_of(h)->used + PAGE_BYTES - 1) / PAGE_BYTES);
}

/* Call `found` for each page in use that is the process's own, neither the file's nor missing; -1 if the kernel
 * does not report them.  Swapped or present, and not file-mapped: bits 62, 63 and 61. */
static int each_private_page(struct heap *h, void (*found)(struct heap *h, uint32_t page))
{
	enum { AT_ONCE = 512 };
	uint64_t first = (uintptr_t)h->memory / PAGE_BYTES, entry[AT_ONCE];
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint32_t n = pages_in_use(h);

	if (fd < 0)
		return -1;
	for (uint32_t page = 0; page < n; page += AT_ONCE) {
		uint32_t count = n - page < AT_ONCE ? n - page : AT_ONCE;

		if (pread(fd, entry, count * sizeof(*entry), (off_t)((first + page) * sizeof(*entry))) !=
		    (ssize_t)(count * sizeof(*entry))) {
			close(fd);
			return -1;
		}
		for (uint32_t i = 0; i < count; i++)
			if (entry[i] >> 62 && !(entry[i] >> 61 & 1))
				found(h, page + i);
	}
	close(fd);
	return 0;
}

static void note_dirty(struct heap *h, uint32_t page)
{
	if (h->is_dirty[page])
		return;
	h->is_dirty[page] = 1;
	h->dirty[h->dirty_count++] = page;
}

/* A page gets a private copy by a fault of this process, or had one when it was forked: without a new fault
 * there is no new copy.  -1: cannot be determined. */
static int know_dirty(struct heap *h)
{
	long faults = faults_so_far();
	pid_t pid = getpid();

	if (faults >= 0 && faults == h->faults && pid == h->pid)
		return 0;
	if (each_private_page(h, note_dirty))
		return -1;
	h->pid = pid;
	h->faults = faults;
	return 0;
}

/* Some sandboxes have an empty pagemap: test whether it shows the page that is stored to here. */
static bool is_told(struct heap *h)
{
	_Atomic uint32_t *lock = &books_of(h)->lock;

	atomic_store_explicit(lock, 0, memory_order_relaxed); /* it is 0 already: no other thread uses the region */
	return !know_dirty(h) && h->is_dirty[0];
}

/* --- snapshots ------------------------------------------------------------------------------------------ */

static bool is_zero(const uint8_t *page)
{
	return !page[0] && !memcmp(page, page + 1, PAGE_BYTES - 1);
}

/* Before the first snapshot, the pages that are not dirty are zero. */
static int write_pages(const struct heap *h, int fd, bool only_dirty)
{
	uint32_t n = only_dirty ? h->dirty_count : pages_in_use(h);

	for (uint32_t i = 0; i < n; i++) {
		off_t at = (off_t)(only_dirty ? h->dirty[i] : i) * PAGE_BYTES;
		const uint8_t *bytes = h->memory + at;

		if (!is_zero(bytes) && pwrite(fd, bytes, PAGE_BYTES, at) != PAGE_BYTES)
			return -1;
	}
	return 0;
}

/* Make a file that has the region's bytes; holes for zeroes.  Each snapshot has its own file: a forked process
 * may continue with the former one. */
static int write_file(struct heap *h)
{
	bool only_dirty = !h->saved && is_told(h);
	int fd = memfd_create("flushlab-machine", MFD_CLOEXEC);

	if (fd < 0)
		return -1;
	if (ftruncate(fd, (off_t)h->bytes) || write_pages(h, fd, only_dirty)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* Make the region a private mapping of the file; another mapping of it is the source of the copies. */
static int map_file(struct heap *h, int fd)
{
	void *saved = mmap(NULL, h->bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);

	if (saved == MAP_FAILED)
		return -1;
	if (mmap(h->memory, h->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, 0) ==
	    MAP_FAILED) {
		munmap(saved, h->bytes);
		return -1;
	}
	(void)madvise(h->memory, h->bytes, MADV_NOHUGEPAGE);
	if (h->saved)
		munmap((void *)(uintptr_t)h->saved, h->bytes);
	h->saved = saved;
	return 0;
}

static int dirty_create(struct heap *h)
{
	size_t pages = h->bytes / PAGE_BYTES;

	if (!h->dirty)
		h->dirty = calloc(pages, sizeof(*h->dirty));
	if (!h->is_dirty)
		h->is_dirty = calloc(pages, sizeof(*h->is_dirty));
	return h->dirty && h->is_dirty ? 0 : -1;
}

static void dirty_forget(struct heap *h)
{
	for (uint32_t i = 0; i < h->dirty_count; i++)
		h->is_dirty[h->dirty[i]] = 0;
	h->dirty_count = 0;
	h->pid = 0;
}

int heap_snapshot(struct heap *h)
{
	int fd, r;

	if (dirty_create(h))
		return MACHINE_NOMEM;
	fd = write_file(h);
	if (fd < 0)
		return MACHINE_NOMEM;
	r = map_file(h, fd);
	close(fd);
	if (r)
		return MACHINE_NOMEM;
	dirty_forget(h);
	h->told = is_told(h);
	return 0;
}

int heap_restore(struct heap *h)
{
	if (!h->saved)
		return MACHINE_MISUSE;
	if (!h->told || know_dirty(h)) {
		dirty_forget(h);
		return madvise(h->memory, h->bytes, MADV_DONTNEED) ? MACHINE_NOMEM : 0;
	}
	for (uint32_t i = 0; i < h->dirty_count; i++) {
		size_t at = (size_t)h->dirty[i] * PAGE_BYTES;

		memcpy(h->memory + at, h->saved + at, PAGE_BYTES);
	}
	return 0;
}

/* FNV-1a (Fowler, Noll, Vo), by words. */
uint64_t heap_fingerprint(const struct heap *h)
{
	const uint64_t *word = (const uint64_t *)(const void *)h->memory;
	uint64_t hash = 14695981039346656037ull;

	for (size_t i = 0; i < books_of(h)->used / sizeof(*word); i++)
		hash = (hash ^ word[i]) * 1099511628211ull;
	return hash;
}

int heap_leave_out(struct heap *h, const void *memory, size_t bytes)
{
	size_t first = (size_t)((const uint8_t *)memory - h->memory) / sizeof(uint64_t);

	if (!h->left_out)
		h->left_out = calloc(h->bytes / sizeof(uint64_t) / 8, 1);
	if (!h->left_out)
		return MACHINE_NOMEM;
	for (size_t word = first; word < first + bytes / sizeof(uint64_t); word++)
		h->left_out[word / 8] |= (uint8_t)(1u << word % 8);
	return 0;
}

/* The finalizer of splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t z)
{
	z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
	z = (z ^ z >> 27) * 0x94D049BB133111EBu;
	return z ^ z >> 31;
}

static void digest_page(const struct heap *h, uint32_t page, uint64_t digest[2])
{
	enum { WORDS = PAGE_BYTES / sizeof(uint64_t) };
	const uint64_t *now = (const uint64_t *)(const void *)(h->memory + (size_t)page * PAGE_BYTES);
	const uint64_t *saved = (const uint64_t *)(const void *)(h->saved + (size_t)page * PAGE_BYTES);
	const uint8_t *left_out = h->left_out ? h->left_out + (size_t)page * WORDS / 8 : NULL;

	for (uint64_t i = 0; i < WORDS; i++) {
		uint64_t place;

		if (now[i] == saved[i] || (left_out && left_out[i / 8] >> i % 8 & 1))
			continue;
		place = (uint64_t)page * WORDS + i;
		/* A sum does not depend on the order in which the pages come. */
		digest[0] += mix(mix(place + 0x9E3779B97F4A7C15u) ^ now[i]);
		digest[1] += mix(mix(now[i] + 0xD1B54A32D192ED03u) ^ place);
	}
}

int heap_digest(struct heap *h, uint64_t digest[2])
{
	digest[0] = digest[1] = 0;
	if (!h->saved || !h->told || know_dirty(h))
		return MACHINE_MISUSE;
	for (uint32_t i = 0; i < h->dirty_count; i++)
		digest_page(h, h->dirty[i], digest);
	return 0;
}

uint32_t heap_dirty_pages(const struct heap *h)
{
	return h->dirty_count;
}
