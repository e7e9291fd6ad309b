/* The primitives that a Linux tree's TDP MMU stands on, in user space.
 *
 * Compiled together with tdp_mmu.c, tdp_iter.c and spte.c of a tree and never by itself.  Nothing here tests a
 * version: a primitive that one tree needs and another lacks does no harm.  Every access to an SPTE, every lock,
 * flush and freed page passes through here to shim.c (one thread, compared with the model) or to machine.c (the
 * machine's threads).
 */
#ifndef FLUSHLAB_SHIM_LINUX_H
#define FLUSHLAB_SHIM_LINUX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* --- types ----------------------------------------------------------------------------------------------------- */
typedef uint8_t u8, __u8;
typedef uint16_t u16, __u16;
typedef uint32_t u32, __u32;
typedef unsigned long long u64, __u64;
typedef int8_t s8, __s8;
typedef int16_t s16, __s16;
typedef int32_t s32, __s32;
typedef long long s64, __s64;
typedef unsigned int gfp_t;
typedef long ssize_t;
typedef struct { int counter; } atomic_t;
typedef struct { s64 counter; } atomic64_t;
typedef struct { long counter; } atomic_long_t;
typedef struct { int refs; } refcount_t;
typedef struct { int held; } spinlock_t;
typedef spinlock_t raw_spinlock_t;
typedef struct { int held; } rwlock_t;
struct mutex { int held; };
struct page { unsigned long private; };
struct list_head { struct list_head *next, *prev; };
struct hlist_node { struct hlist_node *next, **pprev; };
struct hlist_head { struct hlist_node *first; };
struct rcu_head { struct rcu_head *next; void (*func)(struct rcu_head *head); };
struct work_struct { struct work_struct *next; void (*func)(struct work_struct *work); };
struct workqueue_struct { struct work_struct *first; };
struct xarray { void **shim_entries; };
struct cpumask;

/* --- annotations ----------------------------------------------------------------------------------------------- */
#define __rcu
#define __user
#define __percpu
#define __iomem
#define __force
#define __init
#define __exit
#define __initdata
#define __read_mostly
#define __ro_after_init
#define __visible
#define __must_hold(x)
#define __acquires(x)
#define __releases(x)
#define __always_inline inline __attribute__((always_inline))
#define __aligned(x) __attribute__((aligned(x)))
#define __must_check __attribute__((warn_unused_result))
#define __maybe_unused __attribute__((unused))
#define __packed __attribute__((packed))
#define noinline __attribute__((noinline))
#define __cold
#define __printf(a, b)
#define fallthrough __attribute__((fallthrough))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define static_assert _Static_assert
#define EXPORT_SYMBOL(x)
#define EXPORT_SYMBOL_GPL(x)
#define EXPORT_SYMBOL_FOR_KVM_INTERNAL(x)
#define EXPORT_SYMBOL_FOR_KVM(x)
#define module_param_named(name, value, type, perm)
#define module_param(name, type, perm)
#define KBUILD_MODNAME "kvm"
#define __is_identity(x) (x)
#define ERR_PTR(error) ((void *)(long)(error))
#define EBUSY 16
#define EAGAIN 11
#define ENOMEM 12
#define ENOENT 2
#define EOPNOTSUPP 95
#define EINVAL 22
#define EIO 5

/* --- arithmetic ------------------------------------------------------------------------------------------------ */
#define BITS_PER_LONG 64
#define BITS_PER_LONG_LONG 64
#define BIT(n) (1UL << (n))
#define BIT_ULL(n) (1ULL << (n))
#define GENMASK(h, l) ((~0UL << (l)) & (~0UL >> (63 - (h))))
#define GENMASK_ULL(h, l) ((~0ULL << (l)) & (~0ULL >> (63 - (h))))
#define UL(x) x##UL
#define _AC(x, y) x##y
#define _UL(x) x##UL
#define _ULL(x) x##ULL
#define min(a, b) ({ __auto_type shim_a = (a); __auto_type shim_b = (b); shim_a < shim_b ? shim_a : shim_b; })
#define max(a, b) ({ __auto_type shim_a = (a); __auto_type shim_b = (b); shim_a > shim_b ? shim_a : shim_b; })
#define min_t(t, a, b) min((t)(a), (t)(b))
#define max_t(t, a, b) max((t)(a), (t)(b))
#define ARRAY_SIZE(x) (sizeof(x) / sizeof((x)[0]))
#define container_of(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))
#define __ffs(x) ((unsigned long)__builtin_ctzl(x))
#define DECLARE_BITMAP(name, bits) unsigned long name[((bits) + 63) / 64]
#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_MASK (~(PAGE_SIZE - 1))
#define PAGE_OFFSET 0xffff888000000000UL
#define ALIGN_DOWN(x, a) ((x) & ~((__typeof__(x))(a) - 1))
#define ALIGN(x, a) (((x) + (a) - 1) & ~((__typeof__(x))(a) - 1))

