/* Functions by which Python runs a tree's TDP MMU on the machine's threads.  Plain declarations only: cffi reads this
 * file. */
enum { CALL_FLUSH_SLOT, CALL_DIRTY, CALL_MAX_LEVEL, CALL_SCHEDULE, CALL_YIELDED, CALL_WARN,
       CALL_POINT, CALL_STEP, CALL_MORE, CALL_SHARED, CALL_TABLE, CALL_SET_PFN, CALL_RECOVER, CALL_LOCK, CALL_UNLOCK,
       CALL_NEEDBREAK, CALL_RCU_LOCK, CALL_RCU_UNLOCK, CALL_RCU_LATER, CALL_RCU_BARRIER, CALL_ALLOC, CALL_FREE,
       CALL_SPIN_LOCK, CALL_SPIN_UNLOCK, CALL_RELAX, CALL_FLUSH_DUE, CALL_FLUSH_RANGE_DUE, CALL_FLUSHED, CALL_VCPU,
       CALL_EXITING, CALL_REQUEST, CALL_CHECK, CALL_TEST, CALL_KICK };
/* The fields of a vCPU that are the machine's. */
enum { FIELD_MODE, FIELD_REQUESTS, FIELD_CPU, FIELD_NONE };
/* Words of a mask of pCPUs. */
enum { MASK_WORDS = 16 };
/* Points of an operation at which Python is called: none, the machine's ordering points, or every access to state that
 * other CPUs share, which begins a step of an explored execution. */
enum { POINTS_NONE, POINTS_DELAYS, POINTS_STEPS };
/* An explored access to an SPTE: it writes; it may grant or take a leaf's right. */
enum { ACCESS_WRITE = 1, ACCESS_LEAF = 2 };
/* SPTEs are told apart by level and gfn, as far as so many bits of a mask go. */
enum { SPTE_BITS = 16 };
enum { POINT_SPTE, POINT_SPTES, POINT_RCU, POINT_MMU_LOCK, POINT_CALL_RCU, POINT_FRAMES, POINT_ROOTS };
enum { FINDING_WARN, FINDING_MISSING, FINDING_LOCKDEP, FINDING_FREED };
enum { STEP_ZAPPED, STEP_PROTECTED, STEP_UNLINKED, STEP_FLUSHED, STEP_YIELDED, STEP_FREED, STEP_MAPPED, STEP_QUEUED,
       STEP_PASSED };
enum { MOST_NAME = 160, MOST_STEPS = 8192, MOST_PLACES = 8 };
enum { FAST_INVALID, FAST_SPURIOUS, FAST_FIXED, FAST_MADE_WRITABLE };

/* The core's functions (native/), and one of Python's.  machine: the core's machine; memory: its frame 0.  call: calls
 * Python, and returns a value, or a negative error with which the operation is given up. */
struct tree_core {
	void *machine;
	unsigned char *memory;
	unsigned int frames, cpus, vcpus;
	int (*spte_change)(void *m, unsigned int cpu, unsigned int vm, unsigned int table, unsigned int index,
			   unsigned int level, unsigned long long gfn, unsigned int step, unsigned long long *old,
			   unsigned long long value);
	void (*split_custody)(void *m, unsigned int table, unsigned long long huge_spte, unsigned int level);
	void (*set_pfn)(void *m, unsigned int cpu, unsigned int vm, unsigned long long gfn, unsigned long long spte,
			unsigned int level);
	int (*table_holds)(void *m, unsigned int cpu, unsigned int vm, unsigned long long spte, unsigned int level,
			   unsigned long long gfn);
	int (*huge_custody)(void *m, unsigned int vm, unsigned long long hva, unsigned int hfn, unsigned int tag);
	unsigned int (*frame_tag)(void *m, unsigned int hfn);
	long long (*table_alloc)(void *m, unsigned int cpu, unsigned int kind);
	void (*table_free)(void *m, unsigned int cpu, unsigned int table);
	void (*rcu_read_lock)(void *m, unsigned int cpu);
	void (*rcu_read_unlock)(void *m, unsigned int cpu);
	int (*queue_callback)(void *m, unsigned int cpu, unsigned int callback, unsigned long long argument);
	int (*rcu_barrier)(void *m, unsigned int cpu);
	int (*read_lock)(void *m, unsigned int cpu, unsigned int vm);
	int (*write_lock)(void *m, unsigned int cpu, unsigned int vm);
	void (*read_unlock)(void *m, unsigned int cpu, unsigned int vm);
	void (*write_unlock)(void *m, unsigned int cpu, unsigned int vm);
	int (*needbreak)(void *m, unsigned int vm);
	unsigned int rcu_function, root_frame, table_frame;
	int again, misuse, nomem;
	int (*call)(unsigned int cpu, unsigned int what, unsigned long long a, unsigned long long b, const char *text);
};

/* The state that an operation shares with Python.  Python alone sets `slot_*`, `chunk`, `resched` and `points`.  `lock`
 * (0, 1 for read, 2 for write) and `rcu_depth` are up to date whenever the operation calls Python. */
