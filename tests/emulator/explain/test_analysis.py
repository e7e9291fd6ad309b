"""Which moments a race is made of, and the part that each of them plays."""

from __future__ import annotations

from typing import Any

import pytest

from emulator.explain.analysis import RaceAnalysis
from emulator.explain.events import Event
from emulator.explain.facts import Facts
from emulator.explain.meanings import (
    COPIED,
    EARLY,
    ELIDED,
    FILL,
    LATE,
    LOST,
    MARKED_EARLY,
    MISSED,
    NARROW,
    OUTDATED,
    PROMISE,
    REOPENED,
    REVOKE,
    SKIPPED,
    UNNAMED,
    UNNOTIFIED,
    UNPROTECTED,
    USE,
)
from tests.emulator.explain.race import (
    GFN,
    HOST,
    KVM,
    PAGE,
    ROOT,
    VCPU,
    VM,
    Race,
    analysis,
    flushed_mask,
    noisy,
)


def moments(found: RaceAnalysis) -> list[tuple[str, int, str]]:
    return [(moment.event.kind, moment.cpu, moment.meaning) for moment in found.moments]


MASK = [
    ("entry", 0, ""),
    (FILL, 0, FILL),
    ("load", 1, ""),
    ("zap", HOST, REVOKE),
    ("request", HOST, ""),
    ("ipi", HOST, ""),
    ("promise", HOST, PROMISE),
    ("flush", 1, ""),
    ("free", HOST, ""),
    ("load", 0, ""),
    ("elided", 0, ELIDED),
    ("entry", 0, ""),
    (USE, 0, USE),
]


def test_a_migration_that_does_not_flush() -> None:
    found = analysis(flushed_mask())
    assert moments(found) == MASK
    assert found.revoked_on == 1
    assert found.flushed_on() == (1,)
    assert found.culprit is not None
    assert found.culprit.event.reason == "migration"


def test_what_does_not_belong_to_it_is_left_out() -> None:
    assert moments(analysis(noisy(flushed_mask()))) == MASK


def test_the_order_of_the_events_given_does_not_matter() -> None:
    race = flushed_mask()
    facts = Facts.of_report(race.report())
    assert moments(RaceAnalysis(facts, reversed(race.events))) == MASK


def test_an_entry_that_another_vcpu_filled() -> None:
    race = Race().load(2, 0).enter(0, 100, vcpu=0).zap(HOST).request(HOST).promise(HOST)
    race.load(0, 2).elided(0).enter(0, 400)
    report = race.report()
    report["entry"]["filled_by_vcpu"] = 0
    found = RaceAnalysis(Facts.of_report(report), race.events)
    assert found.moments[1].event.a == 0
    assert ("load", 2, "") in moments(found)
    assert found.revoked_on == 2
    assert found.moment(ELIDED) is not None


def test_a_notifier_that_does_not_flush() -> None:
    race = Race().enter(0, 100).zap(HOST).elided(HOST, "remote_notifier").promise(HOST).free(HOST)
    assert moments(analysis(race)) == [
        ("entry", 0, ""),
        (FILL, 0, FILL),
        ("zap", HOST, REVOKE),
        ("elided", HOST, ELIDED),
        ("promise", HOST, PROMISE),
        ("free", HOST, ""),
        (USE, 0, USE),
    ]


def test_a_flush_after_the_promise() -> None:
    race = Race().enter(0, 100).zap(HOST).promise(HOST).request(HOST)
    found = analysis(race)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (LATE, "request")


def test_a_kick_that_nobody_waits_for() -> None:
    race = Race().enter(0, 100).zap(HOST).request(HOST).kick(HOST, 0, 3).promise(HOST)
    found = analysis(race)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (LATE, "ipi")
    answered = Race().enter(0, 100).zap(HOST).request(HOST).kick(HOST, 0, 3).leave(0, 160).promise(HOST)
    assert analysis(answered).culprit is None


def test_a_kick_of_whoever_promised_without_a_zap() -> None:
    race = Race().enter(0, 100).kick(KVM, 0).request(KVM).kick(KVM, 0).promise(KVM, "dirty_log")
    found = analysis(race, promise="dirty-log", promise_cpu=KVM, access="write")
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event) == (LATE, race.events[3])


