"""The command line with a canned job: accepted input, output and exit status."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from emulator import __version__
from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.policy import PRESETS
from tests.emulator.canned import CannedJob, result, snapshot, violated


@pytest.fixture(autouse=True)
def _job(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("emulator.job.job")
    module.Job = CannedJob  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "emulator.job.job", module)
    monkeypatch.setattr(CannedJob, "made", [])
    for name in [name for name in os.environ if name.startswith("FLUSHLAB_")]:
        monkeypatch.delenv(name)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command complains with."""
    status = main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert CannedJob.made == [], "a job was made from bad input"
    return err


def test_run_prints_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert "clean" in out
    assert "starting scenario=main policy=linux-7.3 seed=7" in err
    assert "stopped" in err


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--json", "--log-level", "debug"]) == 0
    out, _ = capsys.readouterr()
    assert json.loads(out)["verdict"] == "clean"
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (result, 0),
        (violated, 1),
        (lambda: result(snapshot(flushes=())), 0),
        (lambda: result(failure="PCpu 1 died: boom"), 3),
    ],
)
def test_exit_status(
    ending: Any, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CannedJob, "ending", staticmethod(ending))
    assert main(["run"]) == status
    # The document says the same.
    assert main(["run", "--json"]) == status
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_status"] == status


def test_inconclusive_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(CannedJob, "ending", staticmethod(lambda: result(snapshot(flushes=()))))
    main(["run"])
    assert "inconclusive" in capsys.readouterr().out


def test_internal_failure_has_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(CannedJob, "run", explode)
    assert main(["run"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "RuntimeError: boom" in err


def test_bad_input_found_while_booting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise BadInput("main", "no memory", "more memory")

    monkeypatch.setattr(CannedJob, "run", refuse)
    assert main(["run", "--log-level", "error"]) == 2
    assert capsys.readouterr().err == "flushlab: main: no memory; expected more memory\n"


def test_options_reach_the_job() -> None:
    options = ["--duration", "5m", "--seed", "9", "--chaos", "100", "--geometry", "unbounded"]
    assert main(["run", *options, "--set", "root_load=none"]) == 0
    (job,) = CannedJob.made
    assert job.options == {"seed": 9, "duration": 300.0, "chaos": 100, "unbounded": True}
    assert job.policy.answers()["root_load"] == "none"


def test_environment_mirrors_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUSHLAB_DURATION", "2s")
    monkeypatch.setenv("FLUSHLAB_SEED", "3")
    monkeypatch.setenv("FLUSHLAB_SET", "root_load=none write_protect=none")
    assert main(["run"]) == 0
    (job,) = CannedJob.made
    assert job.options["duration"] == 2.0
    assert job.options["seed"] == 3
    answers = job.policy.answers()
    assert (answers["root_load"], answers["write_protect"]) == ("none", "none")


def test_the_scenario_has_a_duration_unless_told_otherwise(tmp_path: Path) -> None:
    scenario = tmp_path / "own.toml"
    scenario.write_text('duration = "7s"\n[[vm]]\n')
    assert main(["run", str(scenario)]) == 0
    assert CannedJob.made[0].options["duration"] == 7.0


@pytest.mark.slow
def test_seeds_differ_unless_given() -> None:
    main(["run"])
    main(["run"])
    first, second = (job.options["seed"] for job in CannedJob.made)
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--set", "migration"], ["--set", "'migration'", "point=alternative"]),
        (["run", "--set", "migratoin=none"], ["--set", "'migratoin'", "migration"]),
        (["run", "--set", "migration=nothing"], ["--set", "migration", "'nothing'", "all-contexts"]),
        (["run", "--policy", "linux-2.0"], ["--policy", "'linux-2.0'", "linux-7.3"]),
        (["run", "--duration", "3 days"], ["--duration", "'3 days'", "30s"]),
        (["run", "--duration", "0s"], ["--duration", "more than 0s"]),
        (["run", "--metrics", "http"], ["--metrics", "'http'", "[HOST:]PORT"]),
        (["run", "--chaos", "-1"], ["--chaos", "-1"]),
        (["run", "--seed", "x"], ["--seed", "x"]),
        (["run", "--geometry", "round"], ["--geometry", "round", "unbounded"]),
        (["run", "--log-level", "loud"], ["--log-level", "loud", "warning"]),
        (["run", "--colour"], ["--colour", "flushlab run"]),
        (["run", "a", "b"], ["flushlab run", "b"]),
        (["run", "nowhere"], ["'nowhere'", "main"]),
        (["run", "nowhere.toml"], ["nowhere.toml", "No such file"]),
        (["walk"], ["flushlab", "walk"]),
        (["list", "polices"], ["flushlab list", "polices"]),
        (["run", "--report-dir", "/proc/nowhere"], ["--report-dir", "/proc/nowhere"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capsys, *arguments)
    for word in words:
        assert word in line


def test_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = complaint(capsys, "run", "--metrics", str(port))
    assert f"--metrics: port {port} on 127.0.0.1 is in use" in line


def test_too_many_pcpus_names_the_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from emulator.scenario import limits

    monkeypatch.setattr(limits, "_thread_limits", lambda *_: iter([limits.Limit(100, "kernel.threads-max")]))
    scenario = tmp_path / "big.toml"
    scenario.write_text("[machine]\npcpus = 1024\n[[vm]]\n")
    line = complaint(capsys, "run", str(scenario))
    assert "machine.pcpus = 1024" in line
    assert "machine.pcpus of at most 63" in line


def test_report_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CannedJob, "ending", staticmethod(violated))
    assert main(["run", "--report-dir", str(tmp_path / "new")]) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "result.json",
        "violation-0001.json",
    ]
    violation = json.loads((tmp_path / "new" / "violation-0001.json").read_text())
    assert violation["kind"] == "use-after-free"
    assert violation["cpu"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_run_and_the_summary_is_printed(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CannedJob, "until_stopped", True)
    before = signal.getsignal(number)
    CannedJob.waits.clear()

    def kill() -> None:
        assert CannedJob.waits.wait(20)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=kill)
    killer.start()
    assert main(["serve", "--metrics", "0"]) == 0
    killer.join()
    out, err = capsys.readouterr()
    assert "interrupted" in out
    assert f"stopping signal={number.name}" in err
    assert "serving metrics url=http://127.0.0.1:" in err
    assert signal.getsignal(number) is before


def test_list_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "policies"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS)


