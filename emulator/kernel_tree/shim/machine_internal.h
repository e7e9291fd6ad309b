/* Shared by the files of the shim that runs on the machine. */
#ifndef FLUSHLAB_MACHINE_INTERNAL_H
#define FLUSHLAB_MACHINE_INTERNAL_H

#include "machine.h"

#include <setjmp.h>

/* A physical address: the frame's number, and above it the tag of its life or the custody of a leaf. */
enum { HFN_BITS = 24, HFN_MASK = (1 << HFN_BITS) - 1, TAG_MASK = 0x7fff };
/* Bits of an SPTE. */
enum { WRITABLE = 2, RWX = 7, LEAF = 128 };

enum operation { OPERATION_OTHER, OPERATION_FAULT, OPERATION_ALLOC_ROOT, OPERATION_SPLIT, OPERATION_RECOVER };

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
	bool pfn_set;
	const void *entry;          /* the frame of the function that Python called */
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
/* Tell an ordering point, if the machine has a hook for them. */
void shim_point(unsigned int kind, bool write);
void shim_finding(unsigned int kind, const char *file, int line, const char *what);
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
/* In steps.c: note a step of the tree's code. */
void shim_step(unsigned int kind, u64 gfn, u64 npages);
/* The address at which the object is loaded. */
extern unsigned long shim_base;

/* In calls.c, where the tree's structures are known. */
struct place glue_place(const void *sp, unsigned int index);
/* Return whether the root above a table is invalid. */
bool glue_root_invalid(const void *sp);
bool glue_frozen(u64 spte);

#endif
