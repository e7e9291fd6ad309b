/* Interrupting a pCPU that runs a guest on the other core, beside the machine's real IPI.
 *
 *   ipi RECORDS PAGES ROUNDS REPEATS
 *
 * on_each_cpu() with wait from a housekeeping CPU, against membarrier(PRIVATE_EXPEDITED) while one other thread of
 * the process runs: the kernel interrupts that thread's core and waits for it.  (Around half a microsecond means
 * that the thread was not on its core, so that no core was interrupted: the machine is busy.)  Needs two cores.
 */
#include "bench.h"

#include <linux/membarrier.h>
#include <sys/syscall.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/machine_types.h"
#include "ept/ept.h"
#include "guest/guest.h"
#include "machine/machine.h"
#include "machine/vms.h"
#include "memory/frame.h"
#include "sync/cpu.h"
#include "sync/ipi.h"
#include "sync/smp.h"
#include "vm/guest_state.h"

struct target {
	struct machine *m;
	struct bench_guest guest;
	_Atomic uint32_t running;
	_Atomic uint32_t stop;
};

static uint64_t *records, *pages, record_count, page_count;

static void *run_guest(void *argument)
{
	struct target *t = argument;

	pin(1);
	cpu_online(t->m, 0);
	bench_run(t->m, 0, &t->guest, record_count);
	atomic_store(&t->running, 1);
	while (!atomic_load(&t->stop))
		bench_run(t->m, 0, &t->guest, record_count);
	return NULL;
}

static void *spin(void *argument)
{
	struct target *t = argument;

	pin(1);
	atomic_store(&t->running, 1);
	while (!atomic_load_explicit(&t->stop, memory_order_relaxed))
		cpu_relax();
	return NULL;
}

static void start(struct target *t, pthread_t *thread, void *(*body)(void *))
{
	atomic_store(&t->running, 0);
	atomic_store(&t->stop, 0);
	REQUIRE(!pthread_create(thread, NULL, body, t));
	while (!atomic_load(&t->running))
		sched_yield();
}

static void finish(struct target *t, pthread_t thread)
{
	atomic_store(&t->stop, 1);
	pthread_join(thread, NULL);
}

static void measure_calls(struct target *t, double *ns, uint32_t rounds)
{
	uint64_t before[COUNTERS], after[COUNTERS];
	pthread_t thread;

	start(t, &thread, run_guest);
	counters_sum(t->m, before);
	for (uint32_t i = 0; i < rounds; i++) {
		uint64_t begin = now_ns();

		REQUIRE(on_each_cpu(t->m, 1, IPI_ACK_KICK, 0, 1) == 1);
		ns[i] = (double)(now_ns() - begin);
		/* Let the guest enter guest mode again before the next IPI. */
		for (int spin = 0; spin < 2000; spin++)
			cpu_relax();
	}
	counters_sum(t->m, after);
	finish(t, thread);
	REQUIRE(after[COUNT_CALLS_RUN] - before[COUNT_CALLS_RUN] == rounds);
}

static void measure_membarrier(struct target *t, double *ns, uint32_t rounds)
{
	pthread_t thread;

	REQUIRE(!syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0));
	start(t, &thread, spin);
	for (uint32_t i = 0; i < rounds; i++) {
		uint64_t begin = now_ns();

		REQUIRE(!syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0));
		ns[i] = (double)(now_ns() - begin);
	}
	finish(t, thread);
}

static void make_guest(struct target *t)
{
	struct guest_config config = { .end_gfn = page_count + 4096, .paging = 1, .pcid = 1, .seed = 1 };

	t->m = bench_machine(1, (uint32_t)page_count + 4096);
	REQUIRE(vm_create(t->m, page_count + 4096) == 0);
	t->guest = bench_guest(t->m, 0, (uint32_t)ept_table_alloc(t->m, 0, FRAME_ROOT), 1);
	REQUIRE(!guest_configure(t->m, t->guest.vcpu, &config));
	REQUIRE(!guest_add_process(t->m, t->guest.vcpu, records, record_count, pages, page_count));
}

int main(int argc, char **argv)
{
	double call[2][REPEATS_MAX], barrier[2][REPEATS_MAX], *ns;
	struct figure figure = { .unit = "ns", .ratio_of = "reference/value" };
	struct target t = { 0 };
	uint32_t rounds;

	REQUIRE(argc == 5);
	records = bench_words(argv[1], &record_count);
	pages = bench_words(argv[2], &page_count);
	rounds = bench_number(argv[3], 1 << 20);
	figure.repeats = bench_number(argv[4], REPEATS_MAX);
	REQUIRE(bench_cores() > 1);
	ns = calloc(rounds, sizeof(*ns));
	REQUIRE(ns);
	make_guest(&t);
	pin(0);
	for (size_t i = 0; i < figure.repeats; i++) {
		measure_calls(&t, ns, rounds);
		call[0][i] = quantile(ns, rounds, 0.5);
		call[1][i] = quantile(ns, rounds, 0.99);
		measure_membarrier(&t, ns, rounds);
		barrier[0][i] = quantile(ns, rounds, 0.5);
		barrier[1][i] = quantile(ns, rounds, 0.99);
	}
	figure.name = "on_each_cpu with wait, median";
	figure.what = "to a pCPU that runs a guest on the other core";
	figure.reference_name = "membarrier PRIVATE_EXPEDITED, one running thread";
	figure.wanted = "value <= 1000 and ratio >= 5";
	figure.values = call[0];
	figure.references = barrier[0];
	emit(&figure);
	figure.name = "on_each_cpu with wait, p99";
	figure.wanted = NULL;
	figure.values = call[1];
	figure.references = barrier[1];
	emit(&figure);
	machine_destroy(t.m);
	free(ns);
	return 0;
}
