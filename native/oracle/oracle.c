/* Judging uses, and keeping reports.  See oracle.h for the definition of a violation. */
#include "oracle/oracle.h"

#include <string.h>

#include "core/counters.h"
#include "core/cpu_types.h"
#include "core/events.h"
#include "core/heap.h"
#include "core/machine_types.h"
#include "memory/custody.h"
#include "memory/frame.h"
#include "oracle/ledger.h"
#include "oracle/story.h"
#include "oracle/tracking.h"
#include "tlb/tlb.h"
#include "vm/ept12.h"
#include "vm/guest_state.h"
#include "vm/vm.h"

static bool is_write(uint32_t type)
{
	return type == ACCESS_WRITE;
}

/* An access of `type` to `page`, which the entry translates. */
struct use {
	const struct vcpu *vcpu;
	const struct tlb_entry *entry;
	uint64_t page;
	uint32_t type;
};

/* Judge by the state of the right that the entry stands for; the caller has read the frame's tag before. */
static uint32_t judge_kvm(struct machine *m, const struct use *use, struct judgement *j)
{
	const struct tlb_entry *entry = use->entry;
	uint64_t gfn = entry->gfn + (use->page - entry->page);
	uint32_t hfn = entry->hfn + (uint32_t)(use->page - entry->page), type = use->type;
	struct ledger_entry e = { .hfn = 0xffffffff };
	bool freed = frame_freed_since(m->frames, hfn, entry->custody), held;
	uint32_t missed = 0;

	if (entry->vm < m->config.vms && gfn < m->vms[entry->vm].gfns)
		ledger_copy(m, entry->vm, gfn, &e);
	j->promise = e.promise;
	j->promise_cpu = e.promise_cpu;
	j->promise_time = e.promise_time;
	j->live = e.hfn == hfn ? is_write(type) ? e.live_write : e.live_read : 0;
	held = e.hfn == hfn && !(e.revoked & (is_write(type) ? 2 : 1));

	if (is_write(type) && writes_tracked(&m->vms[entry->vm], gfn))
		missed = 1u << VIOLATION_MISSED_GUEST_WRITE;
	/* A grant made after the promise does not count if the frame has been freed since. */
	if (held && !freed) {
		if (!(is_write(type) ? e.live_write : e.live_read))
			j->verdict = VERDICT_LEGAL_STALE;
		return missed;
	}
	return missed | (held ? 0 : 1u << VIOLATION_STALE_AFTER_REVOKE) | (freed ? 1u << VIOLATION_USE_AFTER_FREE : 0);
}

static uint32_t judge_guest(struct machine *m, const struct use *use, struct judgement *j)
{
	(void)m;
	/* KVM may leave a table of the guest's unsynchronized until the guest invalidates. */
	if (use->entry->kind == KIND_LINEAR &&
	    guest_contradicts(use->vcpu, use->entry, use->page, use->type) == GUEST_AGREED)
		j->verdict = VERDICT_LEGAL_STALE;
	return guest_invalidated(use->vcpu, use->entry, use->page, use->type, false) ? 1u << VIOLATION_GUEST_STALE : 0;
}

static uint32_t judge_l1(struct machine *m, const struct use *use, struct judgement *j)
{
	enum guest_agreement ept12 = ept12_agreement(use->vcpu, use->entry, use->page, use->type);

	(void)m;
	/* KVM may leave a table of L1's EPT unsynchronized until L1 invalidates. */
	if (ept12 == GUEST_AGREED)
		j->verdict = VERDICT_LEGAL_STALE;
	return ept12 == GUEST_CONTRADICTS || guest_invalidated(use->vcpu, use->entry, use->page, use->type, true) ?
		       1u << VIOLATION_L1_STALE : 0;
}

/* Return the kinds of violation by which the use breaks the promiser's promises. */
typedef uint32_t promiser_judge(struct machine *m, const struct use *use, struct judgement *j);

static const struct {
	promiser_judge *judge;
	uint32_t kinds; /* all that it may return */
} promisers[PROMISERS] = {
	[PROMISER_KVM] = { judge_kvm, 1u << VIOLATION_STALE_AFTER_REVOKE | 1u << VIOLATION_USE_AFTER_FREE |
				      1u << VIOLATION_MISSED_GUEST_WRITE },
	[PROMISER_GUEST] = { judge_guest, 1u << VIOLATION_GUEST_STALE },
	[PROMISER_L1] = { judge_l1, 1u << VIOLATION_L1_STALE },
};

uint32_t oracle_kinds_of(enum promiser promiser)
{
	return promisers[promiser].kinds;
}

void oracle_judge(struct machine *m, const struct vcpu *vcpu, uint32_t life, const struct tlb_entry *entry,
		  uint64_t page, uint32_t type, struct judgement *j)
{
	uint32_t hfn = entry->hfn + (uint32_t)(page - entry->page);
	struct use use = { vcpu, entry, page, type };

	memset(j, 0, sizeof(*j));
	/* Before the ledger: a later change there makes this tag old (oracle.h, order). */
	j->right = (uint32_t)atomic_load_explicit(&m->frames->tag[hfn], memory_order_acquire) | life << 16;
	for (uint32_t promiser = 0; promiser < PROMISERS; promiser++)
		j->kinds |= promisers[promiser].judge(m, &use, j);
	if (entry->vm != vcpu->vm)
		j->kinds |= 1u << VIOLATION_CROSS_VM;
	if (entry->right[type] != RIGHT_NONE &&
	    !life_is(entry->kind, entry->right[type] >> 16, entry->nested, life, vcpu->guest ? vcpu->guest->vmx.nested : 0))
		j->kinds |= 1u << VIOLATION_FOREIGN_ROOT;
	if (j->kinds)
		j->verdict = VERDICT_VIOLATION;
	/* Guest-physical mappings are of the EPT alone, and one EPT may serve several guests. */
	if (entry->kind != KIND_GUEST_PHYSICAL)
		oracle_judge_guest(vcpu, entry->nested, j);
}

