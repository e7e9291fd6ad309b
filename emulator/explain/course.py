"""The course of a traced execution: all that happened, as rows, whether or not anything was violated.

A row is an operation of the test with its result, an event of the core, or a step that other CPUs wait
for.  Steps that only read, take a lock or write a field have a row on demand.  The dangers that occurred are
marked, and the legend explains them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

from emulator.explain.dangers import ROWS
from emulator.explain.events import Event
from emulator.explain.facts import Facts
from emulator.explain.meanings import DANGER, USE
from emulator.explain.moments import Moment
from emulator.explain.phrases import phrases
from emulator.explain.processor import VISIBLE

# Steps without events that other CPUs wait for, by kind.
_STEPS: Final = {
    ("interrupt", ""): "the IPI arrives",
    ("grace period", "begins"): "an RCU grace period begins",
    ("grace period", "ends"): "the RCU grace period ends",
    ("synchronize_rcu", "done"): "synchronize_rcu() returns",
    ("rcu_barrier", "done"): "rcu_barrier() returns",
    ("cpu_relax", ""): "tries again",
}
_NAMED_PAGES: Final = 4
_NAMED_ENTRIES: Final = 8
_NAMED_STEPS: Final = 6
OPERATION: Final = "operation"
_STEP: Final = "step"


@dataclass(frozen=True, slots=True)
class Line:
    """One row.  step: the number of its step, -1 for none; danger: that occurred in it, "" for none."""

    step: int
    cpu: int
    text: tuple[str, ...]
    event: Event
    meaning: str = ""
    danger: str = ""


@dataclass(frozen=True, slots=True)
class Course:
    """opening, closing: sentences before and after the rows; needs: the dangers of which the test needs
    one."""

    title: str
    opening: tuple[str, ...]
    lines: tuple[Line, ...]
    closing: tuple[str, ...]
    needs: tuple[str, ...]
    violation: str

    @property
    def moments(self) -> list[Moment]:
        return [Moment(line.cpu, line.event, line.meaning) for line in self.lines]


def course_of(document: Mapping[str, Any], every_step: bool = False) -> Course:
    """Return the course of a recording; `every_step`: with a row for each step.

    The document must have passed schema.TraceSchema.
    """
    trace = document.get("trace") or {}
    every = list(_Lines(document, every_step).lines())
    lines = tuple(every if every_step else _folded(every))
    violation = document.get("violation") or {}
    kinds = ", ".join(violation.get("kinds") or ([violation["kind"]] if violation else []))
    return Course(
        title=_title(document, kinds),
        opening=tuple(_opening(trace)),
        lines=lines,
        closing=tuple(_closing(document, every)),
        needs=tuple(trace.get("needs", ())),
        violation=kinds,
    )


def _folded(lines: Sequence[Line]) -> Iterator[Line]:
    """Yield the lines, with one line for several in a row that are alike."""
    for _, group in groupby(
        lines, lambda line: (line.cpu, line.text, line.meaning, line.danger, line.step < 0)
    ):
        same = list(group)
        if len(same) > 1:
            until = f", to step {same[-1].step}" if same[-1].step > same[0].step else ""
            yield replace(same[0], text=(*same[0].text, f"{len(same)} times{until}"))
        else:
            yield same[0]


def _title(document: Mapping[str, Any], kinds: str) -> str:
    steps = len(document["steps"])
    found = kinds or ("fails" if document.get("verdict") == "failed" else "no violation")
    where = f"{document.get('test', '')} under {document.get('policy', '')}"
    return f"{where}: {found} in this execution of {steps} step{'' if steps == 1 else 's'}"


def _opening(trace: Mapping[str, Any]) -> Iterator[str]:
    init = trace.get("init", ())
    if init:
        more = f"; and {len(init) - _NAMED_ENTRIES} more" if len(init) > _NAMED_ENTRIES else ""
        yield f"init: {'; '.join(init[:_NAMED_ENTRIES])}{more}"
    yield from _tlbs("before", trace.get("tlbs", ()))


def _tlbs(when: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence for each pCPU with cached translations."""
    roots = {entry["ep4ta"] for entry in entries}
    for cpu in dict.fromkeys(entry["cpu"] for entry in entries):
        cached = [_mapping(entry, len(roots) > 1) for entry in entries if entry["cpu"] == cpu]
        more = f" and {len(cached) - _NAMED_ENTRIES} more" if len(cached) > _NAMED_ENTRIES else ""
        yield f"TLB of CPU{cpu} {when}: {', '.join(cached[:_NAMED_ENTRIES])}{more}"


