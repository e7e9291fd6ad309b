"""The size of a search: the races that are counted are those that a search reverses."""

from __future__ import annotations

import json

import pytest

from emulator.cli.main import main
from emulator.explore.results.size import EXECUTIONS, size_of
from emulator.explore.results.suite import Work, explore_one
from emulator.explore.results.verdict import Plan
from emulator.explore.strategies.racing import Operation, Racing
from emulator.explore.strategies.search import Limits, search
from emulator.litmus.loader import load_test, parse_test
from emulator.litmus.model import LitmusTest
from emulator.schemas.explored import ExploreDocument
from tests.emulator.explore.tiny_programs import Op, Tiny

TEST = """
doc = "The host takes a page away while a vCPU reads it."
source = "this test"
[threads.v0]
vcpu = 0
ops = ["read 0x20"]
[threads.mm]
ops = [{wait}"host-unmap 0x20"]
"""


def counted(*tasks: list[Op], executions: int = 40) -> Racing:
    program = Tiny(*tasks)

    def operation(index: int) -> Operation:
        return f"t{index}", program.places[index] + 1

    racing = Racing(program.objects, executions, 1, operation)
    found = search(program, program.objects, racing, Limits(first_only=False), bool)
    assert found.executions == executions
    assert not found.complete
    return racing


def test_operations_without_a_common_object_do_not_race() -> None:
    assert not counted([("inc", "x"), ("r", "z")], [("inc", "y"), ("r", "z")]).races


def test_operations_that_conflict_race_about_their_object() -> None:
    racing = counted([("inc", "x"), ("inc", "y")], [("inc", "z"), ("r", "y")])
    assert set(racing.races) == {(("t0", 2), ("t1", 2))}
    assert racing.races.total() == 40
    (objects,) = racing.objects_of.values()
    assert [racing.objects.names[bit] for bit in objects] == ["y"]


def test_operations_that_a_wait_orders_do_not_race() -> None:
    free = counted([("w", "x", "1"), ("inc", "go")], [("inc", "y"), ("inc", "x")])
    ordered = counted([("w", "x", "1"), ("inc", "go")], [("wait", "go", "1"), ("inc", "x")])
    assert (("t0", 1), ("t1", 2)) in free.races
    assert (("t0", 1), ("t1", 2)) not in ordered.races


def test_a_deadlock_has_no_last_step() -> None:
    assert not counted([("wait", "x", "1")], [("inc", "y")]).races


def racing_test(wait: str = "") -> LitmusTest:
    return parse_test(TEST.format(wait=wait), "racing", None)


def test_the_wait_that_is_named_makes_the_search_small() -> None:
    size = size_of(racing_test(), "linux-7.3", Plan().options, 0)
    assert size is not None
    assert size.executions == EXECUTIONS
    assert size.races >= sum(race.races for race in size.most) > 0
    race = size.most[0]
    assert (race.threads, race.texts) == (("mm", "v0"), ("host-unmap 0x20", "read 0x20"))
    assert any("mmu_invalidate_seq" in name for name in race.objects)
    assert size.text().endswith("; `wait v0 1` before `host-unmap 0x20` orders these two")
    free, ordered = (
        explore_one(Work(test, "linux-7.3", Plan(executions=60), 0.0, explains=True))
        for test in (racing_test(), racing_test('"wait v0 1", '))
    )
    assert free.limit == "executions"
    assert free.size == size
    assert ordered.complete
    assert ordered.size is None


@pytest.mark.slow
def test_a_search_that_does_not_end_tells_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explore", "fault-races-two", "return-zap", "--executions", "20", "--jobs", "1"]
    assert main(words) == 0
    first, large, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("fault-races-two")
    assert large.startswith("    large because v0 and v1 race freely in ")
    assert second.startswith("return-zap")
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ExploreDocument.model_validate(document)
    unended, ended = document["explored"]
    assert unended["size"]["most"][0]["operations"] == ["v0: read 0x10", "v1: write 0x10"]
    assert "size" not in ended


def test_samples_have_no_size() -> None:
    work = Work(load_test("fault-races-two"), "linux-7.3", Plan("pct", executions=5), 0.0, explains=True)
    assert explore_one(work).size is None
