/* RCU: the cost of a read section to its reader, and the rate at which callbacks are queued and invoked.
 *
 *   rcu CALLBACKS REPEATS
 *
 * The RCU thread has a core of its own where there are two.
 */
#include "bench.h"

#include "core/counters.h"
#include "core/machine_types.h"
#include "machine/machine.h"
#include "sync/rcu.h"
#include "sync/rcu_callback.h"

enum { SECTIONS = 1 << 20, READER = 1, THREAD = 2, KEPT = 256, NODE_BYTES = 32 };

static double section_ns(struct machine *m)
{
	uint64_t start = now_ns();

	for (uint32_t i = 0; i < SECTIONS; i++) {
		rcu_read_lock(m, READER);
		rcu_read_unlock(m, READER);
	}
	return (double)(now_ns() - start) / SECTIONS;
}

/* Measure the cheapest operation by which two threads agree on an order, without a second thread. */
static double atomic_add_ns(void)
{
	static _Atomic uint64_t word;
	uint64_t start = now_ns();

	for (uint32_t i = 0; i < SECTIONS; i++)
		atomic_fetch_add_explicit(&word, 1, memory_order_seq_cst);
	return (double)(now_ns() - start) / SECTIONS;
}

/* Return the rate of callbacks, from the first call_rcu() to the return of rcu_barrier(). */
static double callbacks_rate(struct machine *m, uint32_t callbacks)
{
	uint64_t before[COUNTERS], after[COUNTERS], start;

	counters_sum(m, before);
	start = now_ns();
	for (uint32_t i = 0; i < callbacks; i++)
		REQUIRE(!call_rcu(m, READER, RCU_NOTHING, i));
	REQUIRE(!rcu_barrier(m, READER));
	start = now_ns() - start;
	counters_sum(m, after);
	REQUIRE(!rcu_pending(m));
	REQUIRE(after[COUNT_RCU_CALLBACKS] - before[COUNT_RCU_CALLBACKS] >= callbacks);
	REQUIRE(after[COUNT_RCU_INVOKED] - before[COUNT_RCU_INVOKED] ==
		after[COUNT_RCU_CALLBACKS] - before[COUNT_RCU_CALLBACKS]);
	return callbacks * 1e3 / (double)start;
}

/* Return the rate of allocating and freeing without waiting for readers. */
static double malloc_rate(uint32_t nodes)
{
	void *volatile kept[KEPT] = { 0 };
	uint64_t start = now_ns();

	for (uint32_t i = 0; i < nodes; i++) {
		free(kept[i % KEPT]);
		kept[i % KEPT] = malloc(NODE_BYTES);
	}
	start = now_ns() - start;
	for (uint32_t i = 0; i < KEPT; i++)
		free(kept[i]);
	return nodes * 1e3 / (double)start;
}

static void *run_rcu_thread(void *argument)
{
	pin(1);
	REQUIRE(!rcu_thread(argument, THREAD));
	return NULL;
}

int main(int argc, char **argv)
{
	double section[REPEATS_MAX], add[REPEATS_MAX], rate[REPEATS_MAX], nodes[REPEATS_MAX];
	struct machine *m;
	pthread_t thread;
	uint32_t callbacks;
	size_t repeats;

	REQUIRE(argc == 3);
	callbacks = bench_number(argv[1], 1 << 24);
	repeats = bench_number(argv[2], REPEATS_MAX);
	m = bench_machine(1, 16);
	pin(0);
	REQUIRE(!pthread_create(&thread, NULL, run_rcu_thread, m));
	callbacks_rate(m, callbacks); /* allocates the nodes */
	for (size_t i = 0; i < repeats; i++) {
		section[i] = section_ns(m);
		add[i] = atomic_add_ns();
		rate[i] = callbacks_rate(m, callbacks);
		nodes[i] = malloc_rate(callbacks);
	}
	machine_stop(m);
	pthread_join(thread, NULL);
	emit(&(struct figure){ .name = "RCU read section", .what = "rcu_read_lock and rcu_read_unlock", .unit = "ns",
			       .values = section, .reference_name = "uncontended atomic add", .references = add,
			       .ratio_of = "value/reference", .repeats = repeats });
	emit(&(struct figure){ .name = "call_rcu", .what = "callbacks queued, waited for and invoked", .unit = "M/s",
			       .values = rate, .reference_name = "malloc and free of 32 bytes", .references = nodes,
			       .ratio_of = "value/reference", .repeats = repeats });
	machine_destroy(m);
	return 0;
}
