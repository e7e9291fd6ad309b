"""The scrape endpoint, alone and under a real Prometheus."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from support import BareMachine, wait_until

from metrics import Endpoint, MachineCollector, parse_address
from native import lib


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "x", "65536", "-1", ":9464", "localhost:", "localhost:http", "9464 "])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="HOST"):
        parse_address(text)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def collector_of(machine: BareMachine) -> MachineCollector:
    collector = MachineCollector({"policy": "linux-7.3", "scenario": "test"})
    collector.machine_up(machine.pointer, pcpus=machine.pcpus, vms=machine.vms)
    return collector


def test_serves_and_closes(bare_machine: BareMachine) -> None:
    bare_machine.count(0, lib.COUNT_ACCESSES, 42)
    with Endpoint(collector_of(bare_machine), "127.0.0.1", 0) as endpoint:
        text = fetch(endpoint.url)
        url = endpoint.url
    assert "flushlab_guest_accesses_total 42.0\n" in text
    assert 'flushlab_run_info{pcpus="2",policy="linux-7.3",scenario="test",vms="1"} 1.0' in text
    assert "_created" not in text
    assert "python_info" not in text
    with pytest.raises(urllib.error.URLError):
        fetch(url)


def test_listens_on_loopback_only(bare_machine: BareMachine) -> None:
    with Endpoint(collector_of(bare_machine), *parse_address("0")) as endpoint:
        port = urllib.parse.urlparse(endpoint.url).port
        assert port is not None
        listeners = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        assert f"0100007F:{port:04X}" in listeners
        assert f"00000000:{port:04X}" not in listeners


def test_port_in_use(bare_machine: BareMachine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            Endpoint(collector_of(bare_machine), "127.0.0.1", taken.getsockname()[1]).__enter__()


@pytest.mark.prometheus
def test_a_real_prometheus_scrapes_it(bare_machine: BareMachine, tmp_path: Path) -> None:
    bare_machine.count(0, lib.COUNT_ACCESSES, 123)
    lib.histogram_record(bare_machine.pointer, 0, lib.HISTOGRAM_VCPU_PAUSE, 1000)
    with (
        Endpoint(collector_of(bare_machine), "127.0.0.1", 0) as endpoint,
        running_prometheus(tmp_path, urllib.parse.urlparse(endpoint.url).netloc) as api,
    ):
        wait_until(lambda: bool(query(api, "flushlab_guest_accesses_total")), "a scrape")
        assert query(api, "flushlab_guest_accesses_total") == [123.0]
        assert query(api, 'up{job="flushlab"}') == [1.0]
        assert query(api, "flushlab_vcpu_pause_seconds_count") == [1.0]
        bare_machine.count(1, lib.COUNT_ACCESSES, 1)
        wait_until(lambda: query(api, "flushlab_guest_accesses_total") == [124.0], "another scrape")
        # The rules that we ship are accepted, and evaluate.
        wait_until(lambda: rule_health(api) == ["ok"] * 5, "evaluation of the rules")


class running_prometheus:  # noqa: N801 - reads as a statement
    """A Prometheus of its own directory on a free loopback port that scrapes one target; gives its URL."""

    def __init__(self, directory: Path, target: str) -> None:
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        rules = resources.files("metrics").joinpath("rules/flushlab.yml").read_text()
        (directory / "rules.yml").write_text(rules)
        config = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "flushlab", "static_configs": [{"targets": [target]}]}],
        }
        # JSON is YAML.
        (directory / "prometheus.yml").write_text(json.dumps(config))

    def __enter__(self) -> str:
        program = shutil.which("prometheus")
        assert program is not None
        self._log = (self._directory / "log").open("w")
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={self._directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._directory / 'data'}",
                f"--web.listen-address={self._address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        url = f"http://{self._address}"
        wait_until(lambda: self._ready(url), "Prometheus")
        return url

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        self._log.close()

    def _ready(self, url: str) -> bool:
        if self._process.poll() is not None:
            pytest.fail((self._directory / "log").read_text())
        try:
            fetch(f"{url}/-/ready")
        except OSError:
            return False
        return True


def ask(api: str, path: str) -> Any:
    return json.loads(fetch(api + path))["data"]


def rule_health(api: str) -> list[str]:
    return [rule["health"] for rule in ask(api, "/api/v1/rules")["groups"][0]["rules"]]


def query(api: str, expression: str) -> list[float]:
    data = ask(api, "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
    return [float(series["value"][1]) for series in data["result"]]
