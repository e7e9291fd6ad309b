"""`import flushlab`: the commands as functions, with classes as policies and tables as results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import flushlab
from emulator.api import __all__ as offered
from flushlab import BadInput, Policy

ONE = 1  # named by a class below
HOLE = ["use-after-free", "stale-after-revoke"]


class Lazy(Policy):
    def migration(self, cpu, vcpu):  # type: ignore[no-untyped-def]
        return "none" if len(vcpu.kvm.vcpus) == ONE else super().migration(cpu, vcpu)


class Derived(Lazy):
    name = "mine"
    base = "linux-6.12"

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def remote_kick(self, cpu, kvm):  # type: ignore[no-untyped-def]
        self.asked += 1
        return super().remote_kick(cpu, kvm)


class Wrong(Policy):
    def migration(self, cpu, vcpu):  # type: ignore[no-untyped-def]
        return "nothing"


def test_the_package_gives_out_each_name() -> None:
    assert sorted(flushlab.__all__) == sorted([*offered, "__version__"])
    assert all(hasattr(flushlab, name) for name in offered)


@pytest.mark.slow
def test_a_class_keeps_its_name_and_its_answers() -> None:
    policies: list[str | type[Policy]] = ["linux-7.3", Lazy, Derived]
    found = flushlab.explore("return-zap", policies=policies)
    rows = {row["policy"]: row for row in found.rows()}
    assert list(rows) == ["linux-7.3", "Lazy", "mine"]
    assert found.verdict("return-zap", "linux-7.3") == "safe"
    assert rows["Lazy"]["violations"] == rows["mine"]["violations"] == ", ".join(HOLE)
    assert "use-after-free" in (found.counterexample("return-zap", "Lazy") or "")
    assert found.counterexample("return-zap", "linux-7.3") is None


@pytest.mark.slow
def test_names_around_a_class_inside_a_function_are_found() -> None:
    answer = "none"

    class Inner(Policy):
        def migration(self, cpu, vcpu):  # type: ignore[no-untyped-def]
            return answer

    assert flushlab.explore("return-zap", policies=[Inner]).verdict("return-zap", "Inner") == "violations"


def test_state_of_an_execution_is_not_seen_by_the_next() -> None:
    class Once(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.migrations = 0

        def migration(self, cpu, vcpu):  # type: ignore[no-untyped-def]
            self.migrations += 1
            return "none" if self.migrations == 1 else super().migration(cpu, vcpu)

    # The first migration of each execution is elided, not that of the first execution alone.
    found = flushlab.litmus("return-zap", policies=[Once], executions=20, seed=1)
    (row,) = found.rows()
    assert (row["policy"], row["executions"]) == ("Once", 20)
    assert not found.document()["outcomes"][0]["failure"]


@pytest.mark.slow
def test_litmus_tells_what_differs() -> None:
    found = flushlab.litmus("return-zap", policies=["linux-7.3", Lazy], executions=40, seed=1)
    assert found.verdict("return-zap", "linux-7.3") == "safe"
    assert found.verdict("return-zap", "Lazy") == "violations"
    assert not found.as_expected
    assert [row["executions"] for row in found.rows()] == [40, 40]
    assert flushlab.litmus("return-zap", executions=20, seed=1).as_expected


@pytest.mark.stress
def test_run_and_compare() -> None:
    run = flushlab.run(policy=Lazy, duration=0.2, seed=3)
    assert (run.policy, run.scenario, run.seed) == ("Lazy", "main", 3)
    assert run.verdict in ("clean", "inconclusive", "violations")
    assert sum(run.answers["migration"].values()) > 0
    assert run.document()["policy"]["name"] == "Lazy"
    assert "Lazy" in str(run)
    found = flushlab.compare(policies=["linux-7.3", Derived], duration="50ms", seed=1)
    assert found.policies == ("linux-7.3", "mine")
    table = found.to_pandas()
    assert list(table["policy"]) == ["linux-7.3", "mine"]
    assert list(table["seed"]) == [1, 1]
    assert found.median("mine", "accesses") > 0
    assert found.document()["baseline"] == "linux-7.3"
    assert "mine" in str(found)


@pytest.mark.slow
def test_a_wrong_answer_is_one_line_that_names_class_and_line() -> None:
    with pytest.raises(
        BadInput, match=r"^test_api.py::Wrong:\d+: Wrong.migration: returned 'nothing'; expec"
    ):
        flushlab.explore("return-zap", policies=[Wrong])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: flushlab.run("nowhere"), r"nowhere"),
        (lambda: flushlab.run(policy="linus"), r"linus"),
        (
            lambda: flushlab.run(policy=3),  # type: ignore[arg-type]
            r"policy: found 'int', an object; expected a name, or a class",
        ),
        (lambda: flushlab.run(duration="soon"), r"duration: found 'soon'"),
        (lambda: flushlab.run(duration=-1), r"duration: found -1"),
        (lambda: flushlab.compare(policies=[]), r"policies: found none"),
        (lambda: flushlab.compare(policies=["linux-7.3"] * 2), r"policies: found linux-7.3 twice"),
        (lambda: flushlab.compare(policies=["linux-7.3"], repeat=0), r"repeat: found 0"),
        (lambda: flushlab.explore("return-zap", strategy="luck"), r"strategy: found 'luck'"),
        (lambda: flushlab.explore("return-zip"), r"return-zip"),
        (lambda: flushlab.run("shadow", policy="root-tlb-gen"), r"its host has no EPT"),
        (lambda: flushlab.compare("shadow", policies=["root-tlb-gen"]), r"its host has no EPT"),
        (lambda: flushlab.litmus("shadow-wp", policies=["root-tlb-gen"]), r"its host has no EPT"),
    ],
)
def test_bad_input_is_found_before_anything_runs(call, error: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match=error):
        call()


def test_a_class_without_a_text_is_refused() -> None:
    spaces: dict[str, object] = {"Policy": Policy, "__name__": "typed"}
    exec("class Typed(Policy):\n    def migration(self, cpu, vcpu):\n        return 'none'\n", spaces)
    with pytest.raises(BadInput, match=r"class Typed: found no text of it .*; expected a class in a file or"):
        flushlab.run(policy=spaces["Typed"])  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_installed_package_has_the_name(tmp_path: Path) -> None:
    """Import it as a user's program does, from a directory where nothing else lies."""
    program = "import flushlab; print(flushlab.__version__, flushlab.run.__name__)"
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"{flushlab.__version__} run\n", f"{done.stderr}\npip install -e . anew?"
