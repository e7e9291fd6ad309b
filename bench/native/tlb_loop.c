/* Justifies the look-up of the TLB's first level: the loop of guest execution with the shipped look-up and rivals.
 *
 *   tlb_loop REPEATS
 *
 * The loop does only the steps that every access needs: load an 8-byte trace record, poll the attention word, look
 * the page up, compare the custody of the frame with the right that the entry carries, store on a write.
 * (guest_loop.c measures the whole guest loop, on real traces.)
 */
#include "bench.h"

#include <emmintrin.h>

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_l1.h"
#include "walk/walk.h"

#ifdef __SSE2__

#endif

enum { RECORDS = 1 << 16, FRAMES = 256, LOOPS = 100 };

/* The rivals' layout: the keys of a set lie side by side, the other fields elsewhere. */
struct payload {
	uint32_t right[3];
	uint32_t hfn;
};

struct split {
	_Alignas(64) uint64_t key[L1_SETS][L1_WAYS];
	struct payload hot[L1_SETS][L1_WAYS];
	uint32_t stamp[L1_SETS][L1_WAYS];
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
};

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

/* Build a world of `pages` pages, all cached.  One access in four writes: each fourth, or a random one. */
static struct world *build(uint32_t pages, uint32_t run, bool regular)
{
	struct world *w = aligned_alloc(64, (sizeof(*w) + 63) / 64 * 64);
	uint64_t x = 88172645463325252u, page = 0;
	uint32_t used[L1_SETS] = { 0 };

	REQUIRE(w);
	memset(w, 0, sizeof(*w));
	w->tag = calloc(FRAMES, sizeof(*w->tag));
	w->memory = aligned_alloc(4096, FRAMES * 4096);
	REQUIRE(w->tag && w->memory);
	memset(w->memory, 0, FRAMES * 4096);
	l1_create(&w->l1);
	w->l1.context_bits = w->rival.context_bits = UINT64_C(0x28007) << L1_CONTEXT_SHIFT;
	for (uint32_t p = 0; p < pages; p++) {
		uint32_t set = p % L1_SETS, way = used[set]++;

		w->l1.hot[set][way].key = w->l1.context_bits | p;
		w->l1.hot[set][way].hfn = p * 3 % FRAMES;
		w->rival.key[set][way] = w->l1.hot[set][way].key;
		w->rival.hot[set][way].hfn = p * 3 % FRAMES;
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

/* Compare the ways in turn, with a branch for each. */
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

#ifdef __SSE2__
/* Compare all ways at once: four 64-bit compares, composed of SSE2's 32-bit ones. */
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
#endif

/* Run all accesses; return how many missed or failed the check. */
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
#ifdef __SSE2__
LOOP(sse2, look_sse2, struct payload)

#endif

static double measure(uint64_t (*loop)(struct world *), struct world *w)
{
	uint64_t start = now_ns();

	for (uint32_t i = 0; i < LOOPS; i++)
		REQUIRE(!loop(w));
	return (double)RECORDS * LOOPS * 1e3 / (double)(now_ns() - start);
}

enum { RIVALS = 2, SHAPES = 2 };

static const struct {
	const char *name;
	uint64_t (*loop)(struct world *);
} rival[RIVALS] = {
	{ "ways tried in turn", loop_branches },
#ifdef __SSE2__
	{ "all ways compared at once", loop_sse2 },
#endif
};

static const struct {
	const char *name;
	uint32_t pages, run;
	bool regular;
} shape[SHAPES] = {
	{ "look-up, 64 pages at random", 64, 1, false },
	{ "look-up, 16 pages, 32 accesses each", 16, 32, true },
};

static void measure_shape(uint32_t which, size_t repeats)
{
	struct world *w = build(shape[which].pages, shape[which].run, shape[which].regular);
	double shipped[REPEATS_MAX], rivals[RIVALS][REPEATS_MAX];

	for (size_t i = 0; i < repeats; i++) {
		shipped[i] = measure(loop_shipped, w);
		for (uint32_t k = 0; k < RIVALS && rival[k].loop; k++)
			rivals[k][i] = measure(rival[k].loop, w);
	}
	for (uint32_t k = 0; k < RIVALS && rival[k].loop; k++) {
		struct figure figure = { .name = shape[which].name, .unit = "M/s",
					 .what = "hits of the first level, with poll, check and store",
					 .reference_name = rival[k].name, .ratio_of = "value/reference",
					 .values = shipped, .references = rivals[k], .repeats = repeats };

		emit(&figure);
	}
	free(w->memory);
	free(w->tag);
	free(w);
}

int main(int argc, char **argv)
{
	size_t repeats;

	REQUIRE(argc == 2);
	repeats = bench_number(argv[1], REPEATS_MAX);
	pin(0);
	for (uint32_t which = 0; which < SHAPES; which++)
		measure_shape(which, repeats);
	return 0;
}