/* --- complaints ------------------------------------------------------------------------------------------------ */
void shim_warn(const char *file, int line, const char *function, const char *what);
void shim_bug(const char *file, int line, const char *what) __attribute__((noreturn));
void shim_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define BUILD_BUG_ON(x) ((void)sizeof(char[1 - 2 * !!(x)]))
#define BUILD_BUG_ON_INVALID(x) ((void)sizeof((long)(x)))
#define BUILD_BUG_ON_ZERO(x) 0
#define BUILD_BUG() do { } while (0)
#define WARN_ON(x) ({ bool shim_met = !!(x); if (shim_met) shim_warn(__FILE__, __LINE__, __func__, #x); shim_met; })
#define WARN_ON_ONCE(x) WARN_ON(x)
#define WARN(x, ...) WARN_ON(x)
#define WARN_ONCE(x, ...) WARN_ON(x)
#define BUG_ON(x) do { if (x) shim_bug(__FILE__, __LINE__, #x); } while (0)
#define BUG() shim_bug(__FILE__, __LINE__, "BUG")
#define KVM_BUG_ON(x, kvm) WARN_ON(x)
#define KVM_BUG(x, kvm, ...) WARN_ON(x)
#define KVM_BUG_ON_DATA_CORRUPTION(x, kvm) WARN_ON(x)
#define printk(...) shim_say(__VA_ARGS__)
#define pr_err(...) shim_say(__VA_ARGS__)
#define pr_err_ratelimited(...) shim_say(__VA_ARGS__)
#define pr_warn(...) shim_say(__VA_ARGS__)
#define pr_info(...) do { } while (0)
#define pr_debug(...) do { } while (0)

/* --- accesses to memory: those to SPTEs call shim_reads() and shim_stores() -------------------------------------- */
void shim_reads(const volatile void *p);
/* Tell an access to other memory that CPUs share: reference counts, lists, and all that is no SPTE. */
void shim_shared(const volatile void *p, bool write);
/* Store to an SPTE, and return true.  Return false if p is no SPTE, or if the caller has to store the value. */
bool shim_stores(volatile void *p, u64 value);
u64 shim_xchg(volatile void *p, u64 value);
u64 shim_cmpxchg(volatile void *p, u64 old, u64 value);
u64 shim_fetch_and(volatile void *p, u64 mask);

/* The fields of a vCPU that CPUs share are the machine's.  shim_vcpu_value() fetches the one at p, and returns the address of
 * its value; shim_vcpu_cmpxchg() does, too, and then makes the exchange. */
extern unsigned long shim_vcpus, shim_vcpus_bytes;
const void *shim_vcpu_value(const volatile void *p);
const void *shim_vcpu_cmpxchg(volatile void *p, u64 old, u64 value);
static inline bool shim_is_vcpu(const volatile void *p) { return (unsigned long)p - shim_vcpus < shim_vcpus_bytes; }

#define READ_ONCE(x) \
	({ const volatile __typeof__(x) *shim_at = &(x); \
	   if (shim_is_vcpu(shim_at)) \
		   shim_at = shim_vcpu_value(shim_at); \
	   else \
		   shim_reads(shim_at); \
	   __atomic_load_n(shim_at, __ATOMIC_ACQUIRE); })
#define WRITE_ONCE(x, v) \
	({ __typeof__(x) shim_v = (v); \
	   if (shim_is_vcpu(&(x))) \
		   shim_bug(__FILE__, __LINE__, "the shim has no plain store to a field of struct kvm_vcpu"); \
	   if (sizeof(x) != 8) \
		   shim_shared(&(x), true); \
	   if (sizeof(x) != 8 || !shim_stores(&(x), (u64)shim_v)) \
		   *(volatile __typeof__(x) *)&(x) = shim_v; })
