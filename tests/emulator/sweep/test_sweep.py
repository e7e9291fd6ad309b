"""Sweeps: the grid, the store, and the estimates that stand in the table."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from emulator.errors import BadInput
from emulator.output import Unwritable
from emulator.policy import spelled_policy
from emulator.scenario.config import load_scenario
from emulator.scenario.vary import Value, parse_vary, varied
from emulator.sweep.grid import Grid, Unit, shard
from emulator.sweep.stats import LEAST_RUNS, SIGNIFICANT, estimate
from emulator.sweep.store import Store, as_line, merged, read_store
from emulator.sweep.table import Swept
from tests.emulator.sweep.canned_runs import canned, record_of

POLICIES = tuple((name, spelled_policy(name)) for name in ("linux-7.3", "root-tlb-gen"))
VARY: tuple[tuple[str, tuple[Value, ...]], ...] = (("vm.count", (2, 4)), ("host.unmap", (10, 20.5)))


def grid(repeat: int = 2, seed: int = 0, **options: object) -> Grid:
    return Grid("migration-storm", VARY, POLICIES, repeat, seed, {"duration": 1.0, **options})


# --- the grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vm.count=4,64", ("vm.count", (4, 64))),
        (" pace = 0.5 ", ("pace", (0.5,))),
        ("machine.ept=true,false", ("machine.ept", (True, False))),
        ("scheduler.mode=storm,pin", ("scheduler.mode", ("storm", "pin"))),
        ("duration=5s", ("duration", ("5s",))),
    ],
)
def test_values_are_those_of_a_scenario_file(text: str, found: tuple[str, tuple[Value, ...]]) -> None:
    key, values = parse_vary(text)
    assert (key, values) == found
    varied(load_scenario("migration-storm"), {key: values[0]})


@pytest.mark.parametrize("text", ["", "vm.count", "vm.count=", "=3", "vm.count=1,,2", "vm.count=1,1"])
def test_a_key_without_values_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--vary: found"):
        parse_vary(text)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"vm.cont": 1}, r"--vary vm.cont=1: vm\[0\].cont: found an unknown key; expected 'count'"),
        ({"nowhere.x": 1}, "found 'nowhere.x'; expected a key of machine, vm, host"),
        ({"title.x": 1}, "found 'title.x'; expected a key of machine, vm, host"),
        ({"vm.count": "many"}, r"--vary vm.count=many: vm\[0\].count: found 'many'"),
        ({"pcpus": "all"}, "--vary pcpus=all: found 'all'; expected a number of pCPUs"),
        ({"pcpus": True}, "--vary pcpus=True"),
        ({"machine.pcpus": 2, "vm.placement": "own"}, "machine.pcpus of at least"),
    ],
)
def test_a_value_that_the_scenario_does_not_take_is_refused(values: dict[str, Value], error: str) -> None:
    with pytest.raises(BadInput, match=error):
        varied(load_scenario("migration-storm"), values)


def test_a_value_changes_each_kind_of_vm_and_keeps_names_and_costs() -> None:
    scenario = load_scenario("partitioned")
    assert len(scenario.vm) > 1
    changed = varied(scenario, {"vm.memory": 16, "kvm.range_zaps": 7, "pace": 3})
    assert {vm.memory for vm in changed.vm} == {16}
    assert (changed.kvm.range_zaps, changed.pace, changed.name) == (7, 3, "partitioned")
    assert changed.cost_table is scenario.cost_table
    assert varied(load_scenario("main"), {"pcpus": 8}) == load_scenario("main").scaled(8)


def test_a_repetition_runs_each_point_under_each_policy() -> None:
    units = grid(repeat=3).units
    assert len(units) == 3 * 4 * 2
    assert [unit.number for unit in units] == list(range(24))
    assert [unit.seed for unit in units] == [0] * 8 + [1] * 8 + [2] * 8
    first = [(dict(unit.point)["vm.count"], dict(unit.point)["host.unmap"], unit.name) for unit in units[:4]]
    assert first == [
        (2, 10, "linux-7.3"), (2, 10, "root-tlb-gen"), (2, 20.5, "linux-7.3"), (2, 20.5, "root-tlb-gen"),
    ]  # fmt: skip
    assert units[0].shape().vm[0].count == 2


@pytest.mark.slow
def test_a_key_says_all_that_a_run_depends_on(tmp_path: Path) -> None:
    keys = [unit.key for unit in grid().units]
    assert len(set(keys)) == len(keys)
    assert keys == [unit.key for unit in grid().units]
    # More repetitions and another order of policies find the runs that are there.
    assert keys == [unit.key for unit in grid(repeat=5).units][: len(keys)]
    others: list[dict[str, Any]] = [
        {"seed": 7}, {"duration": 2.0}, {"chaos": 9}, {"unbounded": True}, {"pcpus": 8}, {"ept": False},
    ]  # fmt: skip
    for options in others:
        policies = POLICIES[:1] if "ept" in options else POLICIES
        seed = options.pop("seed", 0)
        other = Grid("migration-storm", VARY, policies, 1, int(seed), {"duration": 1.0, **options})
        assert not set(keys) & {unit.key for unit in other.units}, options
    # A user's file is known by its contents.
    path, seen = tmp_path / "mine.py", set()
    for answer in ("none", "all-contexts"):
        text = (
            "from emulator.policy import Policy\n\nclass Mine(Policy):\n    def migration(self, cpu, vcpu):"
        )
        path.write_text(f"{text}\n        return {answer!r}\n")
        mine = Grid("main", (), ((str(path), spelled_policy(str(path))),), 1, 0, {"duration": 1.0})
        seen.add(mine.units[0].key)
    assert len(seen) == 2


def test_policies_must_suit_each_point() -> None:
    vary: tuple[tuple[str, tuple[Value, ...]], ...] = (("machine.ept", (True, False)),)
    with pytest.raises(BadInput, match="its host has no EPT, and policy root-tlb-gen"):
        _ = Grid("migration-storm", vary, POLICIES, 1, 0, {"duration": 1.0}).units


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "1/3/3", "-1/3", ""])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--shard: found"):
        shard(grid().units, text)


def test_shards_are_a_partition() -> None:
    units = grid(repeat=3).units
    parts = [shard(units, f"{i}/5") for i in range(1, 6)]
    assert sorted((unit for part in parts for unit in part), key=lambda unit: unit.number) == list(units)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- the store ----------------------------------------------------------------------------------------------


def filled(path: Path, units: list[Unit] | tuple[Unit, ...]) -> None:
    with Store(path) as store:
        for record in canned(units, 1):
            store.add(record)


def test_a_store_has_each_record_when_add_returns(tmp_path: Path) -> None:
    units, path = grid().units, tmp_path / "store"
    with Store(path) as store:
        for n, record in enumerate(canned(units, 1), start=1):
            store.add(record)
            assert len(read_store(path)) == n
    assert list(read_store(path).values()) == list(canned(units, 1))


def test_a_line_without_its_end_is_dropped_wherever_the_kill_came(tmp_path: Path) -> None:
    units, path = grid().units, tmp_path / "store"
    filled(path, units[:2])
    whole = path.read_bytes()
    line = as_line(record_of(units[2])).encode()
    for cut in (1, 10, 18, 19, len(line) // 2, len(line)):
        path.write_bytes(whole + line[:cut])
        assert len(read_store(path)) == 2
        with Store(path) as store:
            assert len(store.records) == 2
            assert path.read_bytes() == whole
            store.add(record_of(units[2]))
        assert path.read_bytes() == whole + line + b"\n"


def test_a_file_of_another_kind_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    for text in ("my notes", "my notes\nmore", "{}\n", '{"flushlab_sweep":2}\n', "[1]\n", '"x"\n{'):
        path.write_text(text)
        with pytest.raises(BadInput, match=f"{path}"), Store(path):
            pass
        assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("values", [], "values is"),
        ("values", {"flushes/M": "many"}, "values.flushes/M is 'many'; expected a number"),
        ("point", 3, "point is 3"),
        ("seed", "one", "seed is 'one'"),
        ("key", None, "key is None"),
    ],
)
def test_a_damaged_line_is_named(name: str, value: object, error: str, tmp_path: Path) -> None:
    path = tmp_path / "store"
    record = record_of(grid().units[0])
    path.write_text(as_line(record) + "\n" + as_line({**record, name: value}) + "\n")
    with pytest.raises(BadInput, match=f"{path}:2: {error}"):
        read_store(path)


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    expected = pytest.raises(Unwritable, match=f"--store {path}: another process is writing it")
    with Store(path), expected, Store(path):
        pass
    with Store(path):
        pass


def test_merged_shards_are_the_whole_in_its_order(tmp_path: Path) -> None:
    units = grid(repeat=13).units
    assert len(units) > 100
    paths = [tmp_path / str(i) for i in range(3)]
    for i, path in enumerate(paths):
        part = shard(units, f"{i + 1}/3")
        random.Random(i).shuffle(part)
        filled(path, part)
    assert merged(paths) == merged(reversed(paths)) == list(canned(units, 1))


# --- the estimates ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_noise_is_not_called_a_gain() -> None:
    pytest.importorskip("scipy")
    rng = random.Random(1)
    for _ in range(5):
        same = [[rng.gauss(100, 10) for _ in range(3)] for _ in range(2)]
        # With three runs not even a wide gap is significant, so it is not tested.
        assert estimate(same[0], same[1]).differs is None
    apart = estimate([50.0, 51, 52, 53], [100.0, 101, 102, 103])
    assert apart.differs is True
    assert apart.ratio == pytest.approx(51.5 / 101.5)
    mixed = estimate([100.0, 90, 110, 95], [98.0, 97, 105, 99])
    assert mixed.differs is False
    assert mixed.p is not None
    assert mixed.p > SIGNIFICANT


@pytest.mark.slow
def test_the_interval_is_of_the_median_and_repeats() -> None:
    pytest.importorskip("scipy")
    values = [10.0, 12, 11, 40, 13, 12, 9, 11]
    found = estimate(values, None)
    assert found == estimate(list(reversed(values)), None)
    assert found.low is not None
    assert found.high is not None
    assert 9 <= found.low <= found.median == 11.5 <= found.high < 40
    assert estimate([3.0], None).low is None
    assert estimate([3.0, 3.0], None).high == 3.0


@pytest.mark.slow
def test_four_runs_are_the_fewest_that_can_differ() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n, can in ((LEAST_RUNS - 1, False), (LEAST_RUNS, True)):
        p = stats.mannwhitneyu(range(n), range(100, 100 + n)).pvalue
        assert bool(p <= SIGNIFICANT) is can


@pytest.mark.slow
def test_a_refuted_policy_has_no_gain() -> None:
    records = [record_of(unit) for unit in grid(repeat=4).units]
    for record in records:
        if record["policy"] == "root-tlb-gen":
            record["verdict"] = "violations" if record["seed"] == 2 else "clean"
    swept = Swept(records)
    verdicts = {(cell.policy, cell.verdict) for cell in swept.cells("flush cycles/M")}
    assert verdicts == {("linux-7.3", "clean"), ("root-tlb-gen", "violations")}
    assert swept.status == 1
    assert json.loads(json.dumps(swept.document(["flush cycles/M"])))["baseline"] == "linux-7.3"
