/* The functions that -fsanitize=thread calls before each access to memory, in place of ThreadSanitizer's.
 *
 * A tree that is compiled so logs its accesses to memory that CPUs share, while steps are told.  Python takes the log at
 * the end of each step, and finds accesses that no step orders.  In a tree that is compiled otherwise, nothing here is
 * called, and nothing is logged. */
#include "linux.h"
#include "machine_internal.h"

enum { MOST_PLAIN = 1 << 16 };

static struct tree_access *log_of_accesses;
static unsigned int n_logged;
static bool instrumented;

/* The compiler's constructor calls it before everything else. */
void __tsan_init(void);
void __tsan_init(void)
{
	static struct tree_access room[MOST_PLAIN];

	instrumented = true;
	log_of_accesses = room;
}

/* Return whether another CPU may reach this memory: tables, kernel objects, and variables. */
static bool is_shared(const volatile void *p)
{
	unsigned int hfn;

	if (glue_is_statistic(p))
		return false;
	return shim_in_frames(p, &hfn) || shim_is_object((const void *)p) || shim_is_kept((const void *)p);
}

void shim_log(const volatile void *p, unsigned int bytes, bool write, bool marked, const void *from)
{
	if (!instrumented || n_logged == MOST_PLAIN || !shim_explored() || !is_shared(p))
		return;
	log_of_accesses[n_logged++] = (struct tree_access){ (u64)(unsigned long)p, bytes, write, marked,
							    (long)((unsigned long)from - shim_base) };
}

unsigned int tree_accesses(const struct tree_access **accesses)
{
	unsigned int n = n_logged;

	*accesses = log_of_accesses;
	n_logged = 0;
	return n;
}

#define ACCESS(name, bytes, write, marked) \
	void __tsan_##name(void *p); \
	void __tsan_##name(void *p) { shim_log(p, bytes, write, marked, __builtin_return_address(0)); }
#define ACCESSES(bytes) \
	ACCESS(read##bytes, bytes, false, false) \
	ACCESS(write##bytes, bytes, true, false) \
	ACCESS(unaligned_read##bytes, bytes, false, false) \
	ACCESS(unaligned_write##bytes, bytes, true, false) \
	ACCESS(volatile_read##bytes, bytes, false, true) \
	ACCESS(volatile_write##bytes, bytes, true, true) \
	ACCESS(unaligned_volatile_read##bytes, bytes, false, true) \
	ACCESS(unaligned_volatile_write##bytes, bytes, true, true)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void *p, unsigned long bytes);
void __tsan_read_range(void *p, unsigned long bytes)
{
	shim_log(p, (unsigned int)bytes, false, false, __builtin_return_address(0));
}

void __tsan_write_range(void *p, unsigned long bytes);
void __tsan_write_range(void *p, unsigned long bytes)
{
	shim_log(p, (unsigned int)bytes, true, false, __builtin_return_address(0));
}

void __tsan_func_entry(void *from);
void __tsan_func_entry(void *from) { (void)from; }
void __tsan_func_exit(void);
void __tsan_func_exit(void) { }

/* The compiler also replaces atomic operations.  The order asked for is at most this one. */
#define SEEN(write) shim_log(p, sizeof(*p), write, true, __builtin_return_address(0))
#define FETCH(t, bits, name) \
	t __tsan_atomic##bits##_##name(volatile t *p, t v, int order); \
	t __tsan_atomic##bits##_##name(volatile t *p, t v, int order) \
	{ (void)order; SEEN(true); return __atomic_##name(p, v, __ATOMIC_SEQ_CST); }
#define COMPARE(t, bits, how) \
	int __tsan_atomic##bits##_compare_exchange_##how(volatile t *p, t *old, t v, int order, int failed); \
	int __tsan_atomic##bits##_compare_exchange_##how(volatile t *p, t *old, t v, int order, int failed) \
	{ (void)order; (void)failed; SEEN(true); \
	  return __atomic_compare_exchange_n(p, old, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); }
#define ATOMIC(t, bits) \
	t __tsan_atomic##bits##_load(const volatile t *p, int order); \
	t __tsan_atomic##bits##_load(const volatile t *p, int order) \
	{ (void)order; SEEN(false); return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
	void __tsan_atomic##bits##_store(volatile t *p, t v, int order); \
	void __tsan_atomic##bits##_store(volatile t *p, t v, int order) \
	{ (void)order; SEEN(true); __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
	t __tsan_atomic##bits##_exchange(volatile t *p, t v, int order); \
	t __tsan_atomic##bits##_exchange(volatile t *p, t v, int order) \
	{ (void)order; SEEN(true); return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
	FETCH(t, bits, fetch_add) FETCH(t, bits, fetch_sub) FETCH(t, bits, fetch_and) FETCH(t, bits, fetch_or) \
	FETCH(t, bits, fetch_xor) COMPARE(t, bits, strong) COMPARE(t, bits, weak)
ATOMIC(u8, 8)
ATOMIC(u16, 16)
ATOMIC(u32, 32)
ATOMIC(u64, 64)

void __tsan_atomic_thread_fence(int order);
void __tsan_atomic_thread_fence(int order) { (void)order; __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int order);
void __tsan_atomic_signal_fence(int order) { (void)order; barrier(); }
