/* The state of a vCPU's guest: registers, and the records of its OS.  Owned by the thread of the pCPU on which the
 * vCPU is loaded; handed over with the vCPU. */
#ifndef FLUSHLAB_GUEST_STATE_H
#define FLUSHLAB_GUEST_STATE_H

#include "core/machine_types.h"
#include "tlb/tlb.h"

struct ept12s;
struct hypervisor;
struct program;

/* api */
struct guest_config {
	uint64_t first_gfn;      /* guest-physical memory that this vCPU's OS hands out */
	uint64_t end_gfn;
	uint32_t stride;         /* vCPUs of a VM that share the range page by page (2 MiB block by block) */
	uint32_t phase;          /* this vCPU has every stride-th, from phase on; stride 0: all of it */
	uint64_t mmio_gfn;       /* 0: none; else gfns of a second memslot that the OS maps, too */
	uint64_t mmio_end_gfn;
	uint32_t switch_every;   /* accesses between context switches; 0: never */
	uint32_t unmap_every;    /* accesses between unmapping one page; 0: never */
	uint32_t protect_every;  /* accesses between write-protecting one page; 0: never */
	uint32_t table_every;    /* if it gathers changes (batch): accesses between freeing one table; 0: never */
	uint32_t hugepages;      /* map anonymous regions with 2 MiB guest pages where they fit */
	uint32_t pcid;           /* CR4.PCIDE */
	uint32_t paging;         /* 0: CR0.PG = 0, addresses are guest-physical */
	uint32_t halt_every;     /* accesses between HLTs; 0: never */
	uint32_t halt_us;        /* 0: HLT exits (kvm_vcpu_block); else it does not exit, and a timer ends it
				  * after this time */
	uint32_t wp_every;       /* without EPT: accesses between two pairs of MOV to CR0 that clear and set CR0.WP, as
				  * an OS does to write to its read-only pages; 0: never */
	/* As wp_every: CR0.PG cleared, then set (without CR4.PCIDE); CR4.SMEP set, then cleared; CR4.PCIDE cleared, then
	 * set, in CR3 without a PCID. */
	uint32_t pg_every;
	uint32_t smep_every;
	uint32_t pcide_every;
	uint32_t window_work;    /* the OS uses these windows: see guest_roles.c.  Without `batch` only */
	uint32_t share_blocks;   /* it maps 2 MiB of memory more than once, in one process or several.  Needs `hugepages` */
	uint32_t batch;          /* without EPT: mappings that the OS changes at most before it invalidates them together;
				  * 0: it invalidates each at once */
	uint32_t interrupts_off; /* of a batch: the most accesses for which a vCPU keeps interrupts off when another
				  * vCPU's IPI asks it to invalidate; mostly it is a few */
	uint32_t own_kernel;     /* of a batch: each process has its own tables for the kernel's pages, as with KPTI */
	uint32_t file_pages;     /* of a batch: the processes' pages are filled by a device, so that the OS touches none itself */
	uint32_t transition_every; /* of a nested guest: accesses between its exits to L1; of an L1 that is a hypervisor
				    * (guest_hypervisor.h): accesses with which it handles one; 0: never */
	uint32_t tick_every;     /* of a nested guest: accesses between exits that KVM handles itself; 0: never */
	uint32_t seed;
};

enum exit_reason {
	EXIT_INTERRUPT,      /* external interrupt: calls were run and acknowledged */
	EXIT_EPT_VIOLATION,  /* gpa, linear, access, present rights */
	EXIT_EPT_MISCONFIG,  /* an SPTE that hardware cannot use */
	EXIT_HLT,
	EXIT_PREEMPTION_TIMER, /* the slice is used up */
	EXIT_MESSAGE,        /* attention other than an IPI: message, resched, stop */
	EXIT_TRIPLE_FAULT,   /* the guest OS cannot go on: out of memory, or its tables are garbage */
	EXIT_INSTRUCTION,    /* guest_insn.h: access is the instruction, linear its operand */
	EXIT_PROGRAM,        /* program.h: GUEST_OP_EXIT, linear its value */
	EXIT_PROGRAM_END,    /* the program has no operation left */
	EXIT_EXCEPTION,      /* without EPT, a page fault that KVM intercepts: linear (canonical), access, error_code */
	EXIT_APIC_ACCESS,    /* an access to the APIC-access page: linear, gpa, access */
	EXIT_REASONS
};

