"""`flushlab explore --audit`."""

from __future__ import annotations

import json

import pytest

from emulator.cli.main import main
from emulator.machine.runtime import Cpu, Mode
from emulator.points import PointKind


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    return main(["explore", "--audit", *arguments]), capsys.readouterr().out


@pytest.fixture
def no_points_at_memslots(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Cpu.point

    def others(cpu: Cpu, kind: PointKind, obj: object, mode: Mode) -> None:
        if kind not in ("memslots", "mode"):
            point(cpu, kind, obj, mode)

    monkeypatch.setattr(Cpu, "point", others)


@pytest.mark.slow
def test_nothing_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "return-zap", "slot-delete-fault", "--policy", "linux-7.3")
    assert (code, out.count("\n")) == (0, 1)
    assert "2 of 2 tests and policies without a finding, 40 random executions" in out


@pytest.mark.slow
@pytest.mark.usefixtures("no_points_at_memslots")
def test_what_is_found_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "slot-delete-fault", "--executions", "10")
    assert code == 1
    assert "emulator.kvm.virt.requests.set_mode: vcpu_set_mode" in out
    assert "Kvm.memslots[]: read in kvm_memslots, written in kvm_swap_active_memslots" in out
    assert "0 of 1 tests and policies without a finding, 10 random executions" in out


@pytest.mark.slow
@pytest.mark.usefixtures("no_points_at_memslots")
def test_the_document_is_the_same_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(capsys, "slot-delete-fault", "--executions", "3", "--seed", "5", "--json")
    assert code == 1
    (one,) = json.loads(out)["audited"]
    assert (one["test"], one["executions"]) == ("slot-delete-fault", 3)
    assert one["unannounced"]
    assert run(capsys, "slot-delete-fault", "--executions", "3", "--seed", "5", "--json")[1] == out


def test_an_audit_of_nothing_is_not_called_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """A single vCPU's steps have no neighbours of another thread."""
    words = ("guest-pge", "return-zap", "--executions", "2")
    code, out = run(capsys, *words)
    assert code == 0
    assert "2 of 2 tests and policies without a finding, 4 random executions" in out
    assert "\n1 of these inconclusive, no steps to swap: guest-pge under linux-7.3\n" in out
    found = json.loads(run(capsys, *words, "--json")[1])["audited"]
    assert [(one["test"], one["verdict"], bool(one["swaps"])) for one in found] == [
        ("guest-pge", "inconclusive", False),
        ("return-zap", "clean", True),
    ]
