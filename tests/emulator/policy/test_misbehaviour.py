"""Policy files that misbehave, as a product: misdeed, place in the file, command.

Whatever a file does comes to exit status 2 and one line that names it, or it has no effect at all: no
status of its own, nothing on standard output, no thread and no process left.

Each misdeed is tried in a third of the places, and each place has a third of the misdeeds;
`FLUSHLAB_MISDEEDS=all` tries the whole product.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from emulator.cli.main import main

pytestmark = pytest.mark.slow

HEAD = """
import atexit, builtins, json, os, signal, subprocess, sys, threading, time
import emulator.kvm.virt.dirty_log, emulator.policy.policy, emulator.report.result
from emulator.explore.engine.scheduler import Abandoned
from emulator.policy import Policy
from emulator.machine.runtime import MachineStopped
from greenlet import GreenletExit

class Mute(Exception):
    def __str__(self): raise SystemExit(0)
    __repr__ = __str__
class Odd(BaseException):
    __traceback__ = property(lambda self: sys.exit(0))
    __class__ = property(lambda self: sys.exit(0))
class Text(str):
    def __hash__(self): sys.exit(0)
    def __eq__(self, other): sys.exit(0)
    def __str__(self): sys.exit(0)
    __repr__ = __str__
class Mean:
    def __getattribute__(self, name): sys.exit(0)
    def __repr__(self): sys.exit(0)
    def __eq__(self, other): sys.exit(0)
    def __hash__(self): sys.exit(0)
"""

REFUSED = [
    "sys.exit(0)",
    "sys.exit('x')",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "raise StopIteration",
    "raise Mute",
    "raise Odd",
    "raise Exception('two\\nlines \\x1b[2J')",
    "raise MachineStopped",
    "globals().update(__name__='emulator.kvm.x86'); raise MachineStopped",
    "raise Abandoned",
    "raise GreenletExit",
    "raise AssertionError('as KVM_BUG_ON')",
    "raise emulator.policy.policy.PolicyError('mine', 'odd')",
    "(lambda f: f(f))(lambda f: f(f))",
    "os._exit(77)",  # not 0: should it work, the tests must not end well
    "os.abort()",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "signal.raise_signal(signal.SIGKILL)",
    "signal.signal(signal.SIGINT, signal.SIG_IGN)",
    "atexit.register(print, 'late')",
    "sys.setrecursionlimit(10**9)",
    "os.fork()",
    "os.execv('/bin/false', ['false'])",
    "os.system('true')",
    "subprocess.Popen(['sleep', '100'])",
    "threading.Thread(target=time.sleep, args=(100,)).start()",
    "sys.settrace(print)",
]
# Assignments are found when the file has been executed, or when the policy's executions are over.
ASSIGNS = [
    "emulator.report.result.Result.verdict = 'clean'",
    "emulator.policy.policy.Policy.mutants = lambda self: ()",
    "emulator.policy.guard.through = None",
    "builtins.repr = None",
    "builtins.len = builtins.issubclass = builtins.sorted = None",
    "del builtins.isinstance",
    "sys.stdout = None",
]
HARMLESS = [
    "print('{')",
    "sys.stdout.write('x')",
    "sys.__stdout__.write('x'); sys.__stdout__.flush()",
    "os.write(1, b'x')",
    "print('x', file=sys.stderr)",
]
PATCHES = ["emulator.kvm.virt.dirty_log._word = None"]

PLACES = {
    "import": "{what}\nclass Mine(Policy):\n    def migration(self, cpu, vcpu): return 'all-contexts'",
    "class": "class Mine(Policy):\n    {what}\n    def migration(self, cpu, vcpu): return 'all-contexts'",
    "init": """
class Mine(Policy):
    def __init__(self):
        super().__init__()
        {what}
    def migration(self, cpu, vcpu): return 'all-contexts'
""",
    "new": """