struct vcpu_exit {
	uint32_t reason;
	uint32_t access;     /* access_type of an EPT violation */
	uint64_t gpa;
	uint64_t linear;
	uint32_t rights;     /* R/W/X of the SPTE met */
	uint32_t attention;  /* attention bits at exit */
	uint64_t accesses;   /* guest accesses done since entry */
	uint32_t error_code; /* of a page fault: enum pferr */
	uint32_t invpcid_type; /* of INVPCID and of INVVPID; the field of VMWRITE (guest_insn.h) */
	uint64_t invpcid_pcid; /* of INVPCID; the VPID of INVVPID */
};

/* The paging modes of a guest with CR0.PG (SDM vol. 3A, 4.1.1). */
enum guest_tables {
	GUEST_TABLES_64,     /* 4-level paging */
	GUEST_TABLES_PAE,    /* three levels, of which the highest is in registers */
	GUEST_TABLES_32,     /* 32-bit paging: two levels, entries of 4 bytes */
	GUEST_TABLES_32_PSE, /* and pages of 4 MiB */
};

/* The error code of a page fault (SDM vol. 3A, 4.7). */
enum pferr {
	PFERR_PRESENT = 1,
	PFERR_WRITE = 2,
	PFERR_USER = 4,
	PFERR_RSVD = 8,
	PFERR_FETCH = 16,
};
/* end api */

enum {
	GUEST_PROCESSES = 16,
	GUEST_KERNEL_PAGES = 8,
	GUEST_LEVELS = 4,
	GUEST_PDPTES = 4,
	GUEST_BATCH = 64,
};

/* SDM vol. 3A, 4.5.4: entries of 4-level paging. */
#define GPTE_PRESENT UINT64_C(1)
#define GPTE_WRITABLE UINT64_C(2)
#define GPTE_USER UINT64_C(4)
#define GPTE_ACCESSED UINT64_C(0x20)
#define GPTE_DIRTY UINT64_C(0x40)
#define GPTE_PAGE_SIZE UINT64_C(0x80)
#define GPTE_GLOBAL UINT64_C(0x100)
#define GPTE_ADDRESS UINT64_C(0x000ffffffffff000)
/* SDM vol. 3A, 4.3: bits 16:13 of an entry for 4 MiB are bits 35:32 of its address. */
#define GPTE32_PSE36 UINT64_C(0x1e000)

#define GUEST_PAGE_MASK ((UINT64_C(1) << 36) - 1)
#define GUEST_KERNEL_BASE UINT64_C(0x800000000) /* page number of 0xffff800000000000, 36 bits */
#define GUEST_NO_GFN UINT64_C(0xffffffff)
/* Without EPT the OS reaches its tables through a map of all guest memory, by 1 GiB pages behind the kernel's own. */
#define GUEST_DIRECT_BASE (GUEST_KERNEL_BASE + (1 << 18))

struct guest_mapping {
	uint32_t gfn;         /* GUEST_NO_GFN: not mapped */
	bool writable;
	bool huge;            /* part of a 2 MiB guest page */
};

/* The OS's record of one page of a process.  Threads of the process read it on other vCPUs. */
struct guest_page {
	_Atomic uint64_t mapping; /* struct guest_mapping in one word */
	uint64_t changed;     /* clock of the last invalidated change of any kind */
	uint64_t protected_;  /* clock of the last invalidated loss of write access */
	uint8_t l1_changed;   /* in a nested guest: the last invalidations of the two kinds were L1's */
	uint8_t l1_protected;
};