def test_list_points_marks_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "points"]) == 0
    out = capsys.readouterr().out
    assert "migration_vpid" in out
    assert "    no-wait (known to be wrong)\n" in out


def test_list_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "scenarios"]) == 0
    assert "main" in capsys.readouterr().out


@pytest.mark.slow
def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flushlab {__version__}\n"
    for command in ([], ["run"], ["serve"], ["list"], ["trace"]):
        assert main([*command, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage" in "".join(capsys.readouterr())


@pytest.mark.slow
def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "emulator", "run", "--set", "x"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "flushlab: --set: found 'x'; expected point=alternative, as in migration=none\n"


HANGING = """
import signal, sys, threading, types
from tests.emulator.canned import CannedJob
from emulator import interrupts
from emulator.cli import main as cli

class Hanging(CannedJob):
    def run(self, progress, stop):
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait()

module = types.ModuleType("emulator.job.job")
module.Job = Hanging
sys.modules["emulator.job.job"] = module
interrupts.GIVE_UP_SECONDS = 0.5
interrupts.allow = lambda seconds: None
interrupts._State.patience = 0.5
sys.exit(cli.main(["run"]))
"""


@pytest.mark.slow
def test_a_job_that_does_not_stop_is_given_up_with_stacks() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [sys.executable, "-c", HANGING],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    assert ended.returncode == 3
    assert "still running" in ended.stderr
    assert "in run" in ended.stderr, "the stack of the thread that hangs"


@pytest.mark.slow
def test_nothing_heavy_is_imported_before_a_command_needs_it() -> None:
    heavy = ("numpy", "cffi", "native", "loguru", "prometheus_client", "greenlet", "matplotlib")
    code = f"""
import sys
from emulator.cli.main import main
main(["--help"])
main(["run", "--help"])
sys.exit(", ".join(name for name in {heavy!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.slow
def test_a_checkout_without_the_core_says_what_to_type(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for package in ("emulator", "native", "metrics"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "build"))
    # An editable installation would find the core where it was built.
    (tmp_path / "native" / "_native.py").write_text("raise ModuleNotFoundError(name='native._native')\n")
    done = subprocess.run(
        [sys.executable, "-m", "emulator", "list", "points"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith(f"flushlab: the C core is not built in {tmp_path}: type 'pip install -e .'")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("library", ["typer", "rich.console"])
def test_a_python_without_the_libraries_says_what_to_type(library: str) -> None:
    missing = (
        "import sys, runpy\n"
        f"sys.modules['{library}'] = None\n"
        "sys.argv = ['flushlab', 'list', 'points']\n"
        "runpy.run_module('emulator', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", missing], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith(f"flushlab: {library} is not installed for {sys.executable}: type 'pip")
    assert done.stderr.count("\n") == 1
