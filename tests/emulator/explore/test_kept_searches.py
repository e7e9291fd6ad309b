"""Searches that end anywhere and go on from their files: their results are those of one search."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.explore.results import keeper, rounds
from emulator.explore.results.search_file import SearchFile
from emulator.explore.results.suite import Work, explore_one
from emulator.explore.results.verdict import Plan, explore_verdict
from emulator.explore.strategies.tree import wide_search
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.policies import named_policy
from emulator.output import Unwritable

# Looks at the vCPUs that are loaded, which other threads change.
LOOKS = """
from emulator.policy import Policy

class Looks(Policy):
    def migration(self, cpu, vcpu):
        busy = [other.vcpu for other in cpu.machine.cpus]
        return "all-contexts" if any(busy) else super().migration(cpu, vcpu)
"""
TEST, POLICY = "fault-races-unmap", "linux-7.3"
KILLS = int(os.environ.get("FLUSHLAB_KILLS", 3))


class Killed(BaseException):
    pass


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a search after each part, and make parts small."""
    monkeypatch.setattr(keeper, "PAUSE", 0.0)
    monkeypatch.setattr(keeper, "RATIO", 0.0)
    monkeypatch.setattr(rounds, "wide_search", partial(wide_search, plain=8, part=2))


def killed_each(saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each search end right after one of its first `saves` saves."""
    choose, save, left = random.Random(saves), SearchFile.save, [0]

    def then_killed(self: SearchFile, state: dict[str, Any]) -> None:
        save(self, state)
        left[0] -= 1
        if left[0] <= 0:
            left[0] = choose.randint(1, saves)
            raise Killed

    monkeypatch.setattr(SearchFile, "save", then_killed)


def until_it_ends(search: Callable[[], Any]) -> tuple[Any, int]:
    kills = 0
    while True:
        try:
            return search(), kills
        except Killed:
            kills += 1


@pytest.mark.slow
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    ("plan", "saves", "kills"),
    [
        (Plan(executions=150), 6, 5),
        (Plan(executions=100, bound=2), 4, 3),
        *((Plan(name, executions=20), 6, 3) for name in ("pct", "pos", "surw", "random")),
    ],
    ids=lambda value: f"{value.strategy}-{value.executions}" if isinstance(value, Plan) else None,
)
def test_a_search_that_was_killed_ends_as_one_that_was_not(
    plan: Plan, saves: int, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(load_test(TEST), POLICY, plan, 0.0)
    whole = explore_one(work)
    killed_each(saves, monkeypatch)
    kept = replace(work, state=tmp_path)
    verdict, times = until_it_ends(lambda: explore_one(kept))
    assert times >= kills
    assert verdict.document() == whole.document()
    # The search has ended: its verdict comes from the file.
    again = explore_one(kept)
    assert again.document() == whole.document()
    assert again.before == whole.executions + whole.pruned


@pytest.mark.parametrize(("stateful", "kills"), [(False, 4), (True, 1)])
def test_a_search_is_kept_between_its_rounds(
    stateful: bool, kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounds are too small to be divided into parts; the last save is that of the end."""
    monkeypatch.setattr(keeper, "PAUSE", 0.0)
    monkeypatch.setattr(keeper, "RATIO", 0.0)
    work = Work(load_test(TEST), POLICY, Plan(executions=40, stateful=stateful), 0.0)
    whole = explore_one(work)
    killed_each(1, monkeypatch)
    verdict, times = until_it_ends(lambda: explore_one(replace(work, state=tmp_path)))
    assert times > kills
    assert verdict.document() == whole.document()


@pytest.mark.slow
@pytest.mark.usefixtures("often")
def test_the_reads_of_a_users_policy_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "looks.py"
    policy.write_text(LOOKS)
    work = Work(load_test("return-zap-other-vcpu"), str(policy), Plan(executions=60), 0.0)
    whole = explore_one(work)
    killed_each(4, monkeypatch)
    verdict, kills = until_it_ends(lambda: explore_one(replace(work, state=tmp_path)))
    assert kills > 2
    assert verdict.document() == whole.document()
    (path,) = tmp_path.glob("*.search")
    state = json.loads(path.read_text().split("\n", 1)[1])
    assert state["known"]["shared"] == ["Cpu.vcpu"]
    assert state["seen"]["read"]


@pytest.mark.usefixtures("often")
def test_a_counterexample_comes_again_from_the_file(tmp_path: Path) -> None:
    work = Work(load_test("return-zap"), "lkml-2025-cpu-flushed-mask", Plan(), 0.0, tmp_path)
    first, again = explore_one(work), explore_one(work)
    assert first.counterexample is not None
    assert (first.before, again.before) == (0, 1)
    assert again.document() == first.document()


@pytest.mark.slow
@pytest.mark.usefixtures("often")
def test_a_part_that_was_cut_short_is_not_kept(tmp_path: Path) -> None:
    """The time is up between two executions, wherever these are."""
    work = Work(load_test(TEST), POLICY, Plan(executions=100), 0.0, tmp_path)
    whole = explore_one(replace(work, state=None))
    cut = 0
    while True:
        asked = iter(range(5 + cut if list(tmp_path.iterdir()) else 60))
        stop = partial(lambda left: next(left, None) is None, asked)
        verdict = explore_verdict(work.test, named_policy(POLICY), work.plan, stop, file=work.file())
        if verdict.limit != "seconds":
            break
        cut += 1
    assert cut > 5
    assert verdict.document() == whole.document()
    # A verdict that is there does not depend on the time.
    assert explore_one(replace(work, seconds=1e-9)).document() == whole.document()


def kept(directory: Path, **changes: Any) -> SearchFile:
    values: dict[str, Any] = {"test": load_test("return-zap"), "policy": POLICY, "plan": Plan()}
    return SearchFile(directory, **(values | changes))


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    kept(tmp_path).save({"ended": True})
    assert kept(tmp_path).load().state == {"ended": True}
    assert kept(tmp_path, policy="root-tlb-gen").load().state == {}
    for plan, line in [
        (Plan(executions=3), "a search with executions 2000; expected 3, or another directory"),
        (Plan(stateful=True), "a search with stateful False; expected True"),
    ]:
        with pytest.raises(BadInput, match=line):
            kept(tmp_path, plan=plan).load()


def test_an_edited_test_is_another_search(tmp_path: Path) -> None:
    test = load_test("return-zap")
    text = test.text.replace("doc =", "# edited\ndoc =", 1)
    kept(tmp_path, test=parse_test(text, test.name, None)).save({})
    with pytest.raises(BadInput, match="found a search of other text; expected the present one"):
        kept(tmp_path).load()


def test_edited_code_is_another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path).save({})
    monkeypatch.setattr("emulator.explore.results.search_file._code", lambda: "edited")
    with pytest.raises(BadInput, match="found a search of other code"):
        kept(tmp_path).load()


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (b"", b"\xff", "found no JSON in its first line"),
        (b'"flushlab_search": 1', b'"flushlab_search": 2', "found format 2; expected 1"),
        (b'{"flushlab_search', b'[{"flushlab_search', "found no JSON in its first line"),
        (b'"ended":true', b'"ended":null', "found a state that is damaged"),
        (b"}\n{", b"}\n", "found a state that is damaged"),
    ],
)
def test_a_damaged_state_is_one_line(
    old: bytes, new: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = kept(tmp_path)
    file.save({"ended": True})
    file.path.write_bytes(file.path.read_bytes().replace(old, new, 1))
    assert main(["explore", "return-zap", "--jobs", "1", "--state", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flushlab: --state {file.path}: {line}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("often")
def test_a_search_ends_although_its_state_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SearchFile, state: dict[str, Any]) -> None:
        raise Unwritable(str(self.path), "No space left on device", "a file that can be written")

    monkeypatch.setattr(SearchFile, "save", full)
    assert main(["explore", "return-zap", "--jobs", "1", "--state", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "no violation in the only interleaving" in out
    assert err.count("No space left on device") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("often")
def test_litmus_goes_on_with_searches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["litmus", "--explore", "return-zap", TEST, "--policy", POLICY, "--iterations", "60"]
    words += ["--jobs", "1", "--json"]
    assert main(words) == 0
    whole = capsys.readouterr().out
    words += ["--state", str(tmp_path)]
    with monkeypatch.context() as patch:
        killed_each(6, patch)
        _, kills = until_it_ends(lambda: main(words))
    assert kills > 2
    assert capsys.readouterr().out == whole
    assert len(list(tmp_path.glob("*.search"))) == 2
    assert main([*words, "--store", str(tmp_path / "store")]) == 2
    assert "--state: found with --store, --shard or --cluster" in capsys.readouterr().err


# --- processes that are killed ----------------------------------------------------------------------------

_COMMAND = """
import sys
from functools import partial
from emulator.explore.results import keeper, rounds
from emulator.explore.results import rounds
keeper.PAUSE = keeper.RATIO = 0.0
rounds.wide_search = partial(rounds.wide_search, plain=8, part=2)
from emulator.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


def command(directory: Path, *more: str) -> list[str]:
    script = directory / "often.py"
    script.write_text(_COMMAND)
    return [sys.executable, str(script), "explore", TEST, "--policy", POLICY, "--json", *more]


def killed(words: list[str], searches: Path, saves: int, delay: float) -> bool:
    """Kill a search some time after it has replaced its file so many times; return whether it was running."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen: set[tuple[int, int]] = set()
        while process.poll() is None and len(seen) <= saves:
            # A file that replaces another one may get the inode of the one before.
            files = map(Path.stat, searches.glob("*.search"))
            seen |= {(file.st_ino, file.st_mtime_ns) for file in files}
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
    return process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(0 if KILLS > 3 else 120)
def test_a_killed_process_is_gone_on_with(tmp_path: Path) -> None:
    """Three kills, or as many as the environment says, of one process and of two:

    FLUSHLAB_KILLS=20 python -m pytest -s -o faulthandler_timeout=0 \\
        tests/emulator/explore/test_kept_searches.py -k killed_process
    """
    executions = "150" if KILLS == 3 else "500"
    for jobs in ("2",) if KILLS == 3 else ("1", "2"):
        searches = tmp_path / jobs
        words = command(tmp_path, "--executions", executions, "--jobs", jobs)
        whole = subprocess.run(words, capture_output=True, check=True).stdout
        words += ["--state", str(searches)]
        choose = random.Random(KILLS)
        kills = sum(
            killed(words, searches, choose.randint(1, 9), choose.random() / 20) for _ in range(KILLS)
        )
        again = subprocess.run(words, capture_output=True, check=True).stdout
        print(f"{kills} of {KILLS} processes were killed, --jobs {jobs}")
        assert kills
        assert again == whole