struct guest_process {
	const uint64_t *records;
	uint64_t record_count;
	uint64_t position;
	const uint64_t *pages; /* sorted page numbers */
	uint64_t page_count;
	struct guest_page *page;
	uint64_t hand;         /* where the search for the next page to unmap begins */
	uint64_t cr3_gfn;      /* GUEST_NO_GFN until set up */
	uint64_t cr3_building; /* without EPT: a PML4 table that is not complete yet, or GUEST_NO_GFN */
	uint64_t pdpt_building; /* ... and the table for its kernel's part, if it has its own */
	uint16_t pcid;
	/* Without EPT: index + 1 in `pages` of each page, by hash, 0: none; NULL: pages are searched for. */
	uint32_t *place;
	uint32_t place_bits;
};

/* A change of a program's that it has not invalidated yet: its old translation may be used. */
struct guest_change {
	uint64_t page;
	uint32_t process;
	uint32_t gfn;    /* the frame behind it before */
	bool all;        /* the mapping changed; else write access was removed */
	bool huge;       /* page and gfn are the first of a 2 MiB page */
	bool table;      /* gfn is the table of 2 MiB from `page` on, which the OS has unlinked */
	bool global;
};

/* An event that the OS is in the middle of; each step can be repeated from its start. */
enum guest_event { GUEST_SWITCH, GUEST_UNMAP, GUEST_PROTECT, GUEST_TABLE, GUEST_WP, GUEST_PG, GUEST_SMEP, GUEST_PCIDE,
		   GUEST_HALT, GUEST_TRANSITION, GUEST_TICK, GUEST_EVENTS,
		   GUEST_ROLES_FIRST = GUEST_WP, GUEST_ROLES_LAST = GUEST_PCIDE };

/* The step that an OS that boots after a reset still has to do before it runs its processes. */
enum guest_boot_step {
	GUEST_BOOT_DONE,
	GUEST_BOOT_CR4,
	GUEST_BOOT_EFER,
	GUEST_BOOT_CR0,
	GUEST_BOOT_PCIDE,
	/* without EPT, where MOV to CR3 exits, too */
	GUEST_BOOT_CR3,
	GUEST_BOOT_PCID,
};

/* A store of one word, for KVM to emulate. */
struct guest_store {
	uint64_t linear;
	uint64_t value;
	bool faulted; /* it is a store that the last exit is about */
	bool done;    /* KVM has emulated it: the guest goes on behind it */
};

struct guest_fault {
	uint64_t linear;
	uint32_t error_code;
	bool pending;
};

/* Without EPT: an instruction that exits, so that the guest's action is repeated behind it.  KVM has emulated it then. */
struct guest_exit_insn {
	uint32_t insn;      /* enum guest_insn */
	uint32_t type;      /* of INVPCID */
	uint64_t operand;
	uint64_t pcid;      /* of INVPCID */
	uint64_t clock;     /* at the exit: the action is repeated before the next access */
	bool exited;
};

/* Without EPT: the choices of an action of the OS that a VM exit has interrupted.  The repeated action keeps them, as
 * KVM may have emulated its stores. */
struct guest_choices {
	uint64_t table;            /* a zeroed page for a table that may not be linked yet, or GUEST_NO_GFN */
	struct guest_mapping mapping; /* of a page fault, if `mapped` */
	uint64_t mapped_page;
	uint64_t reclaimed;        /* index of the page being reclaimed, if `reclaiming` */
	uint64_t cr3;              /* operand of the MOV to CR3 of a switch under way; 0: none */
	uint32_t reclaimed_from;   /* process */
	bool mapped, reclaiming;
	bool invpcid_all;          /* due after a switch */
	bool sets_pge;             /* due after CR4.PGE was cleared */
	enum guest_event window;   /* of a role (guest_roles.h), and the number of its next write; 0: there is none */
	uint32_t window_step;
	bool window_worked;        /* the OS has done what it opened the window for */
	bool switching;            /* to process `next` */
	uint32_t next;
	bool changing;             /* the entry of the batch's last change is being written */
};

