/* Guest accesses without EPT, beside those of the same trace with EPT.
 *
 *   shadow_guest NAME RECORDS PAGES REPEATS
 *
 * The trace runs in a loop on one pCPU.  Then so do random accesses over 16384 pages, nine in ten of which miss the
 * 1536-entry second level: each is a walk, of one dimension or of two.  KVM without EPT is that of the C tests.
 */
#include "bench.h"

#include "../../tests/native/shadow_machine.h"
#include "core/counters.h"
#include "core/machine_types.h"
#include "guest/guest.h"

enum { LOOPS_PER_REPEAT = 16, WIDE_PAGES = 16384, WIDE_RECORDS = 1 << 20 };

/* A guest on a machine of its own. */
struct side {
	struct machine *m;
	struct bench_guest guest; /* with EPT */
	struct shadow_vm *shadow; /* without; NULL: with */
	struct shadow_vcpu *vcpu;
};

struct load {
	uint64_t *records, *pages;
	uint64_t record_count, page_count;
};

static void make_guest(struct side *s, const struct load *l)
{
	uint64_t gfns = l->page_count + 4096;
	struct guest_config config = { .end_gfn = gfns, .paging = 1, .pcid = 1, .seed = 1 };

	REQUIRE(!guest_configure(s->m, s->guest.vcpu, &config));
	REQUIRE(!guest_add_process(s->m, s->guest.vcpu, l->records, l->record_count, l->pages, l->page_count));
}

static struct side make_side(const struct load *l, bool ept)
{
	uint64_t gfns = l->page_count + 4096;
	struct side s = { .m = bench_machine(1, (uint32_t)gfns + 64) };

	REQUIRE(gfns <= SHADOW_GFNS);
	REQUIRE(vm_create(s.m, gfns) == 0);
	cpu_online(s.m, 0);
	if (ept) {
		s.guest = bench_guest(s.m, 0, (uint32_t)ept_table_alloc(s.m, 1, FRAME_ROOT), 1);
		make_guest(&s, l);
		return s;
	}
	s.shadow = calloc(1, sizeof(*s.shadow));
	s.vcpu = calloc(1, sizeof(*s.vcpu));
	REQUIRE(s.shadow && s.vcpu);
	s.shadow->m = s.m;
	s.shadow->gfns = gfns;
	s.vcpu->vcpu = s.guest.vcpu = (uint32_t)vcpu_create(s.m, 0);
	make_guest(&s, l);
	shadow_vcpu_create(s.shadow, 1, s.vcpu, 1);
	return s;
}

static void run_shadowed(const struct side *s, uint64_t n)
{
	struct vcpu_exit out;

	REQUIRE(!vmptrld(s->m, 0, s->vcpu->vmcs));
	while (n) {
		int r;

		local_irq_disable(s->m, 0, "bench");
		vcpu_set_mode(s->m, s->guest.vcpu, IN_GUEST_MODE);
		r = guest_run(s->m, 0, s->guest.vcpu, n, &out);
		REQUIRE(r >= 0);
		n -= out.accesses;
		REQUIRE(shadow_exit(s->shadow, 0, s->vcpu, r, &out));
	}
}

/* Return the accesses per second. */
static double rate(const struct side *s, uint64_t n)
{
	uint64_t start = now_ns();

	if (s->shadow)
		run_shadowed(s, n);
	else
		bench_run(s->m, 0, &s->guest, n);
	return (double)n * 1e9 / (double)(now_ns() - start);
}

static void compare(const struct load *l, const char *name, const char *what, uint64_t loops, size_t repeats)
{
	double without[REPEATS_MAX], with[REPEATS_MAX];
	struct side ept, shadow;

	unpin(); /* bench_machine() */
	ept = make_side(l, true);
	shadow = make_side(l, false);
	pin(0);
	/* All pages are mapped and written in the first rounds. */
	rate(&ept, l->record_count * 2);
	rate(&shadow, l->record_count * 2);
	for (size_t i = 0; i < repeats; i++) {
		with[i] = rate(&ept, l->record_count * loops) / 1e6;
		without[i] = rate(&shadow, l->record_count * loops) / 1e6;
	}
	REQUIRE(counter_sum(shadow.m, COUNT_EXIT_EXCEPTION) && counter_sum(ept.m, COUNT_EXIT_EPT_VIOLATION));
	emit(&(struct figure){ .name = name, .what = what, .unit = "M/s", .reference_name = "the same with EPT",
			       .ratio_of = "value/reference", .wanted = "ratio >= 0.9", .values = without,
			       .references = with, .repeats = repeats });
	machine_destroy(ept.m);
	machine_destroy(shadow.m);
	free(shadow.shadow);
	free(shadow.vcpu);
}

static struct load wide_load(void)
{
	struct load l = { .record_count = WIDE_RECORDS, .page_count = WIDE_PAGES };
	uint64_t random = 1;

	l.records = calloc(WIDE_RECORDS, sizeof(*l.records));
	l.pages = calloc(WIDE_PAGES, sizeof(*l.pages));
	REQUIRE(l.records && l.pages);
	for (uint64_t i = 0; i < WIDE_PAGES; i++)
		l.pages[i] = 0x5000 + i;
	for (uint64_t i = 0; i < WIDE_RECORDS; i++) {
		random = random * 6364136223846793005u + 1442695040888963407u;
		l.records[i] = l.pages[(random >> 33) % WIDE_PAGES] << 12 | (random >> 20 & 0xff8);
	}
	return l;
}

int main(int argc, char **argv)
{
	struct load trace = { 0 }, wide = wide_load();
	char name[80];
	size_t repeats;

	REQUIRE(argc == 5);
	repeats = bench_number(argv[4], REPEATS_MAX);
	trace.records = bench_words(argv[2], &trace.record_count);
	trace.pages = bench_words(argv[3], &trace.page_count);
	snprintf(name, sizeof(name), "guest accesses without EPT, %s", argv[1]);
	compare(&trace, name, "oracle on", LOOPS_PER_REPEAT, repeats);
	compare(&wide, "access beyond the TLB without EPT", "nine in ten miss both levels; oracle on", 1, repeats);
	free(wide.records);
	free(wide.pages);
	return 0;
}
