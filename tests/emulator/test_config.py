"""Scenarios: their content, and their errors."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from pydantic import BaseModel

from emulator.errors import BadInput
from emulator.machine.runtime import OutOfFrames, OutOfMemory
from emulator.scenario.config import Scenario, embedded_scenarios, load_scaled, load_scenario, parse_scenario
from emulator.scenario.costs import Costs, load_costs
from emulator.scenario.limits import Limit, _memory_limits, _thread_limits, check, exhausted, memory_needed
from emulator.scenario.sections import parse_duration


def parse(text: str) -> Scenario:
    return parse_scenario(text, "own.toml", Path())


def complaint(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        parse(text)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("own.toml: ")
    return line


def test_the_default_is_the_main_job() -> None:
    scenario = load_scenario()
    assert (scenario.machine.pcpus, scenario.vms, scenario.vcpus) == (4, 2, 4)
    assert scenario.name == "main"
    assert (scenario.machine.geometry.l2_entries, scenario.machine.geometry.l2_ways) == (1536, 12)


@pytest.mark.parametrize("name", embedded_scenarios())
def test_embedded_scenarios_load(name: str) -> None:
    scenario = load_scenario(name)
    assert scenario.title
    # INVEPT-global heals every other bug: quiet phases, or nothing that flushes for another reason; but for
    # scenarios that compare costs.
    assert scenario.phases.quiet > 0 or scenario.scheduler.mode == "pin" or scenario.unit


def test_one_vm_is_enough() -> None:
    assert parse("[[vm]]").vms == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30), ("5m", 300), ("1h", 3600), ("1.5h", 5400), ("2", 2), (3, 3), (" 4 s ", 4)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "-1s",
        "1d",
        "1e3s",
        "87601h",
        "9" * 400,
        pytest.param(10**5000, id="digits"),
        "nan",
        "inf",
        float("inf"),
        True,
        None,
        "1 2",
    ],
)
def test_bad_durations(text: object) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[vm]]\n[machine]\npcpu = 2", "machine.pcpu: found an unknown key; expected 'pcpus'"),
        ("[[vm]]\n[machine]\npcpus = 0", "machine.pcpus: found 0; expected at least 1"),
        ("[[vm]]\n[machine]\npcpus = 'x'", "machine.pcpus: found 'x'; expected a whole number"),
        ("[[vm]]\n[machine]\npcpus = 1.0", "machine.pcpus: found 1.0; expected a whole number"),
        ("[machine]", "vm: found nothing; expected this key to be present"),
        ("vm = []", "vm: found []; expected at least 1 entries"),
        ("vm = 3", "vm: found 3; expected a list"),
        ("[[vm]]\nvcpus = true", "vm[0].vcpus: found True; expected a whole number"),
        ("[[vm]]\n[[vm]]\nmemory = 1", "vm[1].memory: found 1; expected at least 2 MiB"),
        ("[[vm]]\nmemory = '64 MiB'", "vm[0].memory: found '64 MiB'; expected a whole number of MiB"),
        ("[[vm]]\nmemory = 1979-05-27", "vm[0].memory: found 1979-05-27; expected a whole number of MiB"),
        ("[[vm]]\nmemory = inf", "vm[0].memory: found inf; expected a whole number of MiB"),
        (
            "[[vm]]\nmemory = 0x1" + "0" * 9999,
            "memory: found a number of 39997 bits; expected at most 1048576 MiB",
        ),
        ("[[vm]]\n[host]\nunmap = 'x'", "host.unmap: found 'x'; expected a number of ranges per second"),
        ("[[vm]]\n[host]\nunmap = 1e7", "found 10000000.0; expected at most 1000000 ranges per second"),
        (
            "pace = inf\n[[vm]]",
            "pace: found inf; expected a finite number of million guest accesses per second",
        ),
        ("[[vm]]\nvpid = 1", "vm[0].vpid: found an unknown key; expected one of count,"),
        (
            "duration = 0x1" + "0" * 9999 + "\n[[vm]]",
            "duration: found a number of 39997 bits; expected a duration",
        ),
        ("duration = 1979-05-27\n[[vm]]", "duration: found 1979-05-27; expected a duration"),
        ("duration = '11y'\n[[vm]]", "duration: found '11y'; expected a duration"),
        ("duration = '99999h'\n[[vm]]", "duration: found '99999h'; expected a duration of at most 87600h"),
        ("[[vm]]\n[phases]\nquiet = '" + "9" * 400 + "h'", "phases.quiet: found '9"),
        ("[[vm]]\ntraces = [3]", "vm[0].traces[0]: found 3; expected a text"),
        ("[[vm]]\n[host]\nunmap = -1", "host.unmap: found -1; expected at least 0"),
        ("[[vm]]\n[host]\nunmap = nan", "host.unmap: found nan; expected"),
        ("[[vm]]\n[host]\nactors = 0\nunmap = 1", "host: found"),
        ("[[vm]]\n[scheduler]\nmode = 'calm'", "scheduler.mode: found 'calm'; expected one of 'storm'"),
        ("[[vm]]\n[phases]\nstorm = '3 days'", "phases.storm: found '3 days'; expected a duration"),
        ("[[vm]]\n[phases]\nstorm = '0s'", "phases: found"),
        ("[[vm]]\n[machine.geometry]\nl2_entries = 1537", "machine.geometry: found"),
        ("[[vm]]\n[machine.geometry]\nl2_ways = 7", "l2_entries to be l2_ways times a power of two"),
        ("duration = '0s'\n[[vm]]", "duration: found '0s'; expected more than 0"),
        ("[[vm]\n", "not TOML"),
        ("[[vm]]\ncolour = 1", "vm[0].colour: found an unknown key; expected one of count,"),
    ],
)
def test_complaints_name_key_found_and_expected(text: str, expected: str) -> None:
    assert expected in complaint(text)


def test_several_mistakes_are_counted() -> None:
    assert complaint("[[vm]]\nvcpus = 0\nmemory = 0").endswith("(and 1 more)")


def test_unbounded_geometry_is_possible() -> None:
    assert parse("[[vm]]\n[machine.geometry]\nl2_entries = 0").machine.geometry.l2_entries == 0


def test_a_name_with_a_slip_in_it() -> None:
    with pytest.raises(BadInput, match=r"no such scenario; expected one of .*mean migration-storm\?\)"):
        load_scenario("migration-strom")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere\.toml: No such file"):
        load_scenario(str(tmp_path / "nowhere.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"binary\.toml: not UTF-8"):
        load_scenario(str(binary))
    with pytest.raises(BadInput, match="Is a directory"):
        load_scenario(f"{tmp_path}/")


def test_own_costs_replace_single_entries(tmp_path: Path) -> None:
    (tmp_path / "costs.toml").write_text("[ipi_send]\ncycles = 9\n")
    (tmp_path / "own.toml").write_text('costs = "costs.toml"\n[[vm]]\n')
    scenario = load_scenario(str(tmp_path / "own.toml"))
    assert scenario.cost_table.ipi_send.cycles == 9
    assert scenario.cost_table.ipi_receive == load_costs().ipi_receive
    assert scenario.changed(duration=1.0).cost_table is scenario.cost_table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ipi_sent]\ncycles = 9", "ipi_sent: found an unknown key; expected 'ipi_send'"),
        ("[ipi_send]\ncycles = -1", "ipi_send.cycles: found -1; expected at least 0"),
        ("[ipi_send]", "ipi_send.cycles: found nothing"),
        ("ipi_send = 3", "ipi_send: found 3; expected a table"),
        (
            "[ipi_send]\ncycles = 9\nrange = [10, 20]",
            "ipi_send.range: found [10, 20]; expected the least and the most cycles, and 9 in between",
        ),
        ("[ipi_send]\ncycles = 9\nrange = [20]", "ipi_send.range[1]: found nothing"),
        ("[ipi_send]\ncycles = 9\nrange = [1, -1]", "ipi_send.range[1]: found -1; expected at least 0"),
        ("[", "not TOML"),
    ],
)
def test_bad_costs(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_costs(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)


def test_every_default_cost_has_a_source() -> None:
    for name, cost in load_costs():
        assert cost.source != "the user's own figure", name
        assert cost.range is not None or not cost.source.startswith("assumed"), name


def test_an_own_cost_is_exact_and_stands_on_the_scenarios_table(tmp_path: Path) -> None:
    """Costs given on the command line replace entries of the scenario's own file, and of no other."""
    (tmp_path / "scenario-costs.toml").write_text("[ipi_send]\ncycles = 9\n[l2_hit]\ncycles = 8\n")
    (tmp_path / "own.toml").write_text('costs = "scenario-costs.toml"\n[[vm]]\n')
    (tmp_path / "mine.toml").write_text("[ipi_send]\ncycles = 7\n")
    costs = load_scaled(str(tmp_path / "own.toml"), None, None, tmp_path / "mine.toml").cost_table
    assert (costs.ipi_send.cycles, costs.l2_hit.cycles) == (7, 8)
    assert costs.ipi_send.range is None
    assert (costs.ipi_send.least, costs.ipi_send.most) == (7, 7)
    assert costs.invept_global == load_costs().invept_global
    assert issubclass(Costs, BaseModel)