def _mapping(entry: Mapping[str, Any], roots: bool) -> str:
    """Name a cached translation; `roots`: with its root, because there are several."""
    what = "gfn" if entry["kind"] == "guest-physical" else "linear"
    size = "" if entry["size"] == "4K" else f" {entry['size']}"
    root = f" by root {entry['ep4ta']:#x}" if roots and entry["kind"] != "linear" else ""
    return f"{what} {entry['page']:#x} to frame {entry['frame']:#x}{size}{root}"


def _closing(document: Mapping[str, Any], lines: Sequence[Line]) -> Iterator[str]:
    trace = document.get("trace") or {}
    yield from _tlbs("after", trace.get("tlbs_at_end", ()))
    if trace.get("ended"):
        yield f"ended: {trace['ended']}"
    needs = [need for need in trace.get("needs", ()) if need != "nothing"]
    if not needs:
        return
    wanted = " or ".join(needs)
    evidence = trace.get("evidence", {})
    met = [need for need in needs if evidence.get(need)]
    places = [f"{line.step}" for line in lines if line.danger in needs and line.step >= 0]
    if met or places:
        places = list(dict.fromkeys(places))
        more = f" and {len(places) - _NAMED_STEPS} more" if len(places) > _NAMED_STEPS else ""
        at = f" at step {', '.join(places[:_NAMED_STEPS])}{more}" if places else ""
        yield f"precondition ({wanted}): met{at}"
    elif not document.get("violation"):
        yield f"precondition ({wanted}): not met here; --reach needs looks for an execution that meets it"


