"""A case in words: the columns, rows and legend that all formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from emulator.explain.course import Course
from emulator.explain.dangers import DANGERS
from emulator.explain.document import Case
from emulator.explain.facts import DEADLOCK, INCONSISTENT, LEAK
from emulator.explain.meanings import (
    COPIED,
    EARLY,
    ELIDED,
    FILL,
    FORBIDDEN,
    LATE,
    LOST,
    MARKED_EARLY,
    MISSED,
    NARROW,
    OUTDATED,
    PROMISE,
    REFUSED,
    REOPENED,
    REVOKE,
    SKIPPED,
    UNNAMED,
    UNNOTIFIED,
    UNPROTECTED,
    USE,
)
from emulator.explain.moments import Moment
from emulator.explain.phrases import phrases


@dataclass(frozen=True, slots=True)
class Row:
    """One moment.  `mark` is the number of its explanation in the legend; 0 if it has none.  `step` is the
    number of its step; None outside of a course."""

    cpu: int
    lines: tuple[str, ...]
    meaning: str
    mark: int
    moment: Moment
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """One line of the legend."""

    mark: int
    meaning: str
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    case: Case
    title: str
    columns: tuple[int, ...]
    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    opening: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()

    def labels(self) -> list[str]:
        return [self.case.label(cpu) + self.case.levels(cpu) for cpu in self.columns]


def explain(case: Case) -> Explanation:
    return _tell_plot(case) if case.course is None else _tell_course(case, case.course)


def _tell_course(case: Case, course: Course) -> Explanation:
    """Tell all that happened; the legend explains each danger once."""
    notes: dict[str, Note] = {}
    rows = []
    for line, moment in zip(course.lines, course.moments, strict=True):
        name = course.violation if line.meaning == USE else line.danger
        if name and name not in notes:
            needed = " (the test needs it)" if name in course.needs else ""
            said = f": {DANGERS[name]}{needed}" if name in DANGERS else ""
            notes[name] = Note(len(notes) + 1, line.meaning, f"{name}{said}")
        mark = notes[name].mark if name else 0
        rows.append(Row(line.cpu, line.text, line.meaning, mark, moment, line.step))
    columns = tuple(case.columns)
    return Explanation(
        case, course.title, columns, tuple(rows), tuple(notes.values()), course.opening, course.closing
    )


def _tell_plot(case: Case) -> Explanation:
    rows: list[Row] = []
    notes: list[Note] = []
    for moment in case.moments:
        meaning = moment.meaning
        if meaning == PROMISE and case.analysis.culprit is not None:
            meaning = ""
        mark = 0
        if meaning:
            mark = len(notes) + 1
            notes.append(Note(mark, meaning, _SENTENCES[meaning](case, moment)))
        rows.append(Row(moment.cpu, tuple(phrases(moment, case.facts)), meaning, mark, moment))
    for kind in (DEADLOCK, LEAK, INCONSISTENT):
        if not rows or kind not in case.facts.kinds:
            continue
        # None of them has a use of a translation to explain: the legend states which thread waits for which,
        # what is left over, or which structures disagree.
        mark = len(notes) + 1
        rows[-1] = replace(rows[-1], mark=mark)
        notes.append(Note(mark, kind, str(case.report.get("text", kind))))
    return Explanation(case, _title(case), tuple(case.columns), tuple(rows), tuple(notes))


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """Return the content of the diagram for programs."""
    case = explanation.case
    around = (
        {}
        if case.course is None
        else {"opening": list(explanation.opening), "closing": list(explanation.closing)}
    )
    return {
        "flushlab_explanation": 1,
        "title": explanation.title,
        **around,
        "policy": case.policy,
        "kinds": list(case.facts.kinds),
        "actors": [{"cpu": cpu, "label": case.label(cpu)} for cpu in explanation.columns],
        "moments": [_row(explanation, row) for row in explanation.rows],
        "legend": [
            {"mark": note.mark, "part": note.meaning, "text": note.text} for note in explanation.notes
        ],
    }


def _row(explanation: Explanation, row: Row) -> dict[str, Any]:
    when = {"time_ns": row.moment.time} if explanation.case.timed else {}
    step = {} if row.step is None else {"step": row.step if row.step >= 0 else None}
    return {
        **when,
        **step,
        "cpu": row.cpu,
        "text": list(row.lines),
        "part": row.meaning,
        "mark": row.mark,
        "event": row.moment.event.kind,
    }


def _title(case: Case) -> str:
    facts = case.facts
    policy = f" under {case.policy}" if case.policy else ""
    where = f" ({case.where})" if case.where else ""
    vm = f", VM {facts.vm}" if facts.vm >= 0 else ""
    return f"{', '.join(facts.kinds)}{policy}{where}{vm}"


def _fill(case: Case, moment: Moment) -> str:
    entry: Mapping[str, Any] = case.report.get("entry") or {}
    if case.facts.about_table:
        return f"a cached pointer to the table in frame {case.facts.frame:#x}"
    if not entry:
        return "the entry that goes stale"
    tags = {
        "combined": "VPID {vpid}, PCID {pcid}, EP4TA {ep4ta:#x}",
        "guest-physical": "EP4TA {ep4ta:#x}",
        "linear": "VPID {vpid}, PCID {pcid}",
    }.get(entry.get("kind", ""), "")
    return (
        f"the entry that goes stale: {entry.get('size', '')} {entry.get('kind', '')}, "
        f"page {entry.get('page', 0):#x} to frame {entry.get('frame', 0):#x}, {tags.format_map(_Zero(entry))}"
    )


class _Zero(dict[str, Any]):
    def __missing__(self, key: str) -> int:
        return 0


def _revoke(case: Case, moment: Moment) -> str:
    facts, on = case.facts, case.analysis.revoked_on
    where = f"; v{facts.vcpu} is on {case.label(on)}" if on not in (-1, facts.pcpu) else ""
    what = {
        "protect": "write access goes",
        "guest_invalidate": f"the guest invalidates it here, but {case.label(facts.pcpu)} keeps its entry",
        "root_free": "the root's page may become another root",
        "map": "the table below goes",
    }.get(moment.event.kind, "the table goes" if facts.about_table else "the translation goes")
    if moment.event.kind == "guest_invalidate":
        return what
    blamed = case.analysis.culprit is not None or case.analysis.moment(PROMISE) is not None
    return what + where + ("" if blamed else _answers(case))


def _elided(case: Case, moment: Moment) -> str:
    decision = case.analysis.decision(moment)
    answers = [str(answer) for answer in case.report.get("unsafe_answers", ())]
    own = [answer for answer in answers if answer.startswith(f"{decision}=")]
    why = own or answers[:1] or ([f"decision {decision}"] if decision else [])
    return "the flush that was elided" + (f" ({why[0]})" if why else "")


def _late(case: Case, moment: Moment) -> str:
    if moment.event.kind == "ipi":
        return f"the sender does not wait for the answer: {case.label(case.facts.pcpu)} is still in the guest"
    return "the flush comes too late: the promise has been given"


def _answers(case: Case) -> str:
    """Return the unsafe answers of the policy in parentheses, for a case in which no single flush is to
    blame."""
    answers = [str(answer) for answer in case.report.get("unsafe_answers", ())]
    return f" ({', '.join(answers)})" if answers else ""


def _missed(case: Case, moment: Moment) -> str:
    if moment.event.kind == "request":
        return f"no pCPU is interrupted, though v{case.facts.vcpu} is in the guest{_answers(case)}"
    return f"enters without having seen the request{_answers(case)}"


def _promise(case: Case, moment: Moment) -> str:
    if case.facts.marks_page:
        return f"KVM's promise, and an SPTE that maps the page is left{_answers(case)}"
    return f"KVM's promise, and {case.label(case.facts.pcpu)} has not flushed{_answers(case)}"


def _use(case: Case, moment: Moment) -> str:
    facts = case.facts
    since = next((m for m in case.moments if m.meaning == REVOKE), None)
    after = ""
    if case.timed and since is not None and moment.time > since.time > 0:
        after = f" {(moment.time - since.time) / 1000:.0f} us later"
    what = "the walk through it" if facts.about_table else "the access that uses the stale entry"
    if facts.marks_page:
        what = "the use of the page"
    return f"{what}{after}: {', '.join(facts.kinds)}"


def _what_goes(case: Case) -> str:
    revoked = case.analysis.moment(REVOKE)
    return (
        "write access goes"
        if revoked is not None and revoked.event.kind == "protect"
        else "the translation goes"
    )


def _skipped(case: Case, moment: Moment) -> str:
    return (
        f"missing: the zap of gfn {case.facts.gfn:#x}; KVM promises that it is gone, but an SPTE maps it"
        f"{_answers(case)}"
    )


def _unprotected(case: Case, moment: Moment) -> str:
    gfn = f"gfn {case.facts.gfn:#x}"
    when = {
        "log_arm": "when logging began",
        "log_clear": "when its mark was cleared",
    }.get(moment.event.kind, "when the log had named it")
    return f"missing: the write-protection of {gfn} {when}{_answers(case)}"


def _reopened(case: Case, moment: Moment) -> str:
    return (
        "too early: a fault makes the SPTE writable before the log's mark is taken, and its own mark goes "
        f"with that one{_answers(case)}"
    )


def _marked_early(case: Case, moment: Moment) -> str:
    return (
        f"too early: the fault marks the page before the log is read, and makes the SPTE writable after that"
        f"{_answers(case)}"
    )


def _unless_blamed(case: Case) -> str:
    return "" if case.analysis.culprit is not None else _answers(case)


def _unnamed(case: Case, moment: Moment) -> str:
    gfn = f"gfn {case.facts.gfn:#x}"
    if moment.event.kind == "log_end":
        return f"the log goes, and {gfn} is not marked in it"
    return f"should have named {gfn}: its contents are not those of the copy"


_SENTENCES: dict[str, Callable[[Case, Moment], str]] = {
    FILL: _fill,
    REVOKE: _revoke,
    ELIDED: _elided,
    LATE: _late,
    NARROW: lambda case, moment: f"a flush, but too narrow: the entry stays{_answers(case)}",
    REFUSED: lambda case, moment: (
        f"a flush, but the processor refuses its operand: the entry stays{_answers(case)}"
    ),
    MISSED: _missed,
    OUTDATED: lambda case, moment: f"a frame that was looked up before the promise{_answers(case)}",
    FORBIDDEN: lambda case, moment: f"writable, though the host has the page read-only{_answers(case)}",
    EARLY: lambda case, moment: f"the flush comes too early: before {_what_goes(case)}{_answers(case)}",
    SKIPPED: _skipped,
    UNNOTIFIED: lambda case, moment: "missing: an mmu_notifier; KVM is not told, and keeps its SPTE",
    PROMISE: _promise,
    USE: _use,
    COPIED: lambda case, moment: "the copy that user space keeps of the page",
    UNPROTECTED: _unprotected,
    REOPENED: _reopened,
    MARKED_EARLY: _marked_early,
    LOST: lambda case, moment: f"the write that is lost: it leaves no mark{_unless_blamed(case)}",
    UNNAMED: _unnamed,
}