#define smp_load_acquire(p) READ_ONCE(*(p))
#define smp_store_release(p, v) WRITE_ONCE(*(p), v)
#define xchg(p, v) \
	({ __typeof__(p) shim_p = (p); __typeof__(*shim_p) shim_new = (v); \
	   sizeof(*shim_p) == 8 ? (__typeof__(*shim_p))shim_xchg(shim_p, (u64)shim_new) : \
		   (shim_shared(shim_p, true), __atomic_exchange_n(shim_p, shim_new, __ATOMIC_SEQ_CST)); })
#define cmpxchg(p, old, v) \
	({ __typeof__(p) shim_p = (p); __typeof__(*shim_p) shim_o = (old), shim_new = (v); \
	   if (shim_is_vcpu(shim_p)) \
		   shim_o = *(__typeof__(shim_p))shim_vcpu_cmpxchg(shim_p, (u64)shim_o, (u64)shim_new); \
	   else if (sizeof(*shim_p) == 8) \
		   shim_o = (__typeof__(*shim_p))shim_cmpxchg(shim_p, (u64)shim_o, (u64)shim_new); \
	   else { \
		   shim_shared(shim_p, true); \
		   __atomic_compare_exchange_n(shim_p, &shim_o, shim_new, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
	   } \
	   shim_o; })
#define cmpxchg64(p, old, v) cmpxchg(p, old, v)
#define try_cmpxchg(p, oldp, v) \
	({ __typeof__(oldp) shim_op = (oldp); __typeof__(*shim_op) shim_want = *shim_op, shim_got; \
	   shim_got = cmpxchg(p, shim_want, v); if (shim_got != shim_want) *shim_op = shim_got; shim_got == shim_want; })
#define try_cmpxchg64(p, oldp, v) try_cmpxchg(p, oldp, v)
#define barrier() __asm__ volatile("" : : : "memory")
#define smp_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define smp_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define smp_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#define smp_mb__after_srcu_read_unlock() barrier()
#define smp_mb__before_atomic() barrier()
#define smp_mb__after_atomic() barrier()
void cpu_relax(void);

static inline s64 atomic64_fetch_and(s64 mask, atomic64_t *v) { return (s64)shim_fetch_and(&v->counter, (u64)mask); }
#define shim_load(v) __atomic_load_n(&(v)->counter, __ATOMIC_RELAXED)
#define shim_set(v, n) __atomic_store_n(&(v)->counter, n, __ATOMIC_RELAXED)
#define shim_add(v, n) ((void)__atomic_fetch_add(&(v)->counter, n, __ATOMIC_RELAXED))
#define atomic64_read(v) shim_load(v)
#define atomic64_set(v, n) shim_set(v, n)
#define atomic64_inc(v) shim_add(v, 1)
#define atomic64_dec(v) shim_add(v, -1)
#define atomic64_add(n, v) shim_add(v, n)
#define atomic_long_read(v) shim_load(v)
#define atomic_long_set(v, n) shim_set(v, n)
#define atomic_read(v) shim_load(v)
#define atomic_set(v, n) shim_set(v, n)
#define atomic_inc(v) shim_add(v, 1)
#define atomic_dec(v) shim_add(v, -1)

#define refcount_set(r, n) __atomic_store_n(&(r)->refs, n, __ATOMIC_RELAXED)
#define refcount_read(r) (shim_shared(r, false), __atomic_load_n(&(r)->refs, __ATOMIC_RELAXED))
static inline bool refcount_inc_not_zero(refcount_t *r)
{
	int refs;

	shim_shared(r, true);
	refs = __atomic_load_n(&r->refs, __ATOMIC_RELAXED);
	while (refs && !__atomic_compare_exchange_n(&r->refs, &refs, refs + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
		;
	return refs != 0;
}
/* The place is that of the caller, which has the bug. */
static inline bool shim_refcount_dec(refcount_t *r, const char *file, int line, const char *function)
{
	int refs;

	shim_shared(r, true);
	refs = __atomic_fetch_sub(&r->refs, 1, __ATOMIC_SEQ_CST);
	if (refs <= 0)
		shim_warn(file, line, function, "refcount_t: underflow");
	return refs == 1;
}
static inline void shim_refcount_inc(refcount_t *r, const char *file, int line, const char *function)
{
	shim_shared(r, true);
	if (__atomic_fetch_add(&r->refs, 1, __ATOMIC_SEQ_CST) <= 0)
		shim_warn(file, line, function, "refcount_t: addition on 0");
}
#define refcount_dec_and_test(r) shim_refcount_dec(r, __FILE__, __LINE__, __func__)
#define refcount_inc(r) shim_refcount_inc(r, __FILE__, __LINE__, __func__)

/* --- locks: kvm->mmu_lock, and spinlocks that nest in it ------------------------------------------------------ */
void shim_lock(rwlock_t *lock, int how);
void shim_unlock(rwlock_t *lock, int how);
bool shim_need_resched(void);
bool shim_needbreak(void);
void shim_yield(rwlock_t *lock, int how);
void shim_assert_lock(int held, int how, const char *file, int line, const char *function);
/* Return how the caller holds mmu_lock (0, 1 for read, 2 for write); return whether it holds another lock. */
int shim_mmu_lock_held(const void *lock);
static inline int shim_held(const void *lock) { return *(const volatile int *)lock; }
void shim_spin_lock(spinlock_t *lock);
void shim_spin_unlock(spinlock_t *lock);
enum { SHIM_READ = 1, SHIM_WRITE = 2, SHIM_ANY = 3 };

#define read_lock(l) shim_lock(l, SHIM_READ)
#define read_unlock(l) shim_unlock(l, SHIM_READ)
#define write_lock(l) shim_lock(l, SHIM_WRITE)
#define write_unlock(l) shim_unlock(l, SHIM_WRITE)
#define need_resched() shim_need_resched()
#define rwlock_needbreak(l) shim_needbreak()
#define rwlock_is_contended(l) shim_needbreak()
#define cond_resched_rwlock_read(l) shim_yield(l, SHIM_READ)
#define cond_resched_rwlock_write(l) shim_yield(l, SHIM_WRITE)
#define cond_resched() ((void)0)
#define lockdep_assert_held(l) shim_assert_lock(lockdep_is_held(l), SHIM_ANY, __FILE__, __LINE__, __func__)
#define lockdep_assert_held_read(l) shim_assert_lock(lockdep_is_held(l), SHIM_READ, __FILE__, __LINE__, __func__)
#define lockdep_assert_held_write(l) shim_assert_lock(lockdep_is_held(l), SHIM_WRITE, __FILE__, __LINE__, __func__)
#define lockdep_assert_once(x) ((void)0)
#define lockdep_is_held(l) _Generic(*(l), rwlock_t: shim_mmu_lock_held, default: shim_held)(l)
#define lockdep_assert_irqs_enabled() ((void)0)
#define spin_lock_init(l) ((void)((l)->held = 0))
#define rwlock_init(l) ((void)((l)->held = 0))
#define spin_lock(l) shim_spin_lock(l)
#define spin_unlock(l) shim_spin_unlock(l)

/* --- RCU ------------------------------------------------------------------------------------------------------- */
void rcu_read_lock(void);
void rcu_read_unlock(void);
void shim_call_rcu(struct rcu_head *head, void (*func)(struct rcu_head *head));
void rcu_barrier(void);
static inline int shim_guard_enter(void) { rcu_read_lock(); return 0; }
static inline void shim_guard_leave(int *guard) { (void)guard; rcu_read_unlock(); }
#define guard(name) shim_guard_##name
#define shim_guard_rcu() \
	__attribute__((cleanup(shim_guard_leave), unused)) int shim_rcu_guard = shim_guard_enter()
#define call_rcu(head, func) shim_call_rcu(head, func)
#define call_rcu_hurry(head, func) shim_call_rcu(head, func)
#define rcu_dereference(p) (p)
#define rcu_dereference_raw(p) (p)
#define rcu_dereference_check(p, c) (p)
#define rcu_dereference_protected(p, c) (p)
#define rcu_assign_pointer(p, v) ((void)((p) = (v)))
#define rcu_access_pointer(p) (p)
#define srcu_dereference(p, s) (p)
#define srcu_dereference_check(p, s, c) (p)
#define unrcu_pointer(p) (p)

/* --- lists ----------------------------------------------------------------------------------------------------- */
static inline void INIT_LIST_HEAD(struct list_head *l) { l->next = l->prev = l; }
static inline int list_empty(const struct list_head *l) { return l->next == l; }
static inline void shim_list_between(struct list_head *new, struct list_head *prev, struct list_head *next)
{
	shim_shared(prev, true);
	new->next = next;
	new->prev = prev;
	next->prev = new;
	__atomic_store_n(&prev->next, new, __ATOMIC_RELEASE);
}
static inline struct list_head *shim_next(struct list_head *l)
{
	shim_shared(l, false);
	return __atomic_load_n(&l->next, __ATOMIC_ACQUIRE);
}
static inline void list_add(struct list_head *new, struct list_head *head) { shim_list_between(new, head, head->next); }
static inline void list_add_tail(struct list_head *new, struct list_head *head) { shim_list_between(new, head->prev, head); }
/* list_del_rcu(): the entry still leads to the next one. */
static inline void list_del_rcu(struct list_head *l)
{
	shim_shared(l, true);
	l->next->prev = l->prev;
	__atomic_store_n(&l->prev->next, l->next, __ATOMIC_RELEASE);
	l->prev = NULL;
}
static inline void list_del(struct list_head *l) { list_del_rcu(l); l->next = NULL; }
static inline void list_del_init(struct list_head *l) { list_del_rcu(l); INIT_LIST_HEAD(l); }
#define list_add_rcu(new, head) list_add(new, head)
#define list_add_tail_rcu(new, head) list_add_tail(new, head)
#define list_entry(ptr, type, member) container_of(ptr, type, member)
#define list_first_entry(head, type, member) list_entry((head)->next, type, member)
#define list_for_each_entry(pos, head, member) \
	for (pos = list_entry(shim_next(head), __typeof__(*pos), member); &pos->member != (head); \
	     pos = list_entry(shim_next(&pos->member), __typeof__(*pos), member))
#define list_for_each_entry_rcu(pos, head, member, ...) list_for_each_entry(pos, head, member)
#define list_for_each_entry_safe(pos, n, head, member) \
	for (pos = list_entry(shim_next(head), __typeof__(*pos), member), \
	     n = list_entry(pos->member.next, __typeof__(*pos), member); &pos->member != (head); \
	     pos = n, n = list_entry(n->member.next, __typeof__(*n), member))
#define list_next_or_null_rcu(head, ptr, type, member) \
	({ struct list_head *shim_found = shim_next(ptr); \
	   shim_found == (head) ? NULL : list_entry(shim_found, type, member); })
#define list_first_or_null_rcu(head, type, member) list_next_or_null_rcu(head, head, type, member)

/* --- pages ----------------------------------------------------------------------------------------------------- */
struct kmem_cache;
struct kvm_mmu_memory_cache { int nobjs; };
#define GFP_KERNEL 0u
#define GFP_KERNEL_ACCOUNT 0u
#define GFP_NOWAIT 1u
#define GFP_ATOMIC 1u
#define __GFP_ACCOUNT 0u
#define __GFP_ZERO 0u
#define GFP_PGTABLE_USER 0u
unsigned long shim_page_alloc(gfp_t gfp);
void shim_page_free(unsigned long page);
void *shim_object_alloc(void);
void shim_object_free(void *object);
void *kvm_mmu_memory_cache_alloc(struct kvm_mmu_memory_cache *cache);
unsigned long shim_pa(const void *p);
void *shim_va(unsigned long pa);
struct page *shim_page_of(unsigned long pfn);
#define __get_free_page(gfp) shim_page_alloc(gfp)
#define get_zeroed_page(gfp) shim_page_alloc(gfp)
#define free_page(p) shim_page_free((unsigned long)(p))
#define kmem_cache_alloc(c, gfp) shim_object_alloc()
#define kmem_cache_zalloc(c, gfp) shim_object_alloc()
#define kmem_cache_free(c, object) shim_object_free(object)
#define __pa(p) shim_pa((const void *)(p))
#define __va(pa) shim_va(pa)
#define pfn_to_page(pfn) shim_page_of(pfn)
#define virt_to_page(p) shim_page_of(shim_pa(p) >> PAGE_SHIFT)
#define page_private(page) ((page)->private)
#define set_page_private(page, value) ((void)((page)->private = (value)))
#define pfn_valid(pfn) true
#define is_zero_pfn(pfn) false
#define PageReserved(page) false
#define pat_enabled() true
#define pat_pfn_immune_to_uc_mtrr(pfn) false
#define e820__mapped_raw_any(start, end, type) true
#define cpuid_eax(leaf) 46u
#define boot_cpu_has_bug(bug) false
#define boot_cpu_has(feature) false
#define cpu_feature_enabled(feature) false
#define static_cpu_has(feature) false
#define cpu_has_bug(c, bug) false

/* --- vCPUs, requests and interrupts to other CPUs ------------------------------------------------------------------ */
void shim_set_bit(long bit, volatile void *p);
bool shim_test_and_set_bit(long bit, volatile void *p);
bool shim_test_and_clear_bit(long bit, volatile void *p);
bool shim_test_bit(long bit, const volatile void *p);
#define set_bit(bit, p) shim_set_bit(bit, p)
#define clear_bit(bit, p) ((void)shim_test_and_clear_bit(bit, p))
#define test_and_set_bit(bit, p) shim_test_and_set_bit(bit, p)
#define test_and_clear_bit(bit, p) shim_test_and_clear_bit(bit, p)
#define test_bit(bit, p) shim_test_bit(bit, p)
/* vCPUs are created before the loop and freed behind it. */
#define xa_for_each_range(xa, index, entry, first, last) \
	for (index = (first); (long)index <= (long)(last) && ((entry) = (xa)->shim_entries[index], true); index++)
#define xa_load(xa, index) ((xa)->shim_entries[index])
int shim_this_cpu(void);
struct cpumask *shim_kick_mask(void);
void shim_cpumask_clear(struct cpumask *mask);
bool shim_cpumask_empty(const struct cpumask *mask);
bool shim_cpumask_change(unsigned int cpu, struct cpumask *mask, bool set);
bool shim_cpumask_test(unsigned int cpu, const struct cpumask *mask);
void shim_call_function_many(const struct cpumask *mask, void (*function)(void *argument), bool wait);
int shim_flush_on_hyperv(void);
int shim_flush_range_on_hyperv(u64 gfn, u64 npages);
#define get_cpu() shim_this_cpu()
#define put_cpu() ((void)0)
#define smp_processor_id() shim_this_cpu()
#define preempt_disable() ((void)0)
#define preempt_enable() ((void)0)
#define this_cpu_cpumask_var_ptr(name) shim_kick_mask()
#define cpumask_clear(mask) shim_cpumask_clear(mask)
#define cpumask_empty(mask) shim_cpumask_empty(mask)
#define cpumask_set_cpu(cpu, mask) ((void)shim_cpumask_change(cpu, mask, true))
#define __cpumask_set_cpu(cpu, mask) ((void)shim_cpumask_change(cpu, mask, true))
#define cpumask_clear_cpu(cpu, mask) ((void)shim_cpumask_change(cpu, mask, false))
#define __cpumask_clear_cpu(cpu, mask) ((void)shim_cpumask_change(cpu, mask, false))
#define cpumask_test_cpu(cpu, mask) shim_cpumask_test(cpu, mask)
#define smp_call_function_many(mask, function, argument, wait) \
	((void)(argument), shim_call_function_many(mask, function, wait))
/* The vendor's hooks: Hyper-V's, and none elsewhere. */
#define kvm_arch_flush_remote_tlb(kvm) shim_flush_on_hyperv()
#define kvm_arch_flush_remote_tlbs(kvm) shim_flush_on_hyperv()
#define kvm_arch_flush_remote_tlbs_range(kvm, gfn, npages) shim_flush_range_on_hyperv(gfn, npages)

/* --- work queues ------------------------------------------------------------------------------------------------ */
bool queue_work(struct workqueue_struct *queue, struct work_struct *work);
void flush_workqueue(struct workqueue_struct *queue);
#define INIT_WORK(w, f) ((w)->func = (f))

/* --- the vendor, and the rest of KVM ------------------------------------------------------------------------------ */
#define static_call(name) name
#define static_call_cond(name) name
#define kvm_x86_call(name) kvm_x86_##name
#define kvm_x86_get_mt_mask(vcpu, gfn, mmio) (6ULL << 3)
#define kvm_x86_free_external_spt(...) 0
#define kvm_x86_set_external_spte(...) 0
#define kvm_account_pgtable_pages(page, n) ((void)(page))
#define kvm_update_page_stats(kvm, level, n) ((void)0)

/* --- trace events: their arguments are not evaluated ---------------------------------------------------------- */
#define TP_PROTO(...) __VA_ARGS__
#define TP_ARGS(...)
#define TP_STRUCT__entry(...)
#define TP_fast_assign(...)
#define TP_printk(...)
#define TRACE_DEFINE_ENUM(x)
#define TRACE_EVENT(name, proto, ...) static inline void trace_##name(proto) { }
#define DECLARE_EVENT_CLASS(name, ...)
#define DEFINE_EVENT(class, name, proto, ...) static inline void trace_##name(proto) { }

#endif