class _Lines:
    """The rows of a recording."""

    def __init__(self, document: Mapping[str, Any], every_step: bool) -> None:
        self.document = document
        self.every_step = every_step
        trace = document.get("trace") or {}
        self.needs = tuple(trace.get("needs", ()))
        self.final = trace.get("final", ())
        self.unfinished = trace.get("unfinished")
        threads = trace.get("threads", {})
        self.vcpus = {name for name, thread in threads.items() if thread["vcpu"] is not None}
        # A vCPU's thread that holds no pCPU is told in the column of its last one.
        self.homes = {threads[name]["home"]: name for name in self.vcpus}
        self.last_pcpu: dict[str, int] = {}
        self.begun: dict[str, int] = {}  # by thread: the last operation with a row
        self.time = 0

    def lines(self) -> Iterator[Line]:
        steps = self.document["steps"]
        for step in steps:
            found = list(self._step(step))
            if self.document.get("violation") and step is steps[-1] and not self.final:
                found = self._with(found, USE, "")
            yield from found
        if self.unfinished is not None:
            yield from self._of_step({**self.unfinished, "n": -1, "did": {}}, "fails here")
        for done in self.final:
            yield from self._final(done)

    def _step(self, step: Mapping[str, Any]) -> Iterator[Line]:
        found = [*self._of_step(step, "")]
        danger = self._danger(step)
        if danger and not found:
            found = [self._line(step, self._cpu(step), (ROWS.get(danger, danger),))]
        if not found and self.every_step:
            found = [self._line(step, self._cpu(step), (_step_text(step),))]
        yield from self._with(found, DANGER, danger) if danger else found

    @staticmethod
    def _with(lines: list[Line], meaning: str, danger: str) -> list[Line]:
        """Mark the last of the lines."""
        if not lines:
            return []
        last = lines[-1]
        marked = Line(last.step, last.cpu, last.text, last.event, meaning, danger or last.danger)
        return [*lines[:-1], marked]

    def _danger(self, step: Mapping[str, Any]) -> str:
        """Return the danger of a step that counts most: one that the test needs, else the first."""
        found = (step.get("did") or {}).get("dangers", {})
        return next((need for need in self.needs if need in found), next(iter(found), ""))

    def _cpu(self, step: Mapping[str, Any]) -> int:
        cpu, name = int(step["cpu"]), step.get("thread", "")
        if cpu in self.homes:
            return self.last_pcpu.get(name, cpu)
        if name in self.vcpus:
            self.last_pcpu[name] = cpu
        return cpu

    def _line(self, step: Mapping[str, Any], cpu: int, text: Sequence[str], kind: str = _STEP) -> Line:
        self.time += 1
        return Line(step["n"], cpu, tuple(text), Event(self.time, kind, cpu, 0, 0, said="\n".join(text)))

    # --- the rows of one step -------------------------------------------------------------------------------

    def _of_step(self, step: Mapping[str, Any], note: str) -> Iterator[Line]:
        did, cpu = step.get("did") or {}, self._cpu(step)
        said = list(self._begins(step, did, cpu))
        events = [Event.of_dict(event, 0) for event in step.get("events") or ()]
        if "access" in did:
            # The operation's own row tells of its store and of its invalidation.
            events = [event for event in events if event.kind not in ("store", "guest_invalidate")]
        dropped = list(did.get("dropped", ()))
        # The end of the guest mode before an operation belongs to the operation's first step.
        left = [event for event in events if event.kind == "exit"] if "access" not in did else []
        for event in left:
            yield self._of_event(step, event, dropped)
        yield from said
        if not said:
            yield from self._waited(step, events, cpu)
        for event in events:
            if event not in left:
                yield self._of_event(step, event, dropped)
        if dropped and "access" not in did:
            yield self._line(step, dropped[0]["cpu"], ("TLB drops " + _pages(dropped),))
        yield from self._ends(step, did, cpu)
        if note:
            yield self._line(step, cpu, (step.get("text", ""), note))

    def _begins(self, step: Mapping[str, Any], did: Mapping[str, Any], cpu: int) -> Iterator[Line]:
        """Yield the row of the operation that begins with this step, or that is this step."""
        op, name = did.get("op"), step.get("thread", "")
        if op is None:
            return
        text = self._named(name, op["text"])
        done = any(other["n"] == op["n"] for other in did.get("done", ()))
        if "access" in did:
            self.begun[name] = op["n"]
            yield self._line(step, cpu, (text, *_found(did)), OPERATION)
        elif step.get("kind") == "guest waits":
            self.begun[name] = op["n"]
            yield self._line(step, cpu, (text,) if done else (text, "interrupted"), OPERATION)
        elif self.begun.get(name, 0) < op["n"] and not self._in_guest(op["text"], name):
            self.begun[name] = op["n"]
            yield self._line(step, cpu, (text,), OPERATION)

    def _ends(self, step: Mapping[str, Any], did: Mapping[str, Any], cpu: int) -> Iterator[Line]:
        """Yield the ends of operations of several steps, and operations that take no step of their own."""
        op, name = did.get("op"), step.get("thread", "")
        for done in did.get("done", ()):
            text = self._named(name, done["text"])
            if self.begun.get(name, 0) < done["n"]:
                self.begun[name] = done["n"]
                yield self._line(step, cpu, (text,), OPERATION)
            elif self._lasted(step, op, done):
                yield self._line(step, cpu, (f"{text}: done",), OPERATION)

    def _lasted(self, step: Mapping[str, Any], op: Mapping[str, Any] | None, done: Mapping[str, Any]) -> bool:
        """Return whether an operation that is complete now began in an earlier step and has no other end."""
        verb = done["text"].split()[0]
        mine = op is not None and op["n"] == done["n"]
        own_step = "access" in (step.get("did") or {}) or step.get("kind") == "guest waits"
        # The guest goes on behind the other operations of a vCPU, which its VM entry tells.
        ends = step.get("thread", "") not in self.vcpus or verb == "block"
        return mine and not own_step and ends and verb != "wait"

    def _in_guest(self, text: str, name: str) -> bool:
        """Return whether the operation is the guest's, which has a row where the guest executes it."""
        return name in self.vcpus and text.split()[0] in GUEST_VERBS

    def _named(self, name: str, text: str) -> str:
        """Return an operation behind its vCPU's name; a thread without vCPU has a column of its own."""
        return f"{name}: {text}" if name in self.vcpus else text

    def _of_event(self, step: Mapping[str, Any], event: Event, dropped: list[dict[str, Any]]) -> Line:
        self.time += 1
        timed = replace(event, time=self.time)
        text = _told(timed)
        if event.kind in ("flush", "unload", "evict") and dropped:
            here = [entry for entry in dropped if entry["cpu"] == event.cpu]
            dropped[:] = [entry for entry in dropped if entry["cpu"] != event.cpu]
            text = [*text, f"drops {_pages(here)}"] if here else text
        return Line(step["n"], event.cpu, tuple(text), timed)

    def _waited(self, step: Mapping[str, Any], events: Sequence[Event], cpu: int) -> Iterator[Line]:
        """Yield the row of a step without events that other CPUs wait for, or that has waited for them."""
        kind, obj, text = step.get("kind", ""), step.get("object", ""), step.get("text", "")
        if text.startswith(VISIBLE) or kind.startswith(VISIBLE):
            yield self._line(step, cpu, (text,))
        elif kind == "acknowledgement":
            yield self._line(step, cpu, (f"acknowledged by CPU{', CPU'.join(obj.split())}",))
        elif kind == "synchronize_srcu" and obj.endswith("done"):
            yield self._line(step, cpu, ("synchronize_srcu() returns",))
        else:
            said = _STEPS.get((kind, obj)) or _STEPS.get((kind, ""))
            if said and not events:
                yield self._line(step, cpu, (said,))

    # --- final ----------------------------------------------------------------------------------------------

    def _final(self, done: Mapping[str, Any]) -> Iterator[Line]:
        step = {"n": -1, "thread": done["thread"], "cpu": done["cpu"], "did": done}
        text = f"final: {done['thread']}: {'; '.join(done['ops'])}"
        found = [self._line(step, done["cpu"], (text,), OPERATION)]
        dropped = list(done.get("dropped", ()))
        found += [self._of_event(step, Event.of_dict(event, 0), dropped) for event in done.get("events", ())]
        danger = self._danger(step)
        yield from self._with(found, DANGER, danger) if danger else found