class Proc:
    """A /proc and a cgroup file system with few files."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        self.write("proc/meminfo", "MemTotal: 99 kB\nMemAvailable: 4194304 kB\n", root)
        self.write("proc/loadavg", "0.00 0.00 0.00 1/500 1234\n", root)
        self.write("proc/sys/kernel/threads-max", "100000\n", root)
        self.write("proc/self/cgroup", "0::/user/me\n", root)
        self.root = root

    @staticmethod
    def write(path: str, text: str, root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    def check(self, text: str) -> None:
        check(parse(text), self.proc, self.cgroup)


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


def test_a_small_scenario_fits(proc: Proc) -> None:
    proc.check("[[vm]]")


def test_too_little_memory(proc: Proc) -> None:
    with pytest.raises(
        BadInput, match=r"need about \d+ MiB; expected at most the 4096 MiB left \(MemAvailable\)"
    ):
        proc.check("[[vm]]\nmemory = 65536")


def test_cgroup_limits_count_up_to_the_root(proc: Proc) -> None:
    proc.write("cgroup/user/memory.max", f"{256 << 20}\n", proc.root)
    proc.write("cgroup/user/memory.current", f"{128 << 20}\n", proc.root)
    proc.write("cgroup/user/me/memory.max", "max\n", proc.root)
    with pytest.raises(BadInput, match=r"128 MiB left \(cgroup user memory\.max\)"):
        proc.check("[[vm]]")


def test_cgroup_version_1_limits_as_version_2_does(proc: Proc) -> None:
    proc.write("proc/self/cgroup", "8:pids:/user/me\n4:cpu,memory:/user/me\n0::/\n", proc.root)
    proc.write("cgroup/memory/user/me/memory.limit_in_bytes", "9223372036854771712\n", proc.root)
    proc.write("cgroup/memory/user/me/memory.usage_in_bytes", f"{64 << 20}\n", proc.root)
    proc.check("[[vm]]")
    proc.write("cgroup/memory/user/memory.limit_in_bytes", f"{256 << 20}\n", proc.root)
    proc.write("cgroup/memory/user/memory.usage_in_bytes", f"{128 << 20}\n", proc.root)
    with pytest.raises(BadInput, match=r"128 MiB left \(cgroup user memory\.limit_in_bytes\)"):
        proc.check("[[vm]]")
    proc.write("cgroup/memory/user/memory.limit_in_bytes", f"{2 << 30}\n", proc.root)
    proc.write("cgroup/pids/user/me/pids.max", "20\n", proc.root)
    proc.write("cgroup/pids/user/me/pids.current", "3\n", proc.root)
    with pytest.raises(BadInput, match=r"17 are left \(cgroup me pids\.max\)"):
        proc.check("[[vm]]")


def test_a_container_sees_the_host_path_and_its_own_root(proc: Proc) -> None:
    proc.write("proc/self/cgroup", "4:memory:/docker/0123\n", proc.root)
    proc.write("cgroup/memory/memory.limit_in_bytes", f"{256 << 20}\n", proc.root)
    proc.write("cgroup/memory/memory.usage_in_bytes", f"{128 << 20}\n", proc.root)
    with pytest.raises(BadInput, match=r"128 MiB left \(cgroup memory memory\.limit_in_bytes\)"):
        proc.check("[[vm]]")


@pytest.mark.parametrize(
    ("line", "directory", "most", "used", "cache"),
    [
        ("0::/me", "cgroup/me", "memory.max", "memory.current", "inactive_file"),
        (
            "4:memory:/me",
            "cgroup/memory/me",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_page_cache_is_memory_that_is_left(
    line: str, directory: str, most: str, used: str, cache: str, proc: Proc
) -> None:
    proc.write("proc/self/cgroup", f"{line}\n", proc.root)
    proc.write(f"{directory}/{most}", f"{2 << 30}\n", proc.root)
    proc.write(f"{directory}/{used}", f"{2 << 30}\n", proc.root)
    with pytest.raises(BadInput, match=" 0 MiB left"):
        proc.check("[[vm]]")
    proc.write(f"{directory}/memory.stat", f"anon 5\n{cache} {1 << 30}\n", proc.root)
    proc.check("[[vm]]")


def test_stacks_take_addresses(proc: Proc, monkeypatch: pytest.MonkeyPatch) -> None:
    many = "[machine]\npcpus = 100\n[[vm]]"
    addresses = memory_needed(parse(many)) + 50 * (8 << 20)  # half of the stacks
    limits = {resource.RLIMIT_AS: addresses, resource.RLIMIT_STACK: 8 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits.get(number, -1), -1))
    with pytest.raises(BadInput, match=r"ulimit -v"):
        proc.check(many)
    limits[resource.RLIMIT_STACK] = 1 << 20
    proc.check(many)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (MemoryError(), "no memory is left"),
        (OutOfMemory("host frames"), "no memory is left: host frames"),
        (RuntimeError("can't start new thread"), "no thread can be started"),
    ],
)
def test_what_ran_out_is_said_with_the_limits(
    error: Exception, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = RuntimeError("an actor died")
    wrapper.__cause__ = error
    limits = {resource.RLIMIT_AS: 500_000 << 10}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits.get(number, -1), -1))
    for seen in (error, wrapper):
        expected = f"this machine: {found}; expected more memory and threads than ulimit -v 500000"
        assert str(exhausted(seen)) == expected
    assert exhausted(RuntimeError("a bug")) is None
    assert exhausted(OutOfFrames("a kind of frame, which is the model's business")) is None


def test_too_many_threads_names_the_most_pcpus(proc: Proc) -> None:
    proc.write("cgroup/user/me/pids.max", "100\n", proc.root)
    proc.write("cgroup/user/me/pids.current", "20\n", proc.root)
    with pytest.raises(BadInput) as caught:
        proc.check("[machine]\npcpus = 64\n[[vm]]")
    line = str(caught.value)
    assert "machine.pcpus = 64 needs 69 threads, 80 are left (cgroup me pids.max)" in line
    most = int(line.rsplit(" ", 1)[1])
    proc.check(f"[machine]\npcpus = {most}\n[[vm]]")
    with pytest.raises(BadInput):
        proc.check(f"[machine]\npcpus = {most + 1}\n[[vm]]")


def test_kernel_wide_thread_limit(proc: Proc) -> None:
    limits = list(_thread_limits(proc.proc, proc.cgroup))
    assert Limit(99500, "kernel.threads-max") in limits


def test_no_proc_no_complaint(tmp_path: Path) -> None:
    assert not [limit for limit in _memory_limits(tmp_path, tmp_path) if limit.source == "MemAvailable"]
    check(parse("[[vm]]"), tmp_path, tmp_path)


def test_memory_grows_with_guests_and_pcpus() -> None:
    small = memory_needed(parse("[[vm]]"))
    assert memory_needed(parse("[[vm]]\ncount = 2")) > small
    assert memory_needed(parse("[machine]\npcpus = 1024\n[[vm]]")) > small
    # Blocks for huge pages stand ready where khugepaged is at work.
    assert memory_needed(parse("[[vm]]\n[host]\ncollapse = 1")) > small