def test_a_kick_for_something_else_is_no_flush() -> None:
    race = Race().enter(0, 100).kick(KVM, 0).elided(KVM, "remote_protect").promise(KVM, "dirty_log")
    found = analysis(race, promise="dirty-log", promise_cpu=KVM, access="write")
    assert found.culprit is not None
    assert found.culprit.meaning == ELIDED


def test_a_request_that_is_not_seen_at_vm_entry() -> None:
    race = Race().enter(0, 100).leave(0, 160).zap(HOST).request(HOST).promise(HOST).enter(0, 160)
    found = analysis(race)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (MISSED, "entry")


def test_a_request_without_an_interrupt_for_who_is_in_the_guest() -> None:
    found = analysis(Race().enter(0, 100).zap(HOST).request(HOST).promise(HOST))
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (MISSED, "request")


def test_a_mapping_of_what_was_looked_up_before_the_promise() -> None:
    race = Race().enter(0, 150).leave(0, 150, "ept_violation").promise(HOST).free(HOST)
    race.map(0).enter(0, 150)
    assert moments(analysis(race)) == [
        ("exit", 0, ""),
        ("promise", HOST, PROMISE),
        ("free", HOST, ""),
        ("map", 0, OUTDATED),
        ("entry", 0, ""),
        (FILL, 0, FILL),
        (USE, 0, USE),
    ]


def test_a_page_that_came_back_after_the_promise_is_no_such_mapping() -> None:
    race = flushed_mask()
    race.events.insert(-1, Event(race.events[-1].time - 1, "map", 1, GFN - 2, 0xB34 - 2, VM, 4))
    assert moments(analysis(race)) == MASK


def test_a_table_that_goes() -> None:
    huge = Race().enter(0, 100).add("map", 1, GFN & ~511, 0x200, 512).elided(1, "remote_replace")
    found = analysis(huge, kinds=("walk-after-free",), promise="free")
    assert [(kind, part) for kind, _, part in moments(found)] == [
        ("entry", ""),
        (FILL, FILL),
        ("map", REVOKE),
        ("elided", ELIDED),
        (USE, USE),
    ]
    zapped = Race().enter(0, 100).zap(HOST, GFN & ~511, 512).promise(HOST)
    assert [part for _, _, part in moments(analysis(zapped, kinds=("walk-after-free",))) if part] == [
        FILL,
        REVOKE,
        USE,
    ]


def test_kvms_own_walk_used_no_entry() -> None:
    race = Race().zap(HOST, GFN & ~511, 512)
    found = analysis(race, kinds=("walk-after-free",), vcpu=0xFFFFFFFF)
    assert [kind for kind, _, _ in moments(found)] == ["zap", USE]


def test_a_flush_that_is_too_narrow() -> None:
    race = Race().enter(0, 100).leave(0, 160).zap(HOST).request(HOST).promise(HOST)
    race.flush(0, "invept_single").enter(0, 160)
    found = analysis(race)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.scope) == (NARROW, "invept_single")


def test_a_promise_without_any_flush() -> None:
    found = analysis(Race().enter(0, 100).zap(HOST).promise(HOST))
    assert found.culprit is None
    assert found.moment(PROMISE) is not None


def test_what_the_guest_invalidated_elsewhere() -> None:
    race = Race().enter(0, 100).load(1, 0).enter(1, 200).add("guest_invalidate", 1, VCPU, PAGE)
    # A promise on the same page has nothing to do with it.
    race.promise(HOST).request(HOST).load(0, 1).elided(0).enter(0, 400)
    found = analysis(race, kinds=("guest-stale",))
    assert [kind for kind, _, part in moments(found) if part] == [FILL, "guest_invalidate", "elided", USE]
    assert found.moment(REVOKE) is not None
    assert found.revoked_on == 1
    assert "promise" not in [kind for kind, _, _ in moments(found)]


