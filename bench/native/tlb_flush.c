/* Does the price of a flush depend on how much the TLB holds?
 *
 *   tlb_flush ENTRIES REPEATS
 *
 * An unbounded TLB holds n translations, n = 1000, 10000 .. ENTRIES, most of them of other contexts.  512 belong to
 * the context that is flushed, and are filled again before each flush.  One flush is timed.  The clock's own cost is
 * in the price and in its reference, the price with 1000 translations.
 */
#include "bench.h"

#include "core/machine_types.h"
#include "tlb/tlb.h"
#include "tlb/tlb_flush.h"

enum { ROUNDS = 301, OTHERS = 64, OWN_VPID = 1, OWN_ROOT = 1000, OWN = 512, FIRST = 1000, DECADES = 6 };

enum what { INVEPT_SINGLE, INVVPID_SINGLE, MOV_CR3, INVLPG, INVLPG_PIECES, REFILL, WHATS };

static const char *const what_name[WHATS] = {
	"INVEPT single-context", "INVVPID single-context", "MOV CR3", "INVLPG",
	"INVLPG of a 2M page in 4K pieces", "refill after INVEPT, per translation",
};

static void fill(struct tlb *t, uint64_t page, uint32_t guest)
{
	struct tlb_entry e = { .page = page, .kind = KIND_COMBINED, .hfn = (uint32_t)page,
			       .fractured = (uint8_t)guest };

	tlb_insert(t, &e, page);
}

static void fill_own(struct tlb *t, uint32_t guest)
{
	for (uint64_t page = 0; page < OWN; page++)
		fill(t, page, guest);
}

static struct tlb *build(uint64_t n)
{
	struct machine_config config = { .vms = 2 };
	struct tlb *t = tlb_create(&config);

	REQUIRE(t);
	for (uint64_t i = 0; i < n; i++) {
		tlb_switch(t, 100 + i % OTHERS, 0, 2000 + i % OTHERS, 1);
		fill(t, i / OTHERS, 0);
	}
	tlb_switch(t, OWN_VPID, 0, OWN_ROOT, 1);
	return t;
}

static void flush(struct tlb *t, enum what what)
{
	if (what == INVEPT_SINGLE || what == REFILL)
		invept_single(t, OWN_ROOT);
	else if (what == INVVPID_SINGLE)
		invvpid_single(t, OWN_VPID);
	else if (what == MOV_CR3)
		mov_to_cr3(t, 0);
	else
		invlpg(t, 7);
}

/* Return the median nanoseconds of a flush or, for REFILL, of filling one entry again. */
static double price(struct tlb *t, enum what what)
{
	uint32_t guest = what == INVLPG_PIECES ? PAGE_2M + 1 : 0;
	struct tlb_entry e;
	double ns[ROUNDS];

	fill_own(t, guest);
	for (uint32_t i = 0; i < ROUNDS; i++) {
		uint64_t start, middle, end;

		start = now_ns();
		flush(t, what);
		middle = now_ns();
		/* The flush has dropped the entry. */
		REQUIRE(tlb_lookup(t, KIND_COMBINED, 7, &e) != 1);
		end = now_ns();
		fill_own(t, guest);
		ns[i] = what == REFILL ? (double)(now_ns() - end) / OWN : (double)(middle - start);
		REQUIRE(tlb_lookup(t, KIND_COMBINED, 7, &e) == 1);
	}
	return quantile(ns, ROUNDS, 0.5);
}

int main(int argc, char **argv)
{
	static double ns[DECADES][WHATS][REPEATS_MAX];
	struct figure figure = { .what = "512 translations live in the context", .unit = "ns",
				 .reference_name = "the same with 1000 translations cached",
				 .ratio_of = "value/reference" };
	uint32_t most, decades = 0;
	char name[80];

	REQUIRE(argc == 3);
	most = bench_number(argv[1], 10000000);
	figure.repeats = bench_number(argv[2], REPEATS_MAX);
	figure.name = name;
	pin(0);
	for (size_t i = 0; i < figure.repeats; i++) {
		decades = 0;
		for (uint64_t n = FIRST; n <= most && decades < DECADES; n *= 10, decades++) {
			struct tlb *t = build(n);

			for (uint32_t what = 0; what < WHATS; what++)
				ns[decades][what][i] = price(t, what);
			tlb_destroy(t);
		}
	}
	REQUIRE(decades > 1);
	for (uint32_t what = 0; what < WHATS; what++) {
		/* All sizes for INVEPT single-context, the machine's own flush; the largest size for the rest. */
		for (uint32_t d = what == INVEPT_SINGLE ? 1 : decades - 1; d < decades; d++) {
			snprintf(name, sizeof(name), "%s, 10^%u cached", what_name[what], d + 3);
			figure.wanted = what == REFILL ? NULL : "ratio <= 2";
			figure.values = ns[d][what];
			figure.references = ns[0][what];
			emit(&figure);
		}
	}
	return 0;
}
