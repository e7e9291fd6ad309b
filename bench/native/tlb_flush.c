/* Does the price of a flush depend on how much the TLB holds?
 *
 * An unbounded TLB holds n translations: most of them of other contexts, 512 of the one that is flushed.
 * Timed are a flush that finds something (after one fill of that context), and INVLPG.
 *
 *   gcc -std=c11 -O2 -Inative bench/native/tlb_flush.c native/tlb*.c native/psc.c -o tlb_flush && ./tlb_flush
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "tlb.h"

enum { ROUNDS = 2001, OTHERS = 64, OWN_VPID = 1, OWN_ROOT = 1000 };

static uint64_t now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void fill(struct tlb *t, uint64_t page, uint32_t guest)
{
	struct tlb_entry e = { .page = page, .kind = KIND_COMBINED, .hfn = (uint32_t)page, .fractured = guest };

	tlb_insert(t, &e, page);
}

static struct tlb *build(uint64_t n)
{
	struct machine_config config = { .vms = 2 };
	struct tlb *t = tlb_create(&config);

	for (uint64_t i = 0; i < n; i++) {
		tlb_switch(t, 100 + i % OTHERS, 0, 2000 + i % OTHERS, 1);
		fill(t, i / OTHERS, 0);
	}
	tlb_switch(t, OWN_VPID, 0, OWN_ROOT, 1);
	for (uint64_t page = 0; page < 512; page++)
		fill(t, page, 0);
	return t;
}

enum what { INVEPT_SINGLE, INVVPID_SINGLE, MOV_CR3, INVLPG, INVLPG_PIECES };

static void flush(struct tlb *t, enum what what)
{
	switch (what) {
	case INVEPT_SINGLE:
		invept_single(t, OWN_ROOT);
		break;
	case INVVPID_SINGLE:
		invvpid_single(t, OWN_VPID);
		break;
	case MOV_CR3:
		mov_to_cr3(t, 0);
		break;
	case INVLPG:
	case INVLPG_PIECES:
		invlpg(t, 7);
		break;
	}
}

/* Median nanoseconds; the clock's own cost is in it. */
static uint64_t price(uint64_t n, enum what what)
{
	static uint64_t ns[ROUNDS];
	struct tlb *t = build(n);

	for (uint32_t i = 0; i < ROUNDS; i++) {
		uint64_t start;

		fill(t, 7, what == INVLPG_PIECES ? PAGE_2M + 1 : 0);
		start = now();
		flush(t, what);
		ns[i] = now() - start;
	}
	tlb_destroy(t);
	qsort(ns, ROUNDS, sizeof(ns[0]), by_value);
	return ns[ROUNDS / 2];
}

int main(void)
{
	static const char *const name[] = { "INVEPT single", "INVVPID single", "MOV CR3", "INVLPG",
					    "INVLPG of a 2M page in 4K pieces" };
	uint64_t start = now(), end = start;

	for (int i = 0; i < 1000; i++)
		end = now();
	printf("median ns of one flush (%llu of them the clock's), by translations cached\n%-34s",
	       (unsigned long long)(end - start) / 1000, "");
	for (uint64_t n = 1000; n <= 1000000; n *= 10)
		printf("%10llu", (unsigned long long)n);
	printf("\n");
	for (uint32_t what = INVEPT_SINGLE; what <= INVLPG_PIECES; what++) {
		printf("%-34s", name[what]);
		for (uint64_t n = 1000; n <= 1000000; n *= 10)
			printf("%10llu", (unsigned long long)price(n, what));
		printf("\n");
	}
	return 0;
}
