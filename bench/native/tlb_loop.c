/* How fast can one core look up and check guest accesses?
 *
 * The loop of guest execution, cut down to what every access needs: load an 8-byte trace record, poll the
 * attention word, look the page up in the first-level TLB, compare the custody of the frame with the right
 * that the entry carries, store on a write.  Rivals differ in the look-up only.  The yardstick is a bare
 * loop that looks the same records up in a direct-mapped array and does nothing else.
 *
 *   gcc -std=c11 -O2 -Inative bench/native/tlb_loop.c native/tlb*.c native/psc.c -o tlb_loop && ./tlb_loop [repeats]
 */
#define _POSIX_C_SOURCE 200809L
#include <emmintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tlb.h"

enum { RECORDS = 1 << 16, FRAMES = 256, LOOPS = 300 };

/* What the rivals search: keys of a set side by side, the rest elsewhere. */
struct payload {
	uint32_t right[3];
	uint32_t hfn;
};

struct split {
	_Alignas(64) uint64_t key[L1_SETS][L1_WAYS];
	struct payload hot[L1_SETS][L1_WAYS];
	uint32_t stamp[L1_SETS][L1_WAYS];
	uint8_t mru[L1_SETS];
	uint32_t clock;
	uint64_t context_bits;
};

/* A record: page in bits 59:12, 8-byte aligned offset, type in bits 1:0. */
struct world {
	struct tlb_l1 l1;
	struct split rival;
	uint64_t record[RECORDS];
	_Atomic uint32_t attention;
	_Atomic uint16_t *tag;
	uint64_t life;
	uint8_t *memory;
	uint64_t direct[1024];
};

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

static double cpu_seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts); /* the machine may be shared */
	return ts.tv_sec + ts.tv_nsec * 1e-9;
}

/* `pages` pages, all cached, in random ways; one access in four writes, at
 * random or each fourth. */
static struct world *build(uint32_t pages, uint32_t run, bool regular)
{
	struct world *w = aligned_alloc(64, (sizeof(*w) + 63) / 64 * 64);
	uint64_t x = 88172645463325252u, page = 0;
	uint32_t used[L1_SETS] = { 0 };

	memset(w, 0, sizeof(*w));
	w->tag = calloc(FRAMES, sizeof(*w->tag));
	w->memory = aligned_alloc(4096, FRAMES * 4096);
	memset(w->memory, 0, FRAMES * 4096);
	w->l1.context_bits = w->rival.context_bits = UINT64_C(0x28007) << L1_CONTEXT_SHIFT;
	for (uint32_t p = 0; p < pages; p++) {
		uint32_t set = p % L1_SETS, way = used[set]++;

		w->l1.hot[set][way].key = w->l1.context_bits | p;
		w->l1.hot[set][way].hfn = p * 3 % FRAMES;
		w->rival.key[set][way] = w->l1.hot[set][way].key;
		w->rival.hot[set][way].hfn = p * 3 % FRAMES;
		w->direct[p] = (uint64_t)p << 16 | (p * 3 % FRAMES);
	}
	for (uint32_t i = 0; i < RECORDS; i++) {
		if (i % run == 0)
			page = next(&x) % pages;
		w->record[i] = page << 12 | (next(&x) & 0xff8) | !((regular ? i : next(&x)) & 3);
	}
	return w;
}

#define ALWAYS static inline __attribute__((always_inline))

ALWAYS struct tlb_hot *look_shipped(struct world *w, uint64_t page)
{
	return tlb_l1_lookup(&w->l1, page);
}

/* Ways tried in turn, each a branch. */
ALWAYS struct payload *look_branches(struct world *w, uint64_t page)
{
	struct split *l1 = &w->rival;
	uint64_t want = l1->context_bits | page;
	uint32_t set = page & (L1_SETS - 1);

	for (uint32_t way = 0; way < L1_WAYS; way++)
		if (l1->key[set][way] == want) {
			l1->stamp[set][way] = l1->clock;
			return &l1->hot[set][way];
		}
	return 0;
}

/* The way of the last hit in the set first. */
ALWAYS struct payload *look_mru(struct world *w, uint64_t page)
{
	struct split *l1 = &w->rival;
	uint64_t want = l1->context_bits | page;
	uint32_t set = page & (L1_SETS - 1), way = l1->mru[set];
	const uint64_t *key = l1->key[set];

	if (key[way] != want) {
		way = (key[1] == want) | (key[2] == want) << 1 | (key[3] == want) * 3;
		if (key[way] != want)
			return 0;
		l1->mru[set] = way;
	}
	l1->stamp[set][way] = l1->clock;
	return &l1->hot[set][way];
}

/* All compared; gcc makes a branch of the last way all the same. */
ALWAYS struct payload *look_arithmetic(struct world *w, uint64_t page)
{
	struct split *l1 = &w->rival;
	uint64_t want = l1->context_bits | page;
	uint32_t set = page & (L1_SETS - 1);
	const uint64_t *key = l1->key[set];
	uint32_t way = (key[1] == want) | (key[2] == want) << 1 | (key[3] == want) * 3;

	if (__builtin_expect(key[way] != want, 0))
		return 0;
	l1->stamp[set][way] = l1->clock;
	return &l1->hot[set][way];
}

