/* Shared by the files of the shim that runs on the machine. */
#ifndef FLUSHLAB_MACHINE_INTERNAL_H
#define FLUSHLAB_MACHINE_INTERNAL_H

#include "machine.h"

#include <setjmp.h>

/* A physical address: the frame's number, and above it the tag of its life or the custody of a leaf. */
enum { HFN_BITS = 24, HFN_MASK = (1 << HFN_BITS) - 1, TAG_MASK = 0x7fff };
/* Bits of an SPTE. */
enum { WRITABLE = 2, RWX = 7, LEAF = 128, ACCESSED = 1 << 8, DIRTY = 1 << 9 };

enum operation { OPERATION_OTHER, OPERATION_FAULT, OPERATION_ALLOC_ROOT, OPERATION_SPLIT, OPERATION_RECOVER,
		 OPERATION_INVALIDATE };

/* The place of an SPTE according to the tree's struct kvm_mmu_page. */
struct place {
	unsigned int level;
	u64 gfn;
};

/* A CPU of the machine, and the operation of the tree's that runs on it. */
struct shim_cpu {
	struct tree_cpu api;
	jmp_buf unwind;
	enum operation operation;
	spinlock_t *spin;           /* the spinlock that it holds, or NULL */
	void *fresh_object;         /* an object that it has allocated, without a table yet */
	unsigned int entry_rcu, entry_lock;
	unsigned int looked;        /* SPTEs since it yielded */
	unsigned int unflushed;     /* SPTEs zapped since the last flush */
	bool flushed_last;          /* no SPTE was read since the last flush, which had something to flush */
	const volatile void *last;  /* the SPTE that was read or written last */
	struct place at;            /* the place of that SPTE */
	u64 last_value;             /* the value of that SPTE, before the write if it was written */
	u64 pfn_set;                /* the pfn of kvm_set_pfn_dirty() since the last change of an SPTE; 0: none */
	const void *entry;          /* the frame of the function that Python called */
	bool in_run;                /* its last access was one to an SPTE that is not present */
	bool flush_due;             /* kvm_flush_remote_tlbs() has begun, and no interrupt was sent yet */
	u64 value;                  /* of the vCPU's field that was read last */
	unsigned int told_table;    /* the table of that SPTE, and the bits that Python has been told of in this step */
	u64 told_reads, told_writes;
};

extern __thread struct shim_cpu *here;
extern struct tree_core core;

/* The last BUG, as "file:line: expression". */
enum { BUG_TEXT = 400 };
extern char shim_last_bug[BUG_TEXT];

/* Run an operation on a CPU; the value is 0, or the error with which the operation was given up. */
#define OPERATION(cpu, kind, expression) \
	({ shim_begin(cpu, kind); \
	   here->entry = __builtin_frame_address(0); \
	   if (!_setjmp(here->unwind)) \
		   expression; \
	   shim_end(); })
void shim_begin(unsigned int cpu, enum operation kind);
int shim_end(void);
void shim_give_up(int error) __attribute__((noreturn));
struct shim_cpu *shim_cpu_of(unsigned int cpu);
int shim_attach(const struct tree_core *core, unsigned int object_size, int report_fd);
void shim_catch_crashes(int report_fd);
/* Call Python, which gives the operation up if it returns an error. */
int shim_python(unsigned int what, u64 a, u64 b, const char *text);
/* In explored.c: return whether steps are told; tell Python of one, without giving the operation up, and return its value,
 * 0 if the machine is not explored. */
bool shim_explored(void);
int shim_tell(unsigned int what, u64 a, u64 b);
/* Tell the step of an access to an SPTE that is about to happen; value: what a write will store. */
void shim_spte_step(const volatile u64 *sptep, unsigned int table, bool write, u64 value);
bool shim_needbreak_step(void);
bool spte_is_leaf(u64 spte, unsigned int level);
/* In keep.c: keep a piece of memory.  The others call it for all their memory, and return false if there is none. */
bool shim_keep(void *memory, size_t bytes);
bool shim_keep_memory(void);
bool shim_keep_objects(void);
bool glue_keep(void);
/* Return whether this memory has been kept. */
bool shim_is_kept(const void *p);
/* In plain.c: log an access of the tree's code, if it was compiled to log them; from: its return address. */
void shim_log(const volatile void *p, unsigned int bytes, bool write, bool marked, const void *from);
/* In objects.c: make the objects that were kept accessible, before their contents are put back, and no others. */
void shim_put_objects_back(void);
/* Tell an ordering point, if the machine has a hook for them. */
void shim_point(unsigned int kind, bool write);
void shim_finding(unsigned int kind, const char *file, int line, const char *function, const char *what);
/* Release mmu_lock, held for reading or writing as `how` says. */
void shim_release(unsigned int how);
/* Return whether the address lies in the machine's frames, and the frame's number. */
bool shim_in_frames(const volatile void *p, unsigned int *hfn);
/* Return whether the frame is a table of the tree's; and the shadow page of that table. */
bool shim_table_lives(unsigned int hfn);
void *shim_table_sp(unsigned int hfn);
/* In objects.c: make room for the objects; false if there is none. */
bool shim_make_objects(void);
extern spinlock_t shim_objects_lock;
bool shim_is_object(const void *p);
/* In steps.c: note a step of the tree's code. */
void shim_step(unsigned int kind, u64 gfn, u64 npages);
/* Note that an operation, which is this function, has walked a range of gfns to take rights away, and ends. */
void shim_passed(u64 start, u64 end, const void *function);
/* Make room for steps. */
void shim_make_steps(void);
/* The address at which the object is loaded. */
extern unsigned long shim_base;

/* In the unit of the tree's files, where its structures are known. */
struct place glue_place(const void *sp, unsigned int index);
/* Return a number that names a lock of the tree's, and is the same in every process. */
u64 glue_name_of(const void *lock);
/* Return the machine's number of the vCPU that has this field, and the field. */
unsigned int glue_vcpu_at(const volatile void *p, unsigned int *field);
/* Return whether this is one of the VM's statistics, which KVM counts without a lock. */
bool glue_is_statistic(const volatile void *p);
/* Return whether the exchange of these modes makes a vCPU leave guest mode. */
bool glue_exits_guest(u64 old, u64 value);
/* Return whether an interrupt with this function only makes the vCPU leave guest mode. */
bool glue_is_kick(void (*function)(void *argument));
/* Return whether the root above a table is invalid. */
bool glue_root_invalid(const void *sp);
bool glue_frozen(u64 spte);
/* Return whether KVM takes the SPTE for present; a frozen one is not. */
bool glue_present(u64 spte);
/* Return the table of the shadow page that an RCU callback will free; 0 if it is none. */
unsigned int glue_table_of(const struct rcu_head *head);

#endif