/* Without EPT: changes that the OS has made and not yet invalidated, as Linux's mmu_gather.  The vCPU that is in the OS
 * appends to it; all vCPUs that run the OS read it. */
struct guest_batch {
	struct guest_change change[GUEST_BATCH];
	_Atomic uint32_t changes;
	_Atomic uint32_t written; /* of which the entries are, too */
	uint32_t most;           /* changes after which it is invalidated */
	_Atomic uint32_t number; /* of this batch, from 1 on */
	_Atomic uint32_t flush;  /* number of the last batch that the vCPUs have been asked to invalidate */
	_Atomic uint32_t left;   /* vCPUs that have not yet */
	uint32_t asked_by;       /* the vCPU that has asked; released by `flush` */
};

/* How a vCPU invalidates a batch. */
enum guest_flush_kind {
	GUEST_FLUSH_EACH,     /* INVLPG, or INVPCID of one address, for each page */
	GUEST_FLUSH_CONTEXTS, /* MOV to CR3 for the current process, INVPCID of one PCID for others */
	GUEST_FLUSH_LATER,    /* the same, but of other processes when it switches to them */
	GUEST_FLUSH_ALL,      /* INVPCID of all PCIDs, with global translations */
	GUEST_FLUSH_RETAIN,   /* INVPCID of all PCIDs, without global translations */
	GUEST_FLUSH_PGE,      /* CR4.PGE is cleared, then set */
};

struct guest_flush {
	uint32_t noticed;    /* number of the batch that the OS has been asked to invalidate... */
	uint64_t at;         /* ... and the clock at which it does */
	enum guest_flush_kind kind;
	bool under_way;
	uint32_t next;       /* change, or instruction, that comes next */
	uint32_t flushed;    /* processes with PCIDs that have been invalidated, by bits */
	uint64_t cr3;        /* 0, or the operand of a MOV to CR3 that KVM has emulated by the next step */
};

/* What VMX knows of a nested guest, or of L1: see guest_nested.h. */
struct guest_vmx {
	uint16_t nested;  /* tlb_entry.nested of the mappings that this guest fills; L1: 0 */
	uint16_t vpid12;  /* of a nested guest: the VPID that L1 has given it; 0: none */
	uint32_t current; /* of L1: the nested guest of the current VMCS; 0: none */
	uint32_t ept12;   /* of a nested guest: the number of L1's EPT for it (ept12.h); 0: none */
	bool ept12_ad;    /* its EPTP enables accessed and dirty flags */
	struct hypervisor *hypervisor; /* of L1: its hypervisor (guest_hypervisor.h); NULL: it has a program, or no nested guests */
	struct ept12s *ept12s; /* L1's EPTs; a nested guest that has run has the pointer, too; NULL: there is none */
};