# Verbs of the operations that a guest executes, and that have their row where it does.
GUEST_VERBS: Final = frozenset(
    {
        *("read", "write", "exec", "kernel-read", "kernel-write"),
        *("map", "unmap", "protect", "store", "invlpg", "invpcid", "mov-cr3", "wait"),
    }
)


def _found(did: Mapping[str, Any]) -> Iterator[str]:
    """Yield the result of a guest's operation, in a line."""
    access = did["access"]
    if not access["completed"]:
        why = access.get("exit", "").replace("_", " ")
        if why == "ept violation":
            yield f"TLB {access['tlb']}, EPT violation"
        else:
            yield f"not executed: VM exit ({why})" if why else "not executed yet"
    elif "frame" in access:
        filled = ", filled" if did.get("filled") else ""
        yield f"TLB {access['tlb']}{filled}: frame {access['frame']:#x}"
    elif did["op"]["text"].split()[0] in ("read", "write", "exec"):
        yield "no memory: user space emulates it"
    elif did.get("dropped"):
        yield f"drops {_pages(did['dropped'])}"


def _pages(entries: Sequence[Mapping[str, Any]]) -> str:
    """Name TLB entries by their pages, each once."""
    pages = list(dict.fromkeys(f"{entry['page']:#x}" for entry in entries))
    more = f" and {len(pages) - _NAMED_PAGES} more" if len(pages) > _NAMED_PAGES else ""
    return f"page{'' if len(pages) == 1 else 's'} {', '.join(pages[:_NAMED_PAGES])}{more}"


def _told(event: Event) -> list[str]:
    """Return an event in the kernel's words, with the pages that the analysis of a race takes for known."""
    words = phrases(Moment(event.cpu, event), Facts())
    if event.kind == "zap" and not event.b:
        return [f"zap of no page, gfn {event.a:#x}"]
    if event.kind in ("zap", "protect") and event.b != 1:
        return [f"{words[0].split()[0]} {event.b} pages from gfn {event.a:#x}"]
    if event.kind == "promise":
        return [words[0], f"returns: gfn {event.b:#x}"]
    if event.kind == "flush":
        return [*words, f"for {event.reason.replace('_', ' ')}"]
    return words


def _step_text(step: Mapping[str, Any]) -> str:
    mode = " (write)" if step.get("mode") == "write" else ""
    return f"({step.get('text', '')}){mode}" if step.get("text") else f"({step.get('kind', '')}){mode}"
