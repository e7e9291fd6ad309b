"""Policies from users' files: valid ones, and the errors for others."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.job.job import Job
from emulator.machine.runtime import MachineStopped
from emulator.policy import Policy, PolicyError, UserPolicyError, load_user_policy, resolve_policy
from emulator.report.result import Result
from emulator.report.summary import document
from emulator.scenario.config import Scenario, load_scenario
from emulator.scenario.sections import MachineSection

# The guide's worked example, word for word.
RETURNING = '''
"""A vCPU that comes back to a pCPU has flushed there before: why flush again?"""

from emulator.policy import Policy


class Returning(Policy):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def migration(self, cpu, vcpu):
        if (vcpu.id, cpu.id) in self.seen:
            return "none"
        self.seen.add((vcpu.id, cpu.id))
        return super().migration(cpu, vcpu)
'''


class Number:
    """An object with an id: a CPU or a vCPU."""

    def __init__(self, number: int) -> None:
        self.id = number

    def point(self, kind: str, obj: object, mode: str) -> None:
        """No other thread is there."""


def ask(policy: Policy, point: str, *arguments: Any) -> str:
    answer: str = getattr(policy, point)(*arguments)
    return answer


def migration(policy: Policy, cpu: int = 0, vcpu: int = 0) -> str:
    return ask(policy, "migration", Number(cpu), Number(vcpu))


def written(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(textwrap.dedent(text).lstrip())
    return path


def of(directory: Path, body: str, base: str = "Policy") -> Path:
    """A file with class Mine of the given body; its first line is the third of the file."""
    head = f"from emulator.policy import Policy\nclass Mine({base}):\n"
    path = directory / "mine.py"
    path.write_text(head + textwrap.indent(textwrap.dedent(body).strip(), "    ") + "\n")
    return path


def small() -> Scenario:
    scenario = load_scenario()
    vm = scenario.vm[0].model_copy(update={"count": 1, "memory": 16, "traces": ("cc1",)})
    return scenario.changed(vm=(vm,), machine=MachineSection(pcpus=2))


def run(policy: Policy, seconds: float) -> Result:
    job = Job(small(), policy, seed=1, duration=seconds, stop_at_violation=True)
    return job.run(lambda snapshot: None, threading.Event())


# --- policies that work ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_class_decides_some_points_and_its_base_the_others(tmp_path: Path) -> None:
    policy = resolve_policy(str(written(tmp_path, RETURNING, "returning.py")))
    assert policy.name == "returning"
    assert [migration(policy) for _ in range(3)] == ["all-contexts", "none", "none"]
    assert ask(policy, "root_load", Number(0), None, None) == "flush-current"
    assert policy.overrides() == {"migration": "returning.py:11"}
    assert policy.given() == {"migration": {"all-contexts": 1, "none": 2}}
    assert policy.mutants() == ("migration=none (returning.py:11)",)


def test_the_base_may_be_any_preset_and_the_name_any_name(tmp_path: Path) -> None:
    body = """
        base = "linux-6.12"
        name = "mine-on-6.12"
        def huge_recovery(self, cpu, kvm):
            return super().huge_recovery(cpu, kvm)
        """
    policy = load_user_policy(of(tmp_path, body))
    assert policy.name == "mine-on-6.12"
    assert ask(policy, "huge_recovery", Number(0), None) == "zap-each"
    assert policy.answers()["huge_recovery"] == "zap-each"


def test_a_mutant_as_a_base_stays_one(tmp_path: Path) -> None:
    body = """
        base = "mutant:requests-before-mode"
        def remote_kick(self, cpu, kvm):
            return "all-pcpus"
        """
    policy, mutant = load_user_policy(of(tmp_path, body)), resolve_policy("mutant:requests-before-mode")
    assert policy.answers() == mutant.answers()
    assert policy.mutants() == mutant.mutants() != ()


def test_of_classes_that_derive_from_each_other_the_last_is_meant(tmp_path: Path) -> None:
    text = """
        from emulator.policy import Policy
        class Some(Policy):
            def kick_wait(self, cpu, kvm):
                return "no-wait"
        class More(Some):
            def migration(self, cpu, vcpu):
                return "none"
        """
    policy = load_user_policy(written(tmp_path, text))
    assert policy.overrides() == {"kick_wait": "mine.py:3", "migration": "mine.py:6"}


def test_settings_win_over_the_class(tmp_path: Path) -> None:
    policy = load_user_policy(written(tmp_path, RETURNING)).with_settings({"migration": "active-roots"})
    assert policy.name == "mine+migration=active-roots"
    assert [migration(policy) for _ in range(2)] == ["active-roots", "active-roots"]
    assert policy.overrides() == {}
    assert policy.spelled() == f"{tmp_path / 'mine.py'}+migration=active-roots"
    again = policy.with_settings({"kick_wait": "no-wait"})
    assert migration(again) == "active-roots"
    assert again.mutants() == ("kick_wait=no-wait",)


def test_a_setting_changes_what_super_answers(tmp_path: Path) -> None:
    body = """
        def migration(self, cpu, vcpu):
            return self.answers()["kick_wait"] == "no-wait" and "none" or super().migration(cpu, vcpu)
        """
    policy = load_user_policy(of(tmp_path, body))
    assert migration(policy) == "all-contexts"
    assert migration(policy.with_settings({"kick_wait": "no-wait"})) == "none"


@pytest.mark.slow
def test_a_fresh_one_remembers_nothing(tmp_path: Path) -> None:
    policy = load_user_policy(written(tmp_path, RETURNING))
    migration(policy)
    fresh = policy.fresh()
    assert fresh.given() == {"migration": {}}
    assert migration(fresh) == "all-contexts"
    assert Policy().fresh() == Policy()


def test_a_fresh_one_knows_nothing_of_its_file_either(tmp_path: Path) -> None:
    """And keeps the text that was loaded, whatever has become of the file."""
    body = """
        seen = []
        def migration(self, cpu, vcpu):
            self.seen.append(vcpu.id)
            return "none" if len(self.seen) > 1 else super().migration(cpu, vcpu)
        """
    path = of(tmp_path, body)
    policy = load_user_policy(path)
    assert [migration(policy), migration(policy)] == ["all-contexts", "none"]
    path.write_text("nonsense")
    assert migration(policy.fresh()) == "all-contexts"
    assert migration(policy) == "none"


def test_helpers_and_constants_are_the_users_business(tmp_path: Path) -> None:
    body = """
        LIMIT = 3
        def _migratoin(self):
            return "none"
        def pcpus_of(self, vcpu):
            return 1
        def migration(self, cpu, vcpu):
            return self._migratoin()
        """
    assert migration(load_user_policy(of(tmp_path, body))) == "none"


# --- policies that do not load -----------------------------------------------------------------------------

BODIES = [
    ("def migration(self, cpu, vcpu)\n    return 1", ["mine.py:3", "SyntaxError", "expected ':'"]),
    ("x = 1 / 0", ["mine.py:3", "ZeroDivisionError"]),
    ("raise SystemExit(4)", ["mine.py:3", "SystemExit: 4"]),
    ("pass", ["mine.py:2", "Mine decides nothing", "remote_flush"]),
    (
        "def migratoin(self, cpu, vcpu):\n    return 'none'",
        ["mine.py:3: Mine.migratoin", "no such decision point", "expected migration,"],
    ),
    (
        "def migration(self, vcpu):\n    return 'none'",
        [
            "mine.py:3: Mine.migration",
            "migration(self, vcpu)",
            "expected a method migration(self, cpu, vcpu)",
        ],
    ),
    ("migration = 'none'", ["mine.py:3: Mine.migration", "'none'", "expected a method migration(self, cpu,"]),
    ("def mutants(self):\n    return ()", ["mine.py:3: Mine.mutants", "this name is taken"]),
    ("base = 'linux-9'", ["mine.py:3: Mine.base", "'linux-9'", "linux-7.3"]),
    ("base = 9", ["mine.py:3: Mine.base", "9", "the name of a preset"]),
    (
        "x = 1\ndef __init__(self):\n    self.y = 1\ndef kick_wait(self, cpu, kvm):\n    return 'wait'",
        ["mine.py:4: Mine.__init__", "super().__init__()"],
    ),
    (
        "def __init__(self, size):\n    pass\ndef kick_wait(self, cpu, kvm):\n    return 'wait'",
        ["mine.py:3: Mine.__init__", "size", "without arguments"],
    ),
    (
        "def __init__(self):\n    super().__init__(migraton='none')\ndef kick_wait(self, cpu, kvm):\n  pass",
        ["mine.py:4: Mine.__init__", "did you mean migration?"],
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("body", "words"), BODIES)
def test_what_cannot_be_used_is_one_line(
    body: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = of(tmp_path, body)
    with pytest.raises(UserPolicyError) as error:
        load_user_policy(path)
    assert main(["run", "--policy", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for word in words:
        assert word in err
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x = 1\n", ["no policy", "one class that derives from emulator.policy.Policy"]),
        (b"\x00\x01", ["mine.py"]),
        (b"\xff\xfe\xfd", ["mine.py", "SyntaxError"]),
        (
            b"from emulator.policy import Policy\nclass A(Policy): pass\n\nclass B(Policy): pass\n",
            ["2 policies, A (line 2) and B (line 4)", "one class"],
        ),
    ],
)
def test_files_without_one_policy(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    with pytest.raises(PolicyError) as error:
        load_user_policy(path)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert isinstance(error.value, BadInput)


def test_no_such_file() -> None:
    with pytest.raises(PolicyError, match=r"nowhere\.py: No such file"):
        resolve_policy("nowhere.py")


# --- policies that fail when they are asked ----------------------------------------------------------------

ANSWERS = [
    ("return None", "mine.py:3: Mine.migration: returned None; expected one of all-contexts,"),
    ("return 'All'", "returned 'All'"),
    ("return 'active-root'", "(did you mean active-roots?)"),
    ("return ['none']", "returned ['none']"),
    ("yield 'none'", "returned <generator"),
    ("return {}[vcpu.id]", "mine.py:4: Mine.migration: KeyError: 0; expected one of"),
    ("raise SystemExit", "mine.py:4: Mine.migration: SystemExit; expected"),
    ("return self.migration(cpu, vcpu)", "mine.py:4: Mine.migration: RecursionError"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "words"), ANSWERS)
def test_wrong_answers_name_the_method(line: str, words: str, tmp_path: Path) -> None:
    policy = load_user_policy(of(tmp_path, f"def migration(self, cpu, vcpu):\n    {line}"))
    with pytest.raises(UserPolicyError) as error:
        migration(policy)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    # Nor does it count.
    assert policy.given() == {"migration": {}}


@pytest.mark.slow
def test_the_error_crosses_process_boundaries(tmp_path: Path) -> None:
    policy = load_user_policy(of(tmp_path, "def migration(self, cpu, vcpu):\n    return 7"))
    with pytest.raises(UserPolicyError) as error:
        migration(policy)
    again = pickle.loads(pickle.dumps(error.value))
    assert type(again) is UserPolicyError
    assert str(again) == str(error.value)


def test_a_machine_that_stops_is_not_the_policys_fault(tmp_path: Path) -> None:
    body = """
        def migration(self, cpu, vcpu):
            from emulator.machine.runtime import Cpu, lib
            Cpu.fail(cpu, lib.MACHINE_STOPPED)
        """
    with pytest.raises(MachineStopped):
        migration(load_user_policy(of(tmp_path, body)))


# Asked under mmu_lock held for write; with interrupts off; in the scheduler's hook; while the machine boots.
POINTS = ["notifier_flush", "entry_order", "migration", "root_load"]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_failure_ends_the_run_in_order(point: str, tmp_path: Path) -> None:
    arguments = {"notifier_flush": "cpu, kvm, gfn", "root_load": "cpu, vcpu, root"}.get(point, "cpu, vcpu")
    policy = load_user_policy(of(tmp_path, f"def {point}(self, {arguments}):\n    raise ValueError('mine')"))
    before = threading.active_count()
    with pytest.raises(UserPolicyError, match=rf"mine\.py:4: Mine\.{point}: ValueError: mine"):
        run(policy, 20.0)
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_failure_while_running_is_one_line_and_status_2(tmp_path: Path) -> None:
    path = of(tmp_path, "def migration(self, cpu, vcpu):\n    return 'nothing'")
    # The run would take longer than the test may.
    command = [sys.executable, "-m", "emulator", "run", "--policy", str(path), "--log-level", "error"]
    command += ["--duration", "10m"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"flushlab: {path}:3: Mine.migration: returned 'nothing'; expected one of")
    assert ended.stderr.count("\n") == 1


# --- in the report of a run --------------------------------------------------------------------------------


def test_the_worked_example_is_readmes() -> None:
    text = (Path(__file__).parents[3] / "emulator/guide/policies.md").read_text("utf-8")
    assert RETURNING.strip() in text or "class Returning" not in text


@pytest.mark.slow
def test_the_worked_example_is_caught_and_named(tmp_path: Path) -> None:
    result = run(load_user_policy(written(tmp_path, RETURNING, "returning.py")), 20.0)
    assert result.verdict == "violations"
    policy = json.loads(json.dumps(document(result)))["policy"]
    assert policy["name"] == "returning"
    assert policy["overridden"]["migration"]["where"] == "returning.py:11"
    assert policy["overridden"]["migration"]["answers"]["none"] > 0
    assert result.snapshot.kvm("flushes_elided") > 0
    assert "migration=none (returning.py:11)" in result.reports[0].text


@pytest.mark.slow
def test_the_repaired_example_is_clean(tmp_path: Path) -> None:
    text = RETURNING.replace('"none"', '"active-roots"')
    result = run(load_user_policy(written(tmp_path, text)), 2.0)
    assert not result.snapshot.violations, result.reports[0].text
    assert result.policy_given["migration"]["active-roots"] > 0


@pytest.mark.slow
def test_explore_judges_it_and_replays_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, RETURNING, "returning.py")
    found = tmp_path / "found"
    assert main(["explore", "return-zap", "--policy", str(path), "--output", str(found)]) == 1
    (counterexample,) = found.glob("*.json")
    assert main(["explore", "--replay", str(counterexample)]) == 1
    assert "flush for migration, ELIDED" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["litmus", "explore", "compare"])
def test_whoever_asks_a_broken_one_says_so_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(of(tmp_path, "def migration(self, cpu, vcpu):\n    return 'nothing'"))
    arguments = {
        "litmus": ["litmus", "return-zap", "--policy", path, "--iterations", "5"],
        "explore": ["explore", "return-zap", "--policy", path],
        "compare": ["compare", "--policy", path, "--policy", "linux-7.3", "--duration", "1s", "main"],
    }[command]
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"flushlab: {path}:3: Mine.migration: returned 'nothing'; expected one of")