struct guest {
	struct guest_config config;
	struct guest_vmx vmx;
	/* The guest of the vCPU that this OS belongs to: its memory, tables, records and batch.  Itself, unless this vCPU runs
	 * threads of the processes of another one. */
	struct guest *leader;
	uint32_t vcpus;              /* leader: that run its OS */
	_Atomic uint32_t os_lock;    /* leader: number + 1 of the vCPU that is in the OS; 0: none */
	struct guest_batch batch;    /* leader */
	uint32_t settled;            /* number of the last batch that this vCPU has invalidated */
	uint32_t covered_batch;      /* ... and of the batch that it has invalidated in part, as `covered` says */
	uint64_t covered;            /* by bits */
	uint32_t stale;              /* processes that a switch to them has to flush, by bits */
	struct guest_flush flush;
	/* CR3: the current process's PML4 table, GUEST_NO_GFN until it has one, and PCID */
	uint64_t cr3_gfn;
	uint16_t pcid;
	uint32_t tables;       /* enum guest_tables */
	bool wp_clear;         /* CR0.WP */
	uint64_t pdpte[GUEST_PDPTES];
	struct guest_process process[GUEST_PROCESSES];
	uint32_t processes;
	uint32_t current;
	uint64_t clock;        /* guest_clock(); only grows */
	uint64_t due[GUEST_EVENTS]; /* clock at which the event is due; UINT64_MAX: never */
	uint64_t random;
	bool paged;            /* the OS is one that enables paging */
	enum guest_boot_step boot;
	uint64_t halted_until; /* monotonic ns: activity state HLT, without an exit, until then; 0: active */
	/* guest-physical memory of this OS: stacks of free gfns, last in first out, and users of each page */
	uint32_t *free_gfn;
	uint64_t free_count;
	uint32_t *free_block;  /* first gfns of free 2 MiB blocks */
	uint64_t free_blocks;
	uint32_t *free_mmio;   /* of the second slot */
	uint64_t free_mmio_count;
	uint16_t *users;       /* by gfn - first_gfn */
	uint16_t *mmio_users;
	/* kernel */
	uint64_t kernel_pdpt;  /* gfn of the table shared by all processes, unless each has its own */
	struct guest_page kernel[GUEST_KERNEL_PAGES];
	uint32_t kernel_next;
	/* An instruction that exits (guest_insn.h), and SMM */
	_Atomic uint32_t insn;
	uint64_t insn_operand; /* released by insn */
	/* With EPT: the operand of a MOV to CR3 that the guest is executing, if `moves_to_cr3`. */
	uint64_t new_cr3;
	bool moves_to_cr3;
	struct guest_process smi_handler;
	uint32_t smm;
	uint32_t paging_outside_smm;
	struct guest_fault injected_outside_smm;
	/* MMIO: an EPT violation at this gpa page counts as emulated by user space */
	uint64_t skip_gfn;
	uint64_t last_violation;
	struct guest_store store;     /* without EPT: the store that faulted last */
	struct guest_fault injected;  /* without EPT: a page fault that KVM has injected */
	struct guest_exit_insn exit_insn;
	struct guest_choices choices;
	/* Without EPT: a number for the address space in use, which tells old translations from new ones where no PCID
	 * does. */
	uint8_t space;
	/* Changes of a program's, with room for one by each operation that it still has to do. */
	struct guest_change *change;
	uint32_t changes;
	struct program *program; /* instead of processes' traces (program.h); NULL: none */
};

/* Acquire: pairs with the release in guest_page_map.  The vCPU that finds a mapping finds the change that replaced the one
 * before in the batch (guest_batch.h). */
static inline struct guest_mapping guest_mapping_of(const struct guest_page *gp)
{
	uint64_t word = atomic_load_explicit(&gp->mapping, memory_order_acquire);

	return (struct guest_mapping){ (uint32_t)word, word >> 32 & 1, word >> 33 & 1 };
}

static inline void guest_page_map(struct guest_page *gp, struct guest_mapping to)
{
	uint64_t word = to.gfn | (uint64_t)to.writable << 32 | (uint64_t)to.huge << 33;

	atomic_store_explicit(&gp->mapping, word, memory_order_release);
}

static inline bool guest_page_mapped(const struct guest_page *gp)
{
	return guest_mapping_of(gp).gfn != (uint32_t)GUEST_NO_GFN;
}

static inline void guest_page_unmap(struct guest_page *gp)
{
	guest_page_map(gp, (struct guest_mapping){ .gfn = (uint32_t)GUEST_NO_GFN });
}

static inline void guest_page_protect(struct guest_page *gp)
{
	struct guest_mapping to = guest_mapping_of(gp);

	to.writable = false;
	guest_page_map(gp, to);
}

static inline uint32_t guest_place_of(const struct guest_process *p, uint64_t page)
{
	return (uint32_t)(page * UINT64_C(0x9e3779b97f4a7c15) >> (64 - p->place_bits));
}

/* Return the OS's record of a process's page, or NULL. */
struct guest_page *guest_page_find(const struct guest *g, uint32_t process, uint64_t page);
/* guest_page_find() for the current process's page, by its place if that is known. */
const struct guest_page *guest_page_place(const struct guest *g, uint64_t page);
/* Return whether the guest changed the entry's mapping and invalidated it on this vCPU after the entry was
 * filled, and has not restored that right since: GUEST_STALE.  by_l1: it is a nested guest, and the invalidation was
 * L1's: L1_STALE. */