def test_a_root_page_that_comes_back() -> None:
    race = Race().enter(0, 100).add("root_free", KVM, ROOT).add("root_load", 0, VCPU, ROOT)
    race.elided(0, "root_load").enter(0, 300)
    found = analysis(race, kinds=("foreign-root",))
    assert [(kind, part) for kind, _, part in moments(found)][2:5] == [
        ("root_free", REVOKE),
        ("root_load", ""),
        ("elided", ELIDED),
    ]


def test_write_protection_is_a_revocation_for_who_writes() -> None:
    race = Race().enter(0, 100).add("protect", KVM, GFN, 1, 1).elided(KVM, "remote_protect")
    race.promise(KVM, "dirty_log")
    found = analysis(race, promise="dirty-log", promise_cpu=KVM, access="write")
    revoked = found.moment(REVOKE)
    assert revoked is not None
    assert revoked.event.kind == "protect"
    assert found.moment(ELIDED) is not None


def test_a_fill_that_the_ring_has_forgotten() -> None:
    race = Race().zap(HOST).elided(HOST, "remote_notifier").promise(HOST)
    assert moments(analysis(race))[0] == (FILL, 0, FILL)


def test_clocks_wrap_around() -> None:
    race = Race().enter(0, 0xFFFFFFF0).zap(HOST).promise(HOST)
    report = race.report()
    report["entry"]["clock"] = (1 << 32) + 5
    assert moments(RaceAnalysis(Facts.of_report(report), race.events))[0] == ("entry", 0, "")
    report["entry"]["clock"] = 0xFFFFFFEF
    assert moments(RaceAnalysis(Facts.of_report(report), race.events))[0] == (FILL, 0, FILL)


def test_the_clock_stands_still_while_the_guest_faults() -> None:
    """The entry was filled before the promise, though the guest's clock was the same at every entry."""
    race = Race().enter(0, 150).add("protect", KVM, GFN, 1, 1).elided(KVM, "remote_protect")
    race.promise(KVM, "dirty_log").leave(0, 150, "ept_violation").enter(0, 150)
    found = analysis(race, promise="dirty-log", promise_cpu=KVM, access="write")
    assert [part for _, _, part in moments(found) if part] == [FILL, REVOKE, ELIDED, PROMISE, USE]


def test_the_decision_behind_an_elided_flush() -> None:
    def decision(race: Race) -> str:
        found = analysis(race)
        assert found.culprit is not None
        return found.decision(found.culprit)

    before = Race().enter(0, 100).zap(HOST)
    assert decision(before.elided(HOST, "remote_notifier").promise(HOST)) == "notifier_flush"
    yielding = Race().enter(0, 100).zap(HOST).elided(HOST, "remote_notifier").add("yield", HOST, VM, 0)
    assert decision(yielding.promise(HOST)) == "zap_yield"
    assert decision(flushed_mask()) == "migration"


def test_a_report_of_something_else_than_a_use() -> None:
    race = Race().add("protect", KVM, GFN, 1, 1).elided(KVM, "remote_protect").promise(KVM, "dirty_log")
    found = analysis(race, kinds=("lost-dirty",), promise="dirty-log")
    assert [part for _, _, part in moments(found)] == [REVOKE, ELIDED, PROMISE]
    stall = analysis(Race().enter(0, 100).kick(HOST, 0), kinds=("ipi-stall",))
    assert [kind for kind, _, _ in moments(stall)] == ["entry", "ipi"]


def test_no_events_at_all() -> None:
    assert moments(RaceAnalysis(Facts(), [])) == []
    assert [kind for kind, _, _ in moments(analysis(Race()))] == [FILL, USE]


@pytest.mark.parametrize("drop", range(len(flushed_mask().events)))
def test_any_event_may_be_missing(drop: int) -> None:
    race = flushed_mask()
    del race.events[drop]
    found = moments(analysis(race))
    assert (FILL, 0, FILL) in found
    assert found[-1] == (USE, 0, USE)


def test_events_survive_json() -> None:
    for event in flushed_mask().events:
        assert Event.of_dict(event.as_dict(timed=True)) == event
        assert "time_ns" not in event.as_dict()
    unknown = Event.of_dict({"kind": "new_kind", "cpu": 1, "text": "something new"}, 4)
    assert unknown.describe() == "something new"
    assert (unknown.time, unknown.vm) == (4, 0xFFFF)
    assert Event(1, "zap", 0, GFN, 4, VM, 8).covers(GFN + 7)
    assert not Event(1, "zap", 0, GFN, 4, VM, 8).covers(GFN + 8)


