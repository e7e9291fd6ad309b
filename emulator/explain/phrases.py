"""Moments in the kernel's words."""

from __future__ import annotations

from collections.abc import Callable

from emulator.explain.events import WHOLE, Event, name_of, pages_text
from emulator.explain.facts import Facts
from emulator.explain.lost import copies
from emulator.explain.meanings import FILL, USE
from emulator.explain.moments import Moment
from emulator.machine.runtime import HPAGE_PMD_NR
from native import EXIT_REASONS


def phrases(moment: Moment, facts: Facts) -> list[str]:
    """Return a moment in the kernel's words: one line, or two of which the second one is a detail."""
    e = moment.event
    words = _PHRASES.get(e.kind)
    return words(e, facts) if words else [e.describe()]


_SCOPES = {
    "invept_global": "INVEPT global",
    "invept_single": "INVEPT single",
    "invvpid_single": "INVVPID single",
    "invvpid_all": "INVVPID all",
    "invvpid_address": "INVVPID address",
    "hv_space": "Hyper-V flushes",
    "hv_list": "Hyper-V flushes a range",
}

_PROMISERS = {
    "notifier": "invalidate_range_start()",
    "notifier_write": "invalidate_range_start()",
    "memslot": "kvm_set_memslot()",
    "zap_range": "kvm_zap_gfn_range()",
    "dirty_log": "kvm_get_dirty_log()",
}


def _flush(e: Event, facts: Facts) -> list[str]:
    target = {
        "invept_single": " root {:#x}",
        "invvpid_single": " VPID {}",
        "invvpid_address": " page {:#x}",
        "hv_space": " root {:#x}",
        "hv_list": " from gfn {:#x}",
    }
    return [_SCOPES.get(e.scope, e.scope) + target.get(e.scope, "").format(e.b)]


def _ipi(e: Event, facts: Facts) -> list[str]:
    to = f"CPU{e.targets[0]}" if e.b == 1 and e.targets else f"{e.b} CPUs"
    what = {"ack_kick": "kick", "vmcs_clear": "VMCLEAR"}.get(e.function, e.function.replace("_", " "))
    return [f"{what}: IPI to {to}"]


def _fill(e: Event, facts: Facts) -> list[str]:
    what = "walk cache is filled" if facts.about_table else "TLB entry is filled"
    return [f"v{e.a} uses gfn {facts.gfn:#x}", what]


def _use(e: Event, facts: Facts) -> list[str]:
    who = "KVM" if facts.by_kvm else f"v{facts.vcpu}"
    if facts.marks_page:
        return [f"KVM zaps gfn {facts.gfn:#x}", "and marks its page"]
    if facts.about_table:
        return [f"{who} walks, gfn {facts.gfn:#x}", "through the freed table"]
    what = f"walk {facts.verb()}" if facts.walk_level else facts.verb()
    return [f"{who} {what} gfn {facts.gfn:#x}", "by the stale entry"]


def _map(e: Event, facts: Facts) -> list[str]:
    if e.more >= HPAGE_PMD_NR:
        return [f"map huge gfn {e.a:#x}", f"to frame {e.b:#x}"]
    gfn = facts.gfn if e.covers(facts.gfn) else e.a
    return [f"map gfn {gfn:#x}", f"to frame {e.b + gfn - e.a:#x}"]


def _guest_invalidate(e: Event, facts: Facts) -> list[str]:
    return [f"v{e.a}: all its pages" if e.b == WHOLE else f"v{e.a}: page {e.b:#x}", "the guest invalidates"]


_PHRASES: dict[str, Callable[[Event, Facts], list[str]]] = {
    FILL: _fill,
    USE: _use,
    "entry": lambda e, f: [f"vcpu_enter_guest(v{e.a})", *([f"to L2, guest {e.nested}"] if e.nested else ())],
    "exit": lambda e, f: [f"VM exit ({name_of(EXIT_REASONS, e.b).replace('_', ' ')})"],
    "load": lambda e, f: [f"vmx_vcpu_load_vmcs(v{e.a})"],
    "flush": _flush,
    "vmfail": lambda e, f: [f"{_SCOPES.get(e.scope, e.scope)} of {e.b:#x}", "fails (VMfail)"],
    "elided": lambda e, f: [f"flush for {e.reason}", "ELIDED"],
    "zap": lambda e, f: [f"zap gfn {f.gfn if e.covers(f.gfn) else e.a:#x}"],
    "protect": lambda e, f: [f"write-protect gfn {f.gfn if e.covers(f.gfn) else e.a:#x}"],
    "map": _map,
    "request": lambda e, f: [f"{e.request} to v{e.a}"],
    "ipi": _ipi,
    "hypercall": lambda e, f: ["hypercall: flush", f"root {e.a:#x}" + (f" gfn {e.b:#x}" if e.more else "")],
    "promise": lambda e, f: [_PROMISERS.get(e.promise, e.promise), "returns"],
    "free": lambda e, f: [f"frame {e.a:#x} is freed"],
    "root_load": lambda e, f: [f"kvm_mmu_load(v{e.a})", f"root {e.b:#x}"],
    "root_free": lambda e, f: [f"root {e.a:#x} is freed"],
    "guest_invalidate": _guest_invalidate,
    "speculate": lambda e, f: [f"speculative fill of page {e.b:#x}", "no access asked for it"],
    "evict": lambda e, f: [e.describe()],
    "operation": lambda e, f: e.said.split("\n"),
    "step": lambda e, f: e.said.split("\n"),
    "waits": lambda e, f: (
        [*(part + ")" * (i == 0) for i, part in enumerate(e.said.split("): ", 1)))]
        if "): " in e.said
        else [e.said]
    ),
    "root_invalid": lambda e, f: [f"root {e.a:#x} is invalid"],
    "lost": lambda e, f: ["earlier events", "are not known"],
    "unload": lambda e, f: [f"VMCLEAR v{e.a}"],
    "yield": lambda e, f: ["yields mmu_lock", "flushed" if e.b else "not flushed"],
    "store": lambda e, f: [f"v{e.a} writes gfn {e.b:#x}"],
    "log_arm": lambda e, f: ["dirty logging begins", "all memory is copied"],
    "log_get": lambda e, f: ["KVM_GET_DIRTY_LOG", f"names {pages_text(e.b)}"],
    "log_clear": lambda e, f: ["KVM_CLEAR_DIRTY_LOG", f"of {pages_text(e.b.bit_count())}"],
    "log_end": lambda e, f: ["dirty logging ends"],
    "copy": lambda e, f: [f"copies gfn {f.gfn:#x}" if copies(e, f.gfn) else e.describe()],
}