class Mine(Policy):
    def __new__(cls):
        {what}
        return super().__new__(cls)
    def migration(self, cpu, vcpu): return 'all-contexts'
""",
    "metaclass": """
class Meta(type):
    def __init__(cls, *args):
        {what}
class Mine(Policy, metaclass=Meta):
    def migration(self, cpu, vcpu): return 'all-contexts'
""",
    "base": """
class Base:
    def __get__(self, obj, cls):
        {what}
        return 'linux-7.3'
class Mine(Policy):
    base = Base()
    def migration(self, cpu, vcpu): return 'all-contexts'
""",
    "set_name": """
class Named:
    def __set_name__(self, cls, name):
        {what}
class Mine(Policy):
    named = Named()
    def migration(self, cpu, vcpu): return 'all-contexts'
""",
}
METHODS = {
    "method": """
class Mine(Policy):
    def migration(self, cpu, vcpu):
        {what}
        return 'all-contexts'
""",
    "property": """
class Mine(Policy):
    @property
    def held(self):
        {what}
    def migration(self, cpu, vcpu):
        self.held
        return 'all-contexts'
""",
    "getattribute": """
class Mine(Policy):
    def __getattribute__(self, name):
        if name == 'migration':
            {what}
        return super().__getattribute__(name)
    def migration(self, cpu, vcpu): return 'all-contexts'
""",
}
COMMANDS = {
    "explore": ["explore", "return-zap", "--json", "--jobs", "1"],
    "litmus": ["litmus", "return-zap", "--json", "--jobs", "1", "--iterations", "1"],
    "run": ["run", "migration-storm", "--json", "--duration", "1s", "--log-level", "error"],
}


def combinations(places: dict[str, str], misdeeds: list[str]) -> list[tuple[str, str]]:
    """Return pairs of place and misdeed: all of them, or by turns a third of each misdeed's places."""
    every = 1 if os.environ.get("FLUSHLAB_MISDEEDS") == "all" else 3
    return [
        (place, what)
        for number, what in enumerate(misdeeds)
        for turn, place in enumerate(places.values())
        if (number + turn) % every == 0
    ]


@dataclass
class Outcome:
    status: int
    out: str
    err: str


