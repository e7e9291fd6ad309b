/* Functions for Python, and the events that they tell it.  Plain declarations only: cffi reads this file. */
enum { EVENT_FLUSH, EVENT_FLUSH_RANGE, EVENT_FLUSH_SLOT, EVENT_YIELD, EVENT_LOCK, EVENT_UNLOCK, EVENT_CALL_RCU, EVENT_FREE,
       EVENT_DIRTY, EVENT_SET_PFN, EVENT_WARN, EVENT_BUG, EVENT_FREED_USE, EVENT_MISSING };
enum { MAX_EVENTS = 4096, MAX_WATCHED = 128, MAX_ROOTS = 16, MAX_POINTS = 8 };
enum { POINT_YIELD = 1, POINT_OTHER = 2 };
enum { STATE_PRESENT = 1, STATE_LEAF = 2, STATE_R = 4, STATE_W = 8, STATE_X = 16, STATE_A = 32, STATE_D = 64,
       STATE_HOST_WRITABLE = 128, STATE_MMU_WRITABLE = 256, STATE_TRACKED = 512, STATE_FROZEN = 1024,
       STATE_LEVEL = 4096, STATE_PFN = 65536 };

/* An event, in the order of the operation.  rcu: nesting of read sections; lock: 0, 1 for read, 2 for write.  state: the
 * place of the SPTEs of that moment in the array of states, or -1. */
struct shim_event {
	unsigned int kind, rcu, lock;
	int state;
	unsigned long long a, b;
	const char *text;
};

/* A moment of an operation at which another CPU acts, or the walk yields: at the first SPTE from gfn on. */
struct shim_point {
	unsigned long long gfn;
	unsigned int what;
};

/* Begin with an empty VM: two address spaces, each with a slot over [0, npages). */
void tree_start(unsigned long long npages, int ad_bits, const unsigned long long *watched, unsigned int n,
		void (*other)(void));
void tree_set_logging(int as_id, int on);
/* The largest level that may map each 2M range of a slot. */
void tree_set_levels(int as_id, const unsigned char *levels, unsigned int n);
void tree_set_points(const struct shim_point *points, unsigned int n);
/* Forget the events so far. */
void tree_clear(void);
unsigned int tree_events(const struct shim_event **events);
/* Record the SPTEs of now, and return their place. */
int tree_record(void);
const unsigned long long *tree_state(int place, unsigned int *words);
unsigned int tree_pages(void);
int tree_locks(void);

/* Operations.  as_id: address space.  A root is named by its address. */
unsigned long long tree_alloc_root(int as_id);
void tree_put_root(unsigned long long root);
int tree_map(unsigned long long root, unsigned long long gfn, unsigned long long pfn, int write, int exec, int level,
	     int map_writable);
int tree_zap_leafs(unsigned long long start, unsigned long long end, int flush);
int tree_unmap(int as_id, unsigned long long start, unsigned long long end, int may_block, int flush);
int tree_age(int as_id, unsigned long long start, unsigned long long end, int lock);
int tree_wrprot_slot(int as_id, int min_level);
int tree_write_protect_gfn(int as_id, unsigned long long gfn, int min_level);
void tree_clear_dirty(int as_id, unsigned long long gfn, unsigned long long mask);
void tree_split(int as_id, unsigned long long start, unsigned long long end, int level, int shared);
void tree_recover(int as_id);
void tree_invalidate_roots(void);
void tree_zap_invalidated_roots(int shared);
int tree_root_invalid(unsigned long long root);
/* As a processor does: set A, and D with a write.  1 if the SPTE allows it. */
int tree_touch(unsigned long long root, unsigned long long gfn, int write);
