"""vCPUs that are in guest mode during the host's work, the IPIs that stop them, and replays in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.hosttrace.workload import Workload
from emulator.hosttrace.workload_file import text_of
from emulator.policy import spelled_policy
from emulator.replay import machine
from emulator.replay.machine import Replay
from tests.emulator.hosttrace.made_up import kick, leave
from tests.emulator.replay.recording import HOST, TASKS, Recording, workload_of


class Running(Recording):
    """A recording that shows exits and, if `masks` is set, the interrupts of kicks."""

    masks = False

    def exit(self, vcpu: int) -> None:
        task = TASKS[vcpu]
        self.lines.append(leave(task, self.cpu[task], self.tick()))

    def begin(self) -> None:
        """Both vCPUs enter, exit and enter, and have mapped two pages."""
        for vcpu in range(2):
            self.enter(vcpu)
            self.exit(vcpu)
            self.write(vcpu, 0x200 + vcpu)

    def interrupted(self, mask: str) -> None:
        """Unmap a page while kicks stop the CPUs of the mask."""
        self.unmap(0x200, 1)
        place = max(i for i, line in enumerate(self.lines) if "make_all_cpus_request" in line.name)
        self.lines.insert(place + 1, kick(HOST, 0, self.lines[place].micros + 1, mask))


def placed(workload: Workload) -> list[tuple[str, int]]:
    return [
        (step.verb, step.vcpu)
        for step in workload.steps
        if step.verb in ("stay", "leave", "unmap", "zap-all")
    ]


def test_those_in_guest_mode_at_the_flush_stay() -> None:
    recording = Running()
    recording.begin()
    recording.exit(1)
    recording.unmap(0x200, 1)
    assert placed(workload_of(recording)) == [("stay", 0), ("unmap", -1)]


def test_without_exits_no_vcpu_stays() -> None:
    recording = Recording()
    recording.enter(0)
    recording.write(0, 0x200)
    recording.unmap(0x200, 1)
    assert placed(workload_of(recording)) == [("unmap", -1)]


def test_a_kicks_interrupts_are_more_exact_than_exits() -> None:
    recording = Running()
    recording.begin()
    recording.exit(0)
    recording.interrupted("4")  # CPU 2, where vCPU 1 is
    assert placed(workload_of(recording)) == [("stay", 1), ("unmap", -1)]
    # The next flush stops none: its kick shows no interrupt, though vCPU 1 is in guest mode.
    recording.write(1, 0x201)
    recording.unmap(0x201, 1)
    assert placed(workload_of(recording)) == [("stay", 1), ("unmap", -1), ("unmap", -1)]


@pytest.mark.slow
def test_a_replay_interrupts_as_the_recording_does() -> None:
    recording = Running()
    recording.begin()
    recording.interrupted("6")
    recording.write(0, 0x200)
    recording.interrupted("2")
    workload = workload_of(recording)
    assert workload.recorded["kick_ipis"] == 3
    policy = spelled_policy("linux-6.12")
    with policy.confined(), Replay(workload, policy) as replay:
        snapshot = replay.run()
    assert snapshot is not None
    assert snapshot.counters["ipis_sent"] == 3
    assert snapshot.counters["ipis_received"] == 3
    # Both vCPUs flush for each request, whether a kick stopped them or not.
    assert snapshot.kvm("flush_all") == 4 == workload.recorded["flush_all"]


@pytest.mark.slow
def test_two_requests_while_a_vcpu_is_out_are_one_flush() -> None:
    recording = Running()
    recording.begin()
    recording.interrupted("6")
    recording.lines = [line for line in recording.lines if line.name != "p_vmx_flush_tlb_all_0"][:-2]
    recording.unmap(0x201, 1)  # the entries after the first flush are gone
    workload = workload_of(recording)
    policy = spelled_policy("linux-6.12")
    with policy.confined(), Replay(workload, policy) as replay:
        snapshot = replay.run()
    assert snapshot is not None
    assert snapshot.kvm("remote_tlb_flush_requests") == 2
    assert snapshot.kvm("flush_all") == 2


class Clock:
    """A clock that only sleeping moves, and each event by a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept = 0.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds


@pytest.mark.slow
@pytest.mark.parametrize(("speed", "slept"), [(0.0, 0.0), (1.0, 3.0), (10.0, 0.3)])
def test_a_replay_in_time(speed: float, slept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    recording.enter(0)
    recording.tick(3_000_000)
    recording.write(0, 0x200)
    clock = Clock()
    monkeypatch.setattr(machine, "time", clock)
    policy = spelled_policy("linux-6.12")
    with policy.confined(), Replay(workload_of(recording), policy, speed) as replay:
        assert replay.run() is not None
    assert clock.slept == pytest.approx(slept, abs=0.1)
    assert (replay.lag > 0) is (speed > 0)


@pytest.mark.slow
def test_the_speed_and_the_delay_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = Running()
    recording.begin()
    path = tmp_path / "kvm.workload"
    path.write_text(text_of(workload_of(recording)))
    assert main(["replay", str(path), "--speed", "100"]) == 0
    assert "latest event, ms" in capsys.readouterr().out
    assert main(["replay", str(path), "--speed", "100", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["speed"] == 100
    assert document["policies"][0]["lag_seconds"] >= 0
    assert main(["replay", str(path), "--speed", "-1"]) == 2
    assert capsys.readouterr().err == ("flushlab: --speed: found -1; expected a number from 0 to 1e+06\n")


def test_a_write_of_cr4_without_its_event() -> None:
    recording = Running()
    recording.begin()
    for reason, info in (("write_cr4", 0), ("CR_ACCESS", 0x104), ("CR_ACCESS", 0x100), ("HLT", 0)):
        recording.lines.append(leave(TASKS[0], recording.cpu[TASKS[0]], recording.tick(), reason))
        line = recording.lines[-1]
        fields = line.fields.replace("info1 0x0000000000000000", f"info1 {info:#018x}")
        recording.lines[-1] = line._replace(fields=fields)
        recording.probe(0, "kvm_mmu_load")
        recording.enter(0)
    found = [(step.vcpu, step.start) for step in workload_of(recording).steps if step.verb == "cr4"]
    assert found == [(0, 0x10), (0, 0x10)]