class Desk:
    """Writes files, runs command lines on them and looks for remains."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self.capsys = directory, capsys
        self.tried = 0
        self.numbers = itertools.count()

    def written(self, place: str, what: str) -> Path:
        path = self.directory / f"mine{next(self.numbers)}.py"
        path.write_text(HEAD + textwrap.dedent(place).replace("{what}", what) + "\n")
        return path

    def run(self, command: str, path: Path) -> Outcome:
        self.tried += 1
        threads = set(threading.enumerate())
        kept = sys.stdout, builtins_repr(), os.stat(1), signal_handlers()
        status = main([*COMMANDS[command], "--policy", str(path)])
        out, err = self.capsys.readouterr()
        assert (sys.stdout, builtins_repr(), os.stat(1), signal_handlers()) == kept
        assert set(threading.enumerate()) <= threads
        assert not multiprocessing.active_children()
        return Outcome(status, out, err)

    def refused(self, command: str, place: str, what: str) -> None:
        path = self.written(place, what)
        found = self.run(command, path)
        assert (found.status, found.out) == (2, ""), (command, place, what, found)
        # On a busy machine a search tells its progress first.
        lines = [line for line in found.err.splitlines() if not line.startswith("explore: ")]
        assert len(lines) == 1, (command, place, what, found)
        assert lines[0].startswith(f"flushlab: {path}:"), found
        assert lines[0].isprintable()

    def harmless(self, command: str, place: str, what: str) -> None:
        found = self.run(command, self.written(place, what))
        assert found.status == 0, (command, place, what, found)
        json.loads(found.out)

    def say(self) -> None:
        with self.capsys.disabled():
            print(f" [{self.tried} policy files]", end="")


def builtins_repr() -> object:
    return repr


def signal_handlers() -> list[object]:
    import signal

    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    desk = Desk(tmp_path, capsys)
    yield desk
    desk.say()


@pytest.mark.parametrize("command", ["explore", "run"])
@pytest.mark.parametrize("what", ["os._exit(0)", "sys.exit(0)", "os.execv('/bin/true', ['true'])"])
def test_no_file_gives_the_status(what: str, command: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(HEAD + METHODS["method"].replace("{what}", what))
    line = [sys.executable, "-m", "emulator", *COMMANDS[command], "--policy", str(path)]
    found = subprocess.run(line, capture_output=True, text=True, check=False, timeout=100)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1), found
    assert found.stderr.startswith(f"flushlab: {path}:"), found


def test_files_that_misbehave_when_they_are_loaded(desk: Desk) -> None:
    for place, what in combinations(PLACES, [*REFUSED, *ASSIGNS]):
        desk.refused("explore", place, what)


def test_files_that_do_no_harm_when_they_are_loaded(desk: Desk) -> None:
    for place, what in combinations(PLACES, HARMLESS):
        desk.harmless("explore", place, what)
    for what in PATCHES:
        desk.harmless("explore", PLACES["import"], what)


def test_files_that_misbehave_when_they_are_asked(desk: Desk) -> None:
    for place, what in combinations(METHODS, [*REFUSED, *ASSIGNS, *PATCHES]):
        desk.refused("explore", place, what)
    for what in [*REFUSED, *ASSIGNS, *PATCHES]:
        desk.refused("litmus", METHODS["method"], what)
    for place, what in combinations(METHODS, HARMLESS):
        desk.harmless("explore", place, what)


@pytest.mark.parametrize(
    "what",
    ["sys.exit(0)", "raise MachineStopped", "raise Odd", "threading.Timer(1, print).start()", *PATCHES],
)
def test_a_run_ends_for_it(what: str, desk: Desk) -> None:
    desk.refused("run", METHODS["method"], what)


ANSWERS = [
    "Mean()",
    "[Mean()]",
    "type('A', (), {'__repr__': lambda s: 1})()",
    "(yield)",
    "b'none'",
    "Text('x')",
]


@pytest.mark.parametrize("command", ["explore", "litmus"])
def test_answers_that_are_none(command: str, desk: Desk) -> None:
    for answer in ANSWERS:
        desk.refused(command, METHODS["method"], f"return {answer}")


@pytest.mark.parametrize("command", ["explore", "litmus"])
def test_a_string_of_a_derived_class_is_the_string_that_it_holds(command: str, desk: Desk) -> None:
    desk.harmless(command, METHODS["method"], "return Text('all-contexts')")


IN_WORKERS = """
import multiprocessing
if multiprocessing.parent_process() is not None:
    raise Odd('odd')
class Mine(Policy):
    def migration(self, cpu, vcpu): return super().migration(cpu, vcpu)
"""
ASKED_IN_WORKERS = """
import multiprocessing
class Mine(Policy):
    def migration(self, cpu, vcpu):
        if multiprocessing.parent_process() is not None:
            raise Odd('odd')
        return super().migration(cpu, vcpu)
"""
JOBS = {
    "one search": ["explore", "return-zap-other-vcpu", "--bound", "2"],
    "searches": ["explore", "return-zap", "bounce-zap"],
    "litmus": ["litmus", "return-zap", "bounce-zap", "--iterations", "1"],
}


@pytest.mark.parametrize("place", [IN_WORKERS, ASKED_IN_WORKERS], ids=["import", "method"])
@pytest.mark.parametrize("command", JOBS)
def test_processes_of_a_pool_say_it_through_their_parent(command: str, place: str, desk: Desk) -> None:
    COMMANDS[command] = [*JOBS[command], "--json", "--jobs", "2"]
    desk.refused(command, place, "")
