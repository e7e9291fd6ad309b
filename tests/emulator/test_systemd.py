"""The service under systemd: its unit, and what it tells the manager."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from emulator.cli.systemd import ServiceManager
from native import ffi

UNIT = Path(__file__).parents[2] / "metrics/service/flushlab.service"


def _manager(tmp_path: Path) -> socket.socket:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(60)
    return manager


@pytest.mark.stress
def test_serve_tells_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    command = [sys.executable, "-m", "emulator", "serve", "balloon", "--metrics", "0"]
    with _manager(tmp_path) as manager:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as serve:
            try:
                assert manager.recv(1000).startswith(b"READY=1\nSTATUS=")
                assert serve.stderr is not None
                url = next(found[0] for line in serve.stderr if (found := re.search(r"http://\S+", line)))
                with urllib.request.urlopen(f"{url.removesuffix('/metrics')}/-/ready", timeout=30) as answer:
                    assert answer.status == 200
                serve.send_signal(signal.SIGTERM)
                assert manager.recv(1000) == b"STOPPING=1"
            finally:
                serve.terminate()
                serve.communicate(timeout=60)
        assert serve.returncode in (0, 130, 143)


def test_abstract_names_and_no_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"flushlab-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}")
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        ServiceManager().machine_down()
        assert manager.recv(100) == b"STOPPING=1"
    # The manager has gone, was never there, or has an address of another kind.
    for address in (f"@{name}", "", "vsock:1:2", "/no/such/socket"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        ServiceManager().machine_up(ffi.NULL, pcpus=1, vms=1)


def test_the_unit_restarts_what_a_restart_can_help() -> None:
    text = UNIT.read_text("utf-8")
    assert "Type=notify\n" in text
    # With `main`, systemd would wait in vain for `serve --kernel`, and end it after TimeoutStartSec.
    assert "NotifyAccess=all\n" in text
    # 1 is a verdict and 2 the user's input; an internal failure is 3.
    assert "RestartPreventExitStatus=1 2\n" in text


@pytest.mark.slow
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (apt-get install systemd)")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(UNIT)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    broken = tmp_path / "broken.service"
    broken.write_text(UNIT.read_text("utf-8").replace("Restart=on-failure", "Restart=perhaps"))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(broken)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "perhaps" in done.stderr
