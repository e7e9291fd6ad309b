"""`flushlab top`: rates between two scrapes, the view, and the command against a real service."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from emulator.cli.main import main
from emulator.top.sample import Interval, NoService, Sample, parse
from emulator.top.view import View

HEAD = (
    'flushlab_build_info{policy="p",scenario="main",seed="1",version="0"} 1.0\n'
    'flushlab_run_info{pcpus="2",policy="p",scenario="main",vms="2"} 1.0\n'
)


def metrics(n: float, violations: int = 0, cpus: int = 0) -> str:
    """Return a service's text after n units of work."""
    lines = [
        f"flushlab_guest_accesses_total {1000 * n}",
        f'flushlab_tlb_flushes_total{{vm="0",scope="invept_global",reason="migration"}} {30 * n}',
        f'flushlab_tlb_flushes_total{{vm="1",scope="invept_global",reason="migration"}} {10 * n}',
        f'flushlab_tlb_flushes_total{{vm="1",scope="invept_single",reason="root_load"}} {4 * n}',
        f'flushlab_tlb_flushes_necessary_total{{vm="0",scope="invept_global",reason="migration"}} {10 * n}',
        f'flushlab_violations_total{{kind="use-after-free"}} {violations}',
        f'flushlab_vcpu_pause_seconds_bucket{{le="1e-06"}} {n}',
        f'flushlab_vcpu_pause_seconds_bucket{{le="0.001"}} {2 * n}',
        f'flushlab_vcpu_pause_seconds_bucket{{le="+Inf"}} {2 * n}',
        *(f'flushlab_pcpu_ipis_received_total{{cpu="{cpu}"}} {(cpu + 1) * n}' for cpu in range(cpus)),
    ]
    return HEAD + "\n".join(lines) + "\n"


def interval(before: str, now: str, seconds: float = 2.0) -> Interval:
    return Interval(parse(before, 10.0), parse(now, 10.0 + seconds))


def drawn(view: View, found: Interval, lines: int = 0) -> str:
    console = Console(width=100, file=StringIO(), highlight=False)
    with console.capture() as capture:
        console.print(view.draw(found, lines=lines))
    return capture.get()


def test_rates_are_those_of_the_interval() -> None:
    found = interval(metrics(10), metrics(20))
    assert found.rate("guest_accesses_total") == 5000
    assert found.rates("tlb_flushes_total", "vm") == {("0",): 150, ("1",): 70}
    assert found.rates("tlb_flushes_total", "scope", "reason") == {
        ("invept_global", "migration"): 200, ("invept_single", "root_load"): 20,
    }  # fmt: skip
    assert found.rate("nothing_total") == 0
    assert found.now.info()["policy"] == "p"


def test_a_service_that_was_started_again_counts_from_zero() -> None:
    assert interval(metrics(1000), metrics(2)).rate("guest_accesses_total") == 1000


def test_no_share_of_necessary_flushes_is_above_all_of_them() -> None:
    """Two flushes of this interval, whose uses and those of five earlier ones came in it."""
    label = '{vm="0",scope="invept_global",reason="migration"}'
    before, now = (
        f"{HEAD}flushlab_tlb_flushes_total{label} {flushes}\n"
        f"flushlab_tlb_flushes_necessary_total{label} {n}\n"
        for flushes, n in ((10, 0), (12, 7))
    )
    (row,) = (line for line in drawn(View(), interval(before, now)).splitlines() if "migration" in line)
    assert row.split()[-2:] == ["100", "%"]


def test_percentiles_are_of_the_intervals_samples() -> None:
    found = interval(metrics(10), metrics(20))
    assert found.percentile("vcpu_pause_seconds", 50) == 1e-6
    assert found.percentile("vcpu_pause_seconds", 99) == 0.001
    assert interval(metrics(10), metrics(10)).percentile("vcpu_pause_seconds", 50) is None
    assert Interval(Sample(0), Sample(1)).percentile("vcpu_pause_seconds", 50) is None


