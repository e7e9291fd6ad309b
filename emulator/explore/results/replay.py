"""Recordings in files, and their replay: an execution that does not depend on the recording's steps, compared
with each of them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from emulator.errors import BadInput
from emulator.explore.engine.scheduler import Divergence
from emulator.explore.machine.lib import instrument
from emulator.explore.machine.options import ExploreOptions
from emulator.explore.machine.policy_reads import Known
from emulator.explore.machine.program import LitmusProgram
from emulator.explore.results.record import Recording, record
from emulator.litmus.loader import parse_test
from emulator.litmus.model import LitmusTest
from emulator.litmus.policies import named_policy
from emulator.policy import Policy, check_policy, spelled_policy
from emulator.validation import first_error, read_json

_EXPECTED = "a counterexample or a trace of flushlab explore"
# Keeps the report of a difference on one line, for any contents of a file.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclass(frozen=True, slots=True)
class Code:
    """The code that executions run: the model's, or beside it the TDP MMU of a kernel's tree.

    program: the class of the program that runs it.  kernel, sources: the tree's version, and the hash of its
    sources; "" for the model's code alone.
    """

    program: type[LitmusProgram] = LitmusProgram
    kernel: str = ""
    sources: str = ""


MODEL: Final = Code()


class _Step(BaseModel):
    """The fields of a step that a replay is compared with."""

    model_config = ConfigDict(strict=True)

    n: int
    thread: str
    cpu: int
    kind: str
    object: str
    mode: str
    text: str
    reads: list[str]
    writes: list[str]
    events: list[dict[str, Any]]
    did: dict[str, Any] | None = None


class _Document(BaseModel):
    model_config = ConfigDict(strict=True)

    format: Literal[1]  # FORMAT
    test: str
    source: str
    policy: str
    patches: list[list[str]] = []
    watched: dict[str, list[str]] = {}
    kernel: str = ""
    sources: str = ""
    schedule: list[str]
    steps: list[_Step]
    final: list[dict[str, Any]] = []
    violation: dict[str, Any] | None
    verdict: Literal["", "safe", "violations", "failed"] = ""
    trace: dict[str, Any] | None = None


def load(path: Path, code: Code = MODEL) -> dict[str, Any]:
    """Return the document of a recording of this code; raises BadInput."""
    document = read_json(path, _EXPECTED)
    try:
        found = _find(document)
        if found is None:
            raise BadInput(str(path), "no recording in it", _EXPECTED)
        kernel = _Document.model_validate(found).kernel
    except ValidationError as error:
        raise BadInput(str(path), *first_error(error, _Document)) from error
    except RecursionError as error:
        raise BadInput(str(path), "nested too deeply", _EXPECTED) from error
    if kernel and not code.kernel:
        expected = "--kernel TREE beside it, with this tree; `flushlab explain` draws it without one"
        raise BadInput(str(path), f"it was recorded with the code of Linux {kernel}", expected)
    if code.kernel and not kernel:
        raise BadInput(str(path), "it was recorded with the model's code", "no --kernel beside it")
    return found


def _find(document: Any) -> dict[str, Any] | None:
    """Return the recording of a file of its own, or the first one in a document of `explore --json`."""
    if isinstance(document, dict):
        if {"schedule", "steps"} <= document.keys():
            return document
        document = list(document.values())
    if isinstance(document, list):
        for item in document:
            found = _find(item)
            if found is not None:
                return found
    return None


def _policy(spelled: str, patches: list[list[str]]) -> Policy:
    """Return the policy of a recording, with the patches that are in it, whatever their files have become."""
    parts = tuple((name, text.encode()) for name, text in patches)
    return spelled_policy(spelled, spelled, parts) if parts else named_policy(spelled)


@dataclass(frozen=True, slots=True)
class Stored:
    """A recording in a file, and the program that it is an execution of."""

    path: Path
    document: dict[str, Any]
    test: LitmusTest
    policy: Policy
    options: ExploreOptions
    code: Code = MODEL

    @classmethod
    def load(cls, path: Path, code: Code = MODEL) -> Stored:
        """Return the recording of a file; raises BadInput."""
        document = load(path, code)
        check_policy(document["policy"], f"{path}: policy")
        try:
            test = parse_test(document["source"], document["test"], None)
            policy = _policy(document["policy"], document.get("patches", []))
            return cls(path, document, test, policy, ExploreOptions.of(document), code)
        except BadInput as error:
            raise BadInput(str(path), str(error)) from error
        except ValueError as error:
            raise BadInput(str(path), str(error), _EXPECTED) from error

    @contextmanager
    def program(self) -> Iterator[LitmusProgram]:
        """Build the program, with its control installed."""
        known = Known.of(self.document.get("watched", {}))
        with self.policy.confined():
            program = self.code.program(self.test, self.policy, self.options, known=known, frozen=True)
            try:
                with instrument(program.control):
                    yield program
            finally:
                program.close()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Add to a divergence that the tree has changed since the recording, if it has."""
        try:
            yield
        except Divergence as error:
            then, now = self.document.get("sources", ""), self.code.sources
            if then == now:
                raise
            raise Divergence(f"{error} (recorded with sources {then}, the tree has {now})") from None

    def schedule(self, program: LitmusProgram) -> tuple[int, ...]:
        """Return the recorded schedule by the tasks' numbers; raises BadInput."""
        names = program.task_names()
        unknown = sorted(set(self.document["schedule"]) - set(names))
        if unknown:
            raise BadInput(f"{self.path}: schedule", unknown[0], f"one of {', '.join(names)}")
        return tuple(names.index(name) for name in self.document["schedule"])