# --- lost dirty bits ---------------------------------------------------------------------------------------

VMM = 6


def logged() -> Race:
    """A write is logged, its log read, and the page copied."""
    race = Race().add("log_arm", KVM, 1).enter(0, 100).leave(0, 100, "ept_violation").enter(0, 100)
    return race.add("store", 0, VCPU, GFN, 100)


def copied(race: Race) -> Race:
    return race.add("log_get", KVM, 0, 1).add("copy", KVM, GFN & ~63, 1 << GFN % 64)


def lost_part(race: Race, **report: Any) -> list[tuple[str, int, str]]:
    facts = {"kinds": ("lost-dirty",), "access": "write", "promise": "dirty-log", "guest_clock": 200}
    return [(kind, cpu, part) for kind, cpu, part in moments(analysis(race, **(facts | report))) if part]


def test_a_log_that_does_not_write_protect() -> None:
    race = copied(logged()).add("store", 0, VCPU, GFN, 200).add("log_get", VMM, 0, 0)
    assert lost_part(race) == [
        ("log_get", KVM, UNPROTECTED),
        ("copy", KVM, COPIED),
        ("store", 0, LOST),
        ("log_get", VMM, UNNAMED),
    ]


def test_logging_that_begins_without_write_protection() -> None:
    race = Race().enter(0, 100).add("log_arm", KVM, 1).add("store", 0, VCPU, GFN, 200).add("log_end", KVM, 0)
    assert lost_part(race) == [
        ("log_arm", KVM, UNPROTECTED),
        ("store", 0, LOST),
        ("log_end", KVM, UNNAMED),
    ]


def test_write_protection_before_the_mark_is_taken() -> None:
    race = logged().add("protect", KVM, GFN, 1, 1).leave(0, 150, "ept_violation").enter(0, 150)
    copied(race).add("store", 0, VCPU, GFN, 200).add("log_get", VMM, 0, 0)
    assert [part for _, _, part in lost_part(race)] == [REOPENED, COPIED, LOST, UNNAMED]


def test_a_mark_before_the_spte_is_writable() -> None:
    race = logged().leave(0, 150, "ept_violation")
    copied(race).enter(0, 150).add("store", 0, VCPU, GFN, 200).add("log_get", VMM, 0, 0)
    assert [part for _, _, part in lost_part(race)] == [MARKED_EARLY, COPIED, LOST, UNNAMED]


def test_a_log_that_does_not_flush() -> None:
    race = logged().add("protect", KVM, GFN, 1, 1).elided(KVM, "remote_protect")
    copied(race).add("store", 0, VCPU, GFN, 200).add("log_get", VMM, 0, 0)
    assert [part for _, _, part in lost_part(race)] == [ELIDED, COPIED, LOST, UNNAMED]


def test_the_first_write_after_the_copy_is_the_one_that_was_lost() -> None:
    race = copied(logged()).add("store", 0, VCPU, GFN, 160).add("store", 0, VCPU, GFN, 200)
    found = analysis(race.add("log_get", VMM, 0, 0), kinds=("lost-dirty",), guest_clock=200)
    lost = found.moment(LOST)
    assert lost is not None
    assert lost.event.more == 160


def test_a_write_that_left_no_event_is_known_by_its_clock() -> None:
    """As in a run, where guests store too often for the rings."""
    race = Race().enter(0, 100).leave(0, 150).enter(2, 150).add("log_get", KVM, 0, 1).leave(2, 260)
    race.enter(0, 260).add("log_get", KVM, 0, 0)
    found = analysis(race, kinds=("lost-dirty",), guest_clock=200)
    lost = found.moment(LOST)
    assert lost is not None
    assert (lost.cpu, lost.event.kind, lost.event.b) == (2, "store", GFN)
    unknown = analysis(race, kinds=("lost-dirty",), vcpu=0xFFFFFFFF)
    assert [(moment.event.kind, moment.meaning) for moment in unknown.moments] == [("log_get", UNNAMED)]