@pytest.mark.parametrize("text", ["", "<html>", "up 1\n", 'flushlab_x{vm="0" 1\n', "flushlab_x one\n"])
def test_another_service_is_refused(text: str) -> None:
    with pytest.raises(NoService):
        parse(text, 0)


def test_the_view_has_vms_flushes_pauses_and_pcpus() -> None:
    text = drawn(View(), interval(metrics(10, cpus=3), metrics(20, cpus=3)))
    rows = [line.split() for line in text.splitlines()]
    assert text.startswith("main under p  2 pCPUs, 2 VMs, seed 1, version 0")
    assert "no violations" in text
    assert ["0", "150", "0", "0", "0", "0", "0"] in rows
    assert ["invept", "global", "migration", "200", "25", "%"] in rows
    assert [row[:2] for row in rows if row and row[0] in "012"][-3:] == [["0", "5"], ["1", "10"], ["2", "15"]]
    assert "runs without --metrics-per-cpu" in drawn(View(), interval(metrics(1), metrics(2)))


def test_violations_are_named_as_they_come() -> None:
    view = View()
    assert "violations: 3 use-after-free" in drawn(view, interval(metrics(1, 3), metrics(2, 3)))
    text = drawn(view, interval(metrics(2, 3), metrics(3, 5)))
    assert "violations: 5 use-after-free" in text
    assert "new, the latest first: 2 use-after-free" in text
    assert "1 use-after-free; 2 use-after-free" in drawn(view, interval(metrics(3, 5), metrics(4, 6)))


def test_a_small_screen_has_fewer_rows() -> None:
    text = drawn(View(), interval(metrics(1, cpus=64), metrics(2, cpus=64)), lines=30)
    assert "and 60 more" in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["x"], "ADDRESS: found 'x'; expected [HOST:]PORT"),
        (["1"], "ADDRESS 127.0.0.1:1: Connection refused; expected the address of a running flushlab serve"),
        (["1", "--interval", "0"], "--interval: found '0'; expected more than 0s"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *arguments]) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"flushlab: {error}")
    assert found.count("\n") == 1


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service with a policy that violates; yields its process and its port."""
    log = tmp_path_factory.mktemp("top") / "log"
    command = [sys.executable, "-m", "emulator", "serve", "--metrics", "0", "--metrics-per-cpu"]
    options = ["--set", "migration=none", "--seed", "1"]
    with (
        log.open("w") as errors,
        subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while "booted" not in (text := log.read_text()):
                assert process.poll() is None, text
                assert time.monotonic() < deadline, text
                time.sleep(0.05)
            found = re.search(r":(\d+)/metrics", text)
            assert found, text
            yield process, found[1]
        finally:
            process.kill()


def until(descriptor: int, wanted: str, seconds: float = 60) -> str:
    """Read a terminal until a text is there."""
    text, deadline = "", time.monotonic() + seconds
    while wanted not in text:
        assert time.monotonic() < deadline, text[-2000:]
        if select.select([descriptor], [], [], 0.2)[0]:
            text += os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    return text


@pytest.mark.stress
def test_a_real_service_in_a_pipe_and_in_a_terminal(
    service: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    process, port = service
    command = [sys.executable, "-m", "emulator", "top", port, "--interval", "500ms"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    accesses = next(row for row in rows if row[:2] == ["guest", "accesses"])
    assert accesses[2] != "0"
    assert [row[0] for row in rows if len(row) == 4 and row[0].isdecimal()] == ["0", "1", "2", "3"]

    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as viewer:
        os.close(slave)
        try:
            until(master, "violations: ")
            until(master, "flushes per second")
            # The service ends, and the view says so and goes on.
            process.send_signal(signal.SIGTERM)
            until(master, "still trying (Ctrl-C ends)")
            assert viewer.poll() is None
            viewer.send_signal(signal.SIGINT)
            assert viewer.wait(20) == 0
        finally:
            viewer.kill()
            os.close(master)