/* Four 64-bit compares with SSE2, which has only 32-bit ones. */
ALWAYS struct payload *look_sse2(struct world *w, uint64_t page)
{
	struct split *l1 = &w->rival;
	uint64_t want = l1->context_bits | page;
	uint32_t set = page & (L1_SETS - 1);
	__m128i v = _mm_set1_epi64x((long long)want);
	__m128i a = _mm_cmpeq_epi32(_mm_load_si128((const __m128i *)&l1->key[set][0]), v);
	__m128i b = _mm_cmpeq_epi32(_mm_load_si128((const __m128i *)&l1->key[set][2]), v);
	__m128 low = _mm_shuffle_ps(_mm_castsi128_ps(a), _mm_castsi128_ps(b), 0x88);
	__m128 high = _mm_shuffle_ps(_mm_castsi128_ps(a), _mm_castsi128_ps(b), 0xdd);
	uint32_t mask = (uint32_t)_mm_movemask_ps(_mm_and_ps(low, high));
	uint32_t way;

	if (__builtin_expect(!mask, 0))
		return 0;
	way = (uint32_t)__builtin_ctz(mask);
	l1->stamp[set][way] = l1->clock;
	return &l1->hot[set][way];
}

/* Everything an access needs; returns how many missed or failed the check. */
#define LOOP(name, look, hot_type)                                                                  \
	static __attribute__((noinline)) uint64_t loop_##name(struct world *w)                      \
	{                                                                                           \
		uint64_t slow = 0;                                                                  \
		uint32_t life = (uint32_t)w->life << 16;                                            \
		const _Atomic uint16_t *tag = w->tag;                                               \
		uint8_t *memory = w->memory;                                                        \
                                                                                                    \
		for (uint32_t i = 0; i < RECORDS; i++) {                                            \
			uint64_t r = w->record[i];                                                  \
			uint32_t type = r & 3;                                                      \
			hot_type *hot;                                                              \
                                                                                                    \
			if (atomic_load_explicit(&w->attention, memory_order_relaxed))              \
				return slow;                                                        \
			hot = look(w, r >> 12);                                                     \
			if (!hot) {                                                                 \
				slow++;                                                             \
				continue;                                                           \
			}                                                                           \
			if ((atomic_load_explicit(&tag[hot->hfn], memory_order_acquire) | life) !=  \
			    hot->right[type]) {                                                     \
				slow++;                                                             \
				continue;                                                           \
			}                                                                           \
			if (type == ACCESS_WRITE)                                                   \
				*(uint64_t *)(memory + ((uint64_t)hot->hfn << 12) +                 \
					      (r & 0xff8)) = r;                                     \
		}                                                                                   \
		return slow;                                                                        \
	}

LOOP(shipped, look_shipped, struct tlb_hot)
LOOP(branches, look_branches, struct payload)
LOOP(arithmetic, look_arithmetic, struct payload)
LOOP(mru, look_mru, struct payload)
LOOP(sse2, look_sse2, struct payload)

/* The yardstick. */
static __attribute__((noinline)) uint64_t loop_bare(struct world *w)
{
	uint64_t slow = 0;

	for (uint32_t i = 0; i < RECORDS; i++) {
		uint64_t page = w->record[i] >> 12;

		slow += w->direct[page & 1023] >> 16 != page;
	}
	return slow;
}

static double measure(uint64_t (*loop)(struct world *), struct world *w)
{
	double start = cpu_seconds();

	for (uint32_t i = 0; i < LOOPS; i++)
		if (loop(w))
			abort();
	return (double)RECORDS * LOOPS / (cpu_seconds() - start) * 1e-6;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		uint64_t (*loop)(struct world *);
	} rival[] = {
		{ "bare", loop_bare },
		{ "shipped", loop_shipped },
		{ "branches", loop_branches },
		{ "arithmetic", loop_arithmetic },
		{ "mru", loop_mru },
		{ "sse2", loop_sse2 },
	};
	enum { RIVALS = sizeof(rival) / sizeof(rival[0]), MOST = 64 };
	static const uint32_t shape[][3] = { { 64, 1, 0 }, { 64, 1, 1 }, { 64, 8, 0 }, { 64, 8, 1 }, { 16, 32, 1 } };
	int repeats = argc > 1 ? atoi(argv[1]) : 7;
	double rate[RIVALS][MOST];

	if (repeats < 1 || repeats > MOST)
		return fprintf(stderr, "tlb_loop: repeats must be 1 to %d\n", MOST), 2;
	for (uint32_t s = 0; s < sizeof(shape) / sizeof(shape[0]); s++) {
		struct world *w = build(shape[s][0], shape[s][1], shape[s][2]);

		for (int i = 0; i < repeats; i++)
			for (int k = 0; k < RIVALS; k++)
				rate[k][i] = measure(rival[k].loop, w);
		printf("%u pages, %u accesses to a page in a row, %s writes: M accesses/s, median (best)\n",
		       shape[s][0], shape[s][1], shape[s][2] ? "regular" : "random");
		for (int k = 0; k < RIVALS; k++) {
			qsort(rate[k], (size_t)repeats, sizeof(double), by_value);
			printf("  %-10s %6.0f (%.0f)\n", rival[k].name, rate[k][repeats / 2],
			       rate[k][repeats - 1]);
		}
		free(w->memory);
		free(w->tag);
		free(w);
	}
	return 0;
}
