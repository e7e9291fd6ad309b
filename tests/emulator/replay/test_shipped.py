"""The shipped workload, and the table of it in the guide."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from emulator.cli.main import main
from emulator.hosttrace.workload_file import read_workload, shipped_workloads
from tests.emulator.replay.test_replay import replayed

_NAME = "numa-balancing.workload"
_COMMAND = f"flushlab replay {_NAME} "


def test_its_shape_is_that_of_the_host() -> None:
    workload = read_workload(shipped_workloads()[_NAME])
    unmaps = [step for step in workload.steps if step.verb == "unmap"]
    assert workload.vms == [172]
    assert workload.pcpus == 172
    # One page each, 3,000 a second, while all vCPUs are in guest mode.
    assert all(step.end - step.start == 1 for step in unmaps)
    assert len(unmaps) / workload.seconds == pytest.approx(3000, rel=0.1)
    assert sum(step.verb == "stay" for step in workload.steps) == 172 + len(unmaps)
    assert sum(step.verb == "write" for step in workload.steps) == len(unmaps)


def _short(ranges: int) -> list[str]:
    """Return the lines of the workload with so many ranges."""
    text = shipped_workloads()[_NAME].read_text("utf-8").splitlines()
    ends = [i for i, line in enumerate(text) if " write " in line]
    return text[: ends[ranges - 1] + 2]


@pytest.mark.stress
def test_each_range_interrupts_all_vcpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("short") / _NAME
    path.write_text("\n".join(_short(2)) + "\n")
    snapshot = replayed(read_workload(path), "linux-7.3")
    assert snapshot.kvm("remote_tlb_flush_requests") == 2
    assert snapshot.counters["ipis_sent"] == 2 * 172
    # The vCPU that faults a page in has flushed at the entry after the kick, as the others.
    assert snapshot.kvm("flush_all") == 2 * 172


def _rows(text: str) -> dict[str, list[str]]:
    found = {}
    for line in text.splitlines():
        if (row := re.fullmatch(r" *(\S.*?) {2,}(\S.*)", line)) is not None:
            found[row[1]] = row[2].split()
    return found


@pytest.mark.stress
@pytest.mark.timeout(280)
def test_the_table_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    page = resources.files("emulator").joinpath("guide/hosts.md").read_text("utf-8")
    after = page[page.index(_COMMAND) :]
    command = after[: after.index("`")]
    table = re.search(r"\n\n((?: {4}.*\n)+)", after)
    assert table is not None
    assert main([*command.split()[1:]]) == 0
    printed = _rows(capsys.readouterr().out)
    shown = _rows(table[1])
    assert len(shown) >= 8
    assert {name: printed.get(name) for name in shown} == shown