struct tree_cpu {
	unsigned int id, vm, lock, rcu_depth;
	unsigned int chunk;   /* one in so many SPTEs calls Python for its ordering point; not 0 */
	unsigned int resched; /* SPTEs after which another thread is due on this CPU; 0: never */
	int points;           /* POINTS_NONE, POINTS_DELAYS or POINTS_STEPS */
	int error;            /* why the operation was given up; 0 */
	int inside;           /* whether the tree's code runs */
	unsigned int slot_as_id, slot_flags;
	unsigned long long slot_base, slot_npages, slot_hva;
	unsigned int changed; /* SPTEs that it has changed */
	unsigned int frozen;  /* faults that met a frozen SPTE */
	unsigned int table, index; /* the SPTE of CALL_STEP and CALL_MORE */
	unsigned long long value; /* of the field of CALL_VCPU and CALL_EXITING */
	unsigned long long kick_mask[MASK_WORDS]; /* pCPUs, for CALL_KICK */
};

/* A step of the tree's code that a report may list.  gfn and pages: those that an SPTE maps; for a table that
 * is freed or queued to be freed, gfn is its frame; for an operation that has walked a range, the range.  time: CLOCK_MONOTONIC, in ns.  places: return addresses, innermost first, as offsets in the object;
 * 0 ends them. */
struct tree_step {
	unsigned long long time, gfn, pages;
	unsigned int cpu, vm, kind;
	long places[MOST_PLACES];
};

/* An access to memory that CPUs share, of a tree that was compiled to log them.  marked: by READ_ONCE() or WRITE_ONCE(),
 * or atomic.  returns: the return address of the call that logs it, as an offset in the object. */
struct tree_access {
	unsigned long long address;
	unsigned int bytes;
	int write, marked;
	long returns;
};

/* Keep the state of all that the tree's code can change, and put it back.  No operation may be running. */
int tree_keep(void);
void tree_put_back(void);
/* Return the accesses since the last call, and their number. */
unsigned int tree_accesses(const struct tree_access **accesses);
/* Connect the object with a machine. */
int tree_attach(const struct tree_core *core, int report_fd);
struct tree_cpu *tree_cpu(unsigned int cpu);
/* Create the tree's part of a VM.  ad_bits: EPT has accessed and dirty flags; equal for all VMs of the machine. */
int tree_vm_create(unsigned int cpu, unsigned int vm, int ad_bits);
/* Return a root's address; 0 with an error. */
unsigned long long tree_alloc_root(unsigned int cpu, int level, int as_id, int guest_mode);
int tree_put_root(unsigned int cpu, unsigned long long root);
/* Return the address of a root's role, of its reference count, and of tdp_mmu_scheduled_root_to_zap; and the mask of
 * role.invalid in the role. */
const unsigned int *tree_root_role(unsigned long long root);
const int *tree_root_count(unsigned long long root);
const unsigned char *tree_root_scheduled(unsigned long long root);
unsigned int tree_role_invalid(void);
/* Fill the last steps, oldest first, and return their number. */
unsigned int tree_steps(struct tree_step *steps, unsigned int most);
/* Return the function that the core has to call for RCU_FUNCTION. */
void *shim_rcu_function(void);
/* Fill in the addresses of the roots on the VM's list, and return their number.  The caller holds mmu_lock, or no other
 * thread runs. */
unsigned int tree_roots(unsigned int vm, unsigned long long *roots, unsigned int most);
int tree_map(unsigned int cpu, unsigned long long root, unsigned long long gfn, unsigned long long pfn, int write, int exec,
	     int level, int max_level, int map_writable, int prefetch);
/* Map the neighbours of a fault: n gfns from `gfn` on, without those that have hfn 0xffffffff. */
int tree_map_around(unsigned int cpu, unsigned long long root, unsigned long long gfn, unsigned int n,
		    const unsigned int *hfns, const unsigned int *tags, const unsigned int *writable);
int tree_fast_fault(unsigned int cpu, unsigned long long root, unsigned long long gfn, int write, int exec);
int tree_zap_leafs(unsigned int cpu, unsigned long long start, unsigned long long end, int flush);
int tree_unmap(unsigned int cpu, unsigned long long start, unsigned long long end, int may_block, int flush);
int tree_age(unsigned int cpu, unsigned long long start, unsigned long long end);
int tree_zap_all(unsigned int cpu);
/* Say which vCPUs the VM has, by the machine's numbers.  No operation of the VM's may be running.  0, or an error. */
int tree_set_vcpus(unsigned int vm, const unsigned int *numbers, unsigned int n);
/* Return whether a pCPU was interrupted, or a negative error. */
int tree_make_all_cpus_request(unsigned int cpu, unsigned int request);
int tree_flush_remote_tlbs(unsigned int cpu);
/* Return how often remote_tlb_flush has counted since the last call. */
unsigned long long tree_take_flushes(unsigned int vm);
int tree_invalidate_roots(unsigned int cpu);
int tree_zap_invalidated_roots(unsigned int cpu, int shared);
int tree_uninit(unsigned int cpu);
int tree_wrprot_slot(unsigned int cpu, int min_level);
int tree_write_protect_gfn(unsigned int cpu, unsigned long long gfn, int min_level);
int tree_clear_dirty(unsigned int cpu, unsigned long long gfn, unsigned long long mask);
int tree_split(unsigned int cpu, unsigned long long start, unsigned long long end, int level, int shared);
int tree_recover(unsigned int cpu);
