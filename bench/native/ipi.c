/* Interrupting a pCPU that runs a guest on the other core, beside the machine's real IPI.
 *
 *   ipi RECORDS PAGES ROUNDS
 *
 * on_each_cpu() with wait from a housekeeping CPU, against membarrier(PRIVATE_EXPEDITED) while one other thread of
 * the process runs: the kernel interrupts that thread's core and waits for it.
 */
#include "bench.h"

#include <linux/membarrier.h>
#include <sys/syscall.h>

struct target {
	struct machine *m;
	uint32_t vcpu;
	uint32_t root;
	_Atomic uint32_t running;
	_Atomic uint32_t stop;
};

static uint64_t *records, *pages, record_count, page_count;

static void *run_guest(void *argument)
{
	struct target *t = argument;

	pin(1);
	cpu_online(t->m, 0);
	bench_run(t->m, 0, t->vcpu, 0, t->root, record_count);
	atomic_store(&t->running, 1);
	while (!atomic_load(&t->stop))
		bench_run(t->m, 0, t->vcpu, 0, t->root, record_count);
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
	pthread_t thread;

	start(t, &thread, run_guest);
	for (uint32_t i = 0; i < rounds; i++) {
		uint64_t begin = now_ns();

		REQUIRE(on_each_cpu(t->m, 1, IPI_ACK_KICK, 0, 1) == 1);
		ns[i] = (double)(now_ns() - begin);
		/* The guest comes back before the next one. */
		for (int spin = 0; spin < 2000; spin++)
			cpu_relax();
	}
	finish(t, thread);
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

int main(int argc, char **argv)
{
	struct guest_config config = { .paging = 1, .pcid = 1, .seed = 1 };
	struct target t = { 0 };
	double *calls, *barriers, call, barrier;
	uint32_t rounds;

	REQUIRE(argc == 4);
	records = bench_words(argv[1], &record_count);
	pages = bench_words(argv[2], &page_count);
	rounds = (uint32_t)atoi(argv[3]);
	calls = calloc(rounds, sizeof(double));
	barriers = calloc(rounds, sizeof(double));
	REQUIRE(rounds && calls && barriers);
	pin(0);
	t.m = bench_machine(1, (uint32_t)page_count + 4096);
	REQUIRE(vm_create(t.m, page_count + 4096) == 0);
	t.root = (uint32_t)ept_table_alloc(t.m, 0, FRAME_ROOT);
	t.vcpu = (uint32_t)vcpu_create(t.m, 0, 1);
	config.end_gfn = page_count + 4096;
	REQUIRE(!guest_configure(t.m, t.vcpu, &config));
	REQUIRE(!guest_add_process(t.m, t.vcpu, records, record_count, pages, page_count));
	vcpu_set_eptp(t.m, t.vcpu, t.root, 4);
	measure_calls(&t, calls, rounds);
	measure_membarrier(&t, barriers, rounds);
	call = quantile(calls, rounds, 0.5);
	barrier = quantile(barriers, rounds, 0.5);
	emit("on_each_cpu with wait", "median, target runs a guest on the other core; at most 1000 ns and a fifth wanted",
	     call, "ns", "membarrier PRIVATE_EXPEDITED, one running thread", barrier, barrier / call);
	emit("on_each_cpu with wait, p99", "the same, 99th percentile", quantile(calls, rounds, 0.99), "ns",
	     "membarrier, p99", quantile(barriers, rounds, 0.99),
	     quantile(barriers, rounds, 0.99) / quantile(calls, rounds, 0.99));
	machine_destroy(t.m);
	return 0;
}