bool guest_invalidated(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page, uint32_t type, bool by_l1);

/* Whether a linear mapping is one that the guest's tables permit. */
enum guest_agreement {
	GUEST_AGREES,
	GUEST_AGREED,      /* before a change that the guest has not invalidated yet */
	GUEST_CONTRADICTS,
};
enum guest_agreement guest_contradicts(const struct vcpu *vcpu, const struct tlb_entry *entry, uint64_t page,
				       uint32_t type);

/* Bits 63 to 48 of a linear address repeat bit 47; the guest's own structures omit them. */
static inline uint64_t canonical_address(uint64_t linear)
{
	return (uint64_t)((int64_t)(linear << 16) >> 16);
}

/* api */
/* tlb_entry.nested: the number of a nested guest, its vCPU (8 bits of it) and the VPID that L1 has given it; L1: 0. */
enum { NESTED_NUMBER_SHIFT = 14, NESTED_VCPU_SHIFT = 6, NESTED_VPIDS = 1 << 6 };
/* end api */

static inline uint16_t nested_of(uint32_t number, uint32_t vcpu, uint32_t vpid12)
{
	return (uint16_t)(number ? number << NESTED_NUMBER_SHIFT | (vcpu & 0xff) << NESTED_VCPU_SHIFT | vpid12 : 0);
}

/* Return a number for the linear and combined mappings that a guest may use: nested guests of a vCPU to which L1 has
 * given one VPID share them, and no others. */
static inline uint32_t nested_context(uint32_t nested)
{
	return nested & (NESTED_VPIDS - 1) ? nested & ((1u << NESTED_NUMBER_SHIFT) - 1) : nested;
}

/* The life of a mapping of EPT: that of the root page, which has 15 bits, with the nested guest that filled it mixed in, so
 * that a mapping of another guest's fails the fast check and the oracle is asked. */
static inline uint32_t nested_life(uint32_t nested)
{
	uint32_t vpid = nested & (NESTED_VPIDS - 1), number = nested >> NESTED_NUMBER_SHIFT;
	uint32_t guest = vpid ? vpid : number << NESTED_VCPU_SHIFT, vcpu = nested >> NESTED_VCPU_SHIFT & 0xf;

	return nested ? 0x8000 | guest << 7 | vcpu << 3 : 0;
}

/* The life (tlb.h, right) of linear mappings: the owner of the VPID, and the address space.  Those of nested guests that
 * share no mappings begin far from each other, so that a mapping of another guest's fails the fast check. */
static inline uint32_t linear_life(uint32_t owner, const struct guest *g)
{
	uint32_t vpid = g->vmx.nested & (NESTED_VPIDS - 1), number = g->vmx.nested >> NESTED_NUMBER_SHIFT;
	uint32_t context = vpid ? NESTED_VPIDS | vpid : number;

	return owner << 8 | ((g->space ^ context * 0x9d) & 0xff);
}

/* Return whether two lives of mappings of a kind are of one owner: of the root page, or without EPT of the VPID.
 * nested, other_nested: the guests that filled the mappings. */
static inline bool life_is(uint32_t kind, uint32_t life, uint32_t nested, uint32_t other, uint32_t other_nested)
{
	if (nested == other_nested && life == other)
		return true;
	return kind == KIND_LINEAR ? life >> 8 == other >> 8 :
				     (life ^ nested_life(nested)) == (other ^ nested_life(other_nested));
}

/* Express the rights of a mapping of EPT that another guest has filled in terms of the guest `nested`. */
static inline void entry_adopt(struct tlb_entry *entry, uint32_t nested)
{
	for (uint32_t type = 0; type < ACCESS_TYPES; type++)
		if (entry->right[type] != RIGHT_NONE)
			entry->right[type] ^= (nested_life(entry->nested) ^ nested_life(nested)) << 16;
	entry->nested = (uint16_t)nested;
}

#endif