# --- further moments ---------------------------------------------------------------------------------------


def test_a_root_that_is_invalidated_is_drawn() -> None:
    race = Race().enter(0, 100).add("root_invalid", KVM, ROOT).add("root_invalid", KVM, ROOT + 1)
    race.zap(KVM).promise(KVM, "memslot")
    found = analysis(race, promise="memslot", promise_cpu=KVM)
    assert [moment.event.a for moment in found.moments if moment.event.kind == "root_invalid"] == [ROOT]


def test_a_kick_of_a_pcpu_beyond_the_first_64() -> None:
    race = Race().enter(70, 100).zap(HOST).request(HOST)
    race.add("ipi", HOST, 1 << 3, 2).add("ipi", HOST, 1 << 6, 2, more=1 << 16).promise(HOST)
    found = analysis(race, pcpu=70)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.targets) == (LATE, (70,))


def test_a_kick_whose_sender_waits_is_not_too_late() -> None:
    race = Race().enter(0, 100).zap(HOST).request(HOST)
    race.add("ipi", HOST, 1, 1, more=1 << 15).promise(HOST)
    assert analysis(race).moment(LATE) is None
    # A vCPU that was not in the guest answers without a VM exit.
    outside = Race().enter(0, 100).leave(0, 160).zap(HOST).request(HOST).kick(HOST, 0).promise(HOST)
    found = analysis(outside.enter(0, 160))
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (MISSED, "entry")


def test_an_spte_that_the_zap_skipped() -> None:
    race = Race().enter(0, 100).leave(0, 160).promise(HOST).flush(0).enter(0, 160)
    found = analysis(race, live_sptes=1)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (SKIPPED, "promise")
    # One that was installed after the promise says nothing of the zap.
    race.events.insert(-1, Event(race.events[-1].time - 1, "map", 1, GFN - 2, 0xB34 - 2, VM, 4))
    assert analysis(race, live_sptes=1).moment(SKIPPED) is None


def test_a_flush_before_the_zap() -> None:
    race = Race().enter(0, 100).request(HOST).leave(0, 120).flush(0).enter(0, 120).zap(HOST).promise(HOST)
    found = analysis(race)
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (EARLY, "request")
    # The promise found nothing to zap: another operation is at fault.
    race = Race().enter(0, 100).request(KVM).zap(KVM).promise(HOST)
    assert analysis(race).culprit is None
    # The request is for another page, or may be: that part of the story is lost.
    race = Race().enter(0, 100).zap(HOST, GFN + 99).request(HOST).zap(HOST).promise(HOST)
    assert analysis(race).culprit is None
    race = Race().add("lost", HOST, 70).enter(0, 100).request(HOST).zap(HOST).promise(HOST)
    assert analysis(race).culprit is None
    # A flush that was requested when the zap yielded does not cover later zaps.
    race = Race().enter(0, 100).request(HOST).add("yield", HOST, VM, 1).zap(HOST).promise(HOST)
    assert analysis(race).culprit is None


def test_a_free_that_nothing_was_promised_of() -> None:
    found = analysis(Race().enter(0, 100).free(HOST), promise="none")
    assert found.culprit is not None
    assert (found.culprit.meaning, found.culprit.event.kind) == (UNNOTIFIED, "free")
    assert analysis(Race().enter(0, 100).zap(HOST).promise(HOST).free(HOST)).moment(UNNOTIFIED) is None


def test_what_the_rings_have_lost_is_said_where_it_is_missed() -> None:
    race = Race().add("lost", 0, 500).add("lost", HOST, 70).zap(HOST).promise(HOST)
    kinds = [(moment.event.kind, moment.cpu) for moment in analysis(race).moments]
    assert ("lost", 0) in kinds, "the VM entry before the fill"
    assert ("lost", HOST) not in kinds
    whole = Race().add("lost", 0, 500).enter(0, 100).zap(HOST).promise(HOST)
    assert "lost" not in [moment.event.kind for moment in analysis(whole).moments]
    promise = Race().add("lost", HOST, 70).enter(0, 100)
    assert ("lost", HOST) in [(moment.event.kind, moment.cpu) for moment in analysis(promise).moments]