def replay(path: Path, *, trace: bool = False, code: Code = MODEL) -> Recording:
    """Run a recorded execution again, and return it, with `trace` as a trace in any case; raises Divergence
    if a step differs from its recording."""
    stored = Stored.load(path, code)
    recorded_trace = stored.document.get("trace") is not None
    with stored.told():
        with stored.program() as program:
            again = record(program, stored.schedule(program), trace=trace or recorded_trace)
        again.kernel, again.sources = code.kernel, code.sources
        now = json.loads(json.dumps(again.document()))
        if not recorded_trace:
            now["steps"] = [{key: step[key] for key in step if key != "did"} for step in now["steps"]]
        _compare(stored.document, now)
    return again


def compare_steps(before: list[dict[str, Any]], again: list[dict[str, Any]]) -> None:
    """Raise Divergence for the first step that differs."""
    for old, new in zip(before, again, strict=False):
        if old != new:
            key = next(key for key in (*old, *new) if old.get(key) != new.get(key))
            now, then = _SHORT.repr(new.get(key)), _SHORT.repr(old.get(key))
            raise Divergence(f"step {old['n']} of {old['thread']}: {key} is {now}, was {then}")


def _compare(before: dict[str, Any], again: dict[str, Any]) -> None:
    compare_steps(before["steps"], again["steps"])
    if len(before["steps"]) != len(again["steps"]):
        raise Divergence(f"{len(again['steps'])} steps, but {len(before['steps'])} were recorded")
    told = ("verdict", "trace") if before.get("trace") is not None else ()
    for key in ("schedule", "steps", "final", *told):
        if before.get(key) != again.get(key):
            raise Divergence(f"{key} differs from the recording")
    if _judged(before) != _judged(again):
        raise Divergence("violation differs from the recording")


def _judged(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the violation.  With a tree's code, leave out the texts that name its functions and lines, and
    its findings in all executions of the search."""
    violation = document["violation"]
    if violation is None or not document.get("kernel"):
        return violation  # type: ignore[no-any-return]
    return {key: value for key, value in violation.items() if key not in ("text", "tree")}
