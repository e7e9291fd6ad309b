"""The scrape endpoint, alone and under a real Prometheus."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

import metrics.server
from metrics import Endpoint, MachineCollector, parse_address
from metrics.server import CONNECTIONS
from native import lib
from tests.support import CPU0, CPU1, VM0, BareMachine, wait_until

SHADOW_COUNTERS = {
    "mmu_shadow_zapped": lib.STAT_MMU_SHADOW_ZAPPED,
    "mmu_pte_write": lib.STAT_MMU_PTE_WRITE,
    "mmu_flooded": lib.STAT_MMU_FLOODED,
    "mmu_recycled": lib.STAT_MMU_RECYCLED,
    "mmu_cache_miss": lib.STAT_MMU_CACHE_MISS,
    "mmu_unsynced_pages": lib.STAT_MMU_UNSYNC,
    "mmu_synced_pages": lib.STAT_MMU_SYNCED,
    "mmu_loads": lib.STAT_MMU_LOAD,
    "cached_roots_used": lib.STAT_CACHED_ROOTS,
}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[::]:09464", ("::", 9464)),
        ("[fe80::1%eth0]:9464", ("fe80::1%eth0", 9464)),
        (f"{'a' * 63}.{'b' * 63}:1", (f"{'a' * 63}.{'b' * 63}", 1)),
        ("b\u00fccher.example:1", ("b\u00fccher.example", 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "65536",
        "70000",
        "-1",
        "+1",
        "9" * 5000,
        "\u0669464",
        ":9464",
        "localhost:",
        "localhost:http",
        "9464 ",
        "a b:9464",
        "a\0b:9464",
        "a..b:9464",
        "\udcff\udcfe:9464",
        f"{'a' * 300}:9464",
        f"{'a.' * 300}:9464",
        "::1:9464",
        "::1",
        "[::1]",
        "[::1:9464",
        "::1]:9464",
        "[localhost]:9464",
        "[]:9464",
        "[[::1]]:9464",
    ],
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="HOST"):
        parse_address(text)


# How long a scrape may take on a busy machine; far less than a client that is never cut off.
PATIENCE = 60


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def collector_of(machine: BareMachine) -> MachineCollector:
    collector = MachineCollector({"policy": "linux-7.3", "scenario": "test"})
    machine.show_to(collector)
    return collector


def test_serves_and_closes(bare_machine: BareMachine) -> None:
    bare_machine.count(CPU0, lib.COUNT_ACCESSES, 42)
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


def test_ready_while_a_machine_runs_and_healthy_always(bare_machine: BareMachine) -> None:
    collector = collector_of(bare_machine)
    with Endpoint(collector, "127.0.0.1", 0, ready=collector.is_up) as endpoint:
        base = endpoint.url.removesuffix("/metrics")
        assert "a machine runs" in fetch(f"{base}/-/ready")
        collector.machine_down()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            fetch(f"{base}/-/ready")
        assert "answers" in fetch(f"{base}/-/healthy")


def test_build_info_and_the_process_are_there_without_a_machine() -> None:
    build = {"version": "1.2", "policy": "linux-7.3", "scenario": "main", "seed": "7"}
    with Endpoint(MachineCollector(), "127.0.0.1", 0, build=build) as endpoint:
        text = fetch(endpoint.url)
    assert 'flushlab_build_info{policy="linux-7.3",scenario="main",seed="7",version="1.2"} 1.0' in text
    assert re.search(r"^process_resident_memory_bytes \d", text, re.MULTILINE)
    assert re.search(r"^process_open_fds \d", text, re.MULTILINE)


@contextmanager
def serving(machine: BareMachine) -> Iterator[tuple[str, tuple[str, int]]]:
    """An endpoint's URL, and the address to connect to."""
    with Endpoint(collector_of(machine), "127.0.0.1", 0) as endpoint:
        port = urllib.parse.urlparse(endpoint.url).port
        assert port is not None
        yield endpoint.url, ("127.0.0.1", port)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("GET", "/metrics?x=%ff", 200),
        ("GET", "/-/healthy", 200),
        ("HEAD", "/-/healthy", 200),
        ("GET", "/-/ready", 200),
        ("POST", "/-/ready", 405),
        ("GET", "/-/reload", 404),
        ("HEAD", "/metrics", 200),
        ("GET", "/", 404),
        ("HEAD", "/", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/metrics/", 404),
        ("GET", "/metrics%00", 404),
        ("POST", "/elsewhere", 404),
        ("POST", "/metrics", 405),
        ("OPTIONS", "/metrics", 405),
        ("BREW", "/metrics", 405),
        ("GET", f"/{'x' * 70_000}", 414),
    ],
)
def test_only_metrics_are_served(method: str, path: str, status: int, bare_machine: BareMachine) -> None:
    with serving(bare_machine) as (_, address):
        connection = http.client.HTTPConnection(*address, timeout=10)
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
    assert answer.status == status
    assert bool(body) == (method != "HEAD")
    assert (answer.getheader("Allow") == "GET, HEAD") == (status == 405)


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        b"GET /metrics HTTP/1.1\r\n",
        b"GET /metrics HTTP/1.1\r\nX: ",
        b"POST /metrics HTTP/1.1\r\n",
    ],
    ids=["nothing", "zero", "request line", "half a header", "a letter"],
)
def test_slow_clients_take_neither_threads_nor_time(
    said: bytes, bare_machine: BareMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A scrape that waited for a slow client would run into the limit of fetch().
    monkeypatch.setattr(metrics.server, "SECONDS", 10 * PATIENCE)
    before = threading.active_count()
    with serving(bare_machine) as (url, address), ExitStack() as stack:
        for _ in range(400):
            slow = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
            slow.sendall(said)
        assert "flushlab_run_info" in fetch(url)
        assert threading.active_count() - before <= CONNECTIONS + 1
        # Each of them alone fills all places, and goes on sending.
        slow.sendall(b"a")
        assert "flushlab_run_info" in fetch(url)
    wait_until(lambda: threading.active_count() <= before, "the end of all connections' threads")


def test_a_connection_ends_when_its_time_is_up(
    bare_machine: BareMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.server, "SECONDS", 0.3)
    with serving(bare_machine) as (_, address), socket.create_connection(address, timeout=30) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        assert slow.recv(100) == b""


@pytest.mark.slow
def test_a_client_that_does_not_read_gives_way(bare_machine: BareMachine) -> None:
    many = MachineCollector({f"label{i}": "x" * 10_000 for i in range(600)})
    bare_machine.show_to(many)
    with Endpoint(many, "127.0.0.1", 0) as endpoint, ExitStack() as stack:
        address = ("127.0.0.1", urllib.parse.urlparse(endpoint.url).port)
        deaf = []
        for _ in range(CONNECTIONS):
            deaf.append(stack.enter_context(socket.socket()))
            deaf[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf[-1].settimeout(10)
            deaf[-1].connect(address)
            deaf[-1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert all(client.recv(1) for client in deaf)
        assert len(fetch(endpoint.url)) > 6_000_000


@pytest.mark.slow
def test_clients_that_vanish_leave_no_word(
    bare_machine: BareMachine, capfd: pytest.CaptureFixture[str]
) -> None:
    reset = struct.pack("ii", 1, 0)
    with serving(bare_machine) as (url, address):
        for number in range(40):
            with socket.create_connection(address, timeout=10) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                client.sendall(b"GET /metrics HTTP/1.1\r\n" + b"\r\n" * (number % 2))
                if number % 4 < 2:
                    time.sleep(0.02)  # so that some are being read, and some answered
        assert "flushlab_run_info" in fetch(url)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.prometheus
def test_a_real_prometheus_scrapes_it(bare_machine: BareMachine, tmp_path: Path) -> None:
    bare_machine.count(CPU0, lib.COUNT_ACCESSES, 123)
    lib.histogram_record(bare_machine.pointer, CPU0, lib.HISTOGRAM_VCPU_PAUSE, 1000)
    for number, stat in enumerate(SHADOW_COUNTERS.values(), 1):
        lib.vm_stat_add(bare_machine.pointer, VM0, stat, number)
    with (
        Endpoint(collector_of(bare_machine), "127.0.0.1", 0) as endpoint,
        running_prometheus(tmp_path, urllib.parse.urlparse(endpoint.url).netloc) as api,
    ):
        wait_until(lambda: bool(query(api, "flushlab_guest_accesses_total")), "a scrape")
        assert query(api, "flushlab_guest_accesses_total") == [123.0]
        assert query(api, 'up{job="flushlab"}') == [1.0]
        assert query(api, "flushlab_vcpu_pause_seconds_count") == [1.0]
        for number, name in enumerate(SHADOW_COUNTERS, 1):
            assert query(api, f'flushlab_{name}_total{{vm="0"}}') == [number], name
        bare_machine.count(CPU1, lib.COUNT_ACCESSES, 1)
        wait_until(lambda: query(api, "flushlab_guest_accesses_total") == [124.0], "another scrape")
        # The rules that we ship are accepted, and evaluate.
        wait_until(lambda: rule_health(api) == ["ok"] * 5, "evaluation of the rules")


@pytest.mark.slow
@pytest.mark.prometheus
def test_the_console_page_shows_an_instance(bare_machine: BareMachine, tmp_path: Path) -> None:
    labels = {"version": "1.2", "policy": "linux-7.3", "scenario": "main", "seed": "42"}
    bare_machine.count(CPU0, lib.COUNT_ACCESSES, 123)
    with (
        Endpoint(collector_of(bare_machine), "127.0.0.1", 0, build=labels) as endpoint,
        running_prometheus(tmp_path, urllib.parse.urlparse(endpoint.url).netloc) as api,
    ):
        target = urllib.parse.urlparse(endpoint.url).netloc
        wait_until(lambda: bool(query(api, "rate(flushlab_guest_accesses_total[1m])")), "two scrapes")
        page = fetch(f"{api}/consoles/flushlab.html")
        for cell in (f">{target}</a>", *labels.values()):
            assert cell in page, page
        assert "inconclusive: no flush has averted a use yet" in page
        # Each template is defined and each query answers: a page that fails to render says why instead.
        assert page.rstrip().endswith("</html>")
        assert "rror" not in page
        bare_machine.count(CPU0, lib.COUNT_AVERTED, 1)
        wait_until(lambda: "no violation" in fetch(f"{api}/consoles/flushlab.html"), "the verdict")
        one = fetch(f"{api}/consoles/flushlab.html?instance={target}")
        assert "all instances" in one
        assert target in one
        none = fetch(f"{api}/consoles/flushlab.html?instance=elsewhere")
        assert "No instance answers" in none


class running_prometheus:  # noqa: N801 - reads as a statement
    """A Prometheus of its own directory on a free loopback port that scrapes one target; gives its URL."""

    def __init__(self, directory: Path, target: str, every: str = "200ms") -> None:
        self._directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        rules = resources.files("metrics").joinpath("rules/flushlab.yml").read_text()
        (directory / "rules.yml").write_text(rules)
        config = {
            "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
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
                f"--web.console.templates={resources.files('metrics').joinpath('consoles')}",
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