void oracle_judge_guest(const struct vcpu *vcpu, uint32_t nested, struct judgement *j)
{
	if (!vcpu->guest || nested_context(nested) == nested_context(vcpu->guest->vmx.nested))
		return;
	j->kinds |= 1u << VIOLATION_CROSS_GUEST;
	j->verdict = VERDICT_VIOLATION;
}

void oracle_judge_table(struct judgement *j, uint32_t kinds)
{
	memset(j, 0, sizeof(*j));
	j->verdict = VERDICT_VIOLATION;
	j->kinds = kinds;
	j->promise = PROMISE_FREE;
}

static uint32_t take_story(struct machine *m, const struct violation_report *report)
{
	uint32_t n = atomic_fetch_add_explicit(&m->oracle->stories, 1, memory_order_relaxed);

	if (n >= STORIES)
		return 0;
	m->oracle->story[n].events = 0;
	story_copy(m, report, &m->oracle->story[n]);
	return n + 1;
}

void oracle_report(struct machine *m, uint32_t cpu, const struct violation_report *report)
{
	struct oracle *o = m->oracle;
	uint32_t kind = (uint32_t)__builtin_ctz(report->kinds | 1u << VIOLATIONS);
	uint32_t n;

	if (kind >= VIOLATIONS)
		return;
	atomic_fetch_add_explicit(&o->count[kind], 1, memory_order_relaxed);
	n = atomic_fetch_add_explicit(&o->reports, 1, memory_order_relaxed);
	if (n >= REPORTS_KEPT)
		return;
	o->report[n].report = *report;
	o->report[n].report.cpu = cpu;
	o->report[n].report.time = monotonic_ns();
	/* A frequent kind must leave room for the others. */
	o->report[n].story = 0;
	if (atomic_fetch_add_explicit(&o->told[kind], 1, memory_order_relaxed) < STORIES_OF_KIND)
		o->report[n].story = take_story(m, &o->report[n].report);
	/* Release: pairs with the acquire in oracle_reports. */
	atomic_store_explicit(&o->report[n].complete, 1, memory_order_release);
}

void oracle_forget(struct machine *m)
{
	struct oracle *o = m->oracle;
	uint32_t n = atomic_exchange_explicit(&o->reports, 0, memory_order_relaxed);

	for (uint32_t i = 0; i < n && i < REPORTS_KEPT; i++)
		atomic_store_explicit(&o->report[i].complete, 0, memory_order_relaxed);
	for (uint32_t i = 0; i < VIOLATIONS; i++)
		atomic_store_explicit(&o->told[i], 0, memory_order_relaxed);
	atomic_store_explicit(&o->stories, 0, memory_order_relaxed);
	events_forget(m);
}

void oracle_violation(struct machine *m, struct cpu *cpu, const struct vcpu *vcpu,
		      const struct tlb_entry *entry, uint64_t page, uint32_t type, uint32_t walk_level,
		      uint64_t linear, const struct judgement *j)
{
	uint32_t hfn = entry->hfn + (uint32_t)(page - entry->page);
	struct violation_report r = {
		.kinds = j->kinds,
		.vm = vcpu->vm,
		.vcpu = vcpu->id,
		.access = type,
		.promise = j->promise,
		.promise_cpu = j->promise_cpu,
		.promise_time = j->promise_time,
		.hfn = hfn,
		.linear = linear,
		.gfn = entry->gfn + (page - entry->page),
		.guest_clock = vcpu->guest->clock,
		.nested = vcpu->guest->vmx.nested,
		.entry = *entry,
		.walk_level = walk_level,
		.tag_now = frame_host_tag(m->frames, hfn),
		.live = j->live,
	};

	oracle_report(m, cpu->id, &r);
}

void oracle_counts(struct machine *m, uint64_t *counts)
{
	for (uint32_t i = 0; i < VIOLATIONS; i++)
		counts[i] = atomic_load_explicit(&m->oracle->count[i], memory_order_relaxed);
}

uint32_t oracle_reports(struct machine *m, uint32_t from, struct violation_report *reports, uint32_t max)
{
	struct oracle *o = m->oracle;
	uint32_t n = 0, end = atomic_load_explicit(&o->reports, memory_order_relaxed);

	for (uint32_t i = from; i < end && i < REPORTS_KEPT && n < max; i++, n++) {
		if (!atomic_load_explicit(&o->report[i].complete, memory_order_acquire))
			break;
		reports[n] = o->report[i].report;
	}
	return n;
}

uint32_t oracle_report_events(struct machine *m, uint32_t report, struct event *events, uint32_t max)
{
	const struct oracle *o = m->oracle;
	const struct story *story;
	uint32_t n;

	if (report >= REPORTS_KEPT || !atomic_load_explicit(&o->report[report].complete, memory_order_acquire) ||
	    !o->report[report].story)
		return 0;
	story = &o->story[o->report[report].story - 1];
	n = story->events < max ? story->events : max;
	memcpy(events, story->event, n * sizeof(*events));
	return n;
}

int oracle_create(struct machine *m)
{
	m->oracle = heap_zalloc(m->heap, 1, sizeof(*m->oracle));
	return m->oracle ? 0 : MACHINE_NOMEM;
}

void oracle_destroy(struct machine *m)
{
	heap_free(m->heap, m->oracle);
	m->oracle = NULL;
}
