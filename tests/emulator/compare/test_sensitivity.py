"""Which order of the policies depends on the table of costs, and on which of its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.compare.document import comparison_document
from emulator.compare.measure import measure
from emulator.compare.runner import Comparison
from emulator.compare.sensitivity import Sensitivity, order_of, sensitivity, sentences
from emulator.scenario.costs import Costs, load_costs
from tests.emulator.canned import snapshot
from tests.emulator.compare.figures import comparison, partitioned, run_of
from tests.emulator.compare.test_views import page, printed

ENTRIES = ("invept_global", "invept_single", "ipi_send", "walk_reference")
FACTORS = st.floats(0.1, 10, allow_nan=False)


def costs_of(**entries: dict[str, Any]) -> Costs:
    return Costs.model_validate({**dict(load_costs()), **entries})


def two(left: dict[str, float], right: dict[str, float], costs: Costs) -> Sensitivity:
    return order_of({"left": left, "right": right}, costs, "migration")


def test_one_figure_turns_the_order() -> None:
    """3 x + 300 = 600 at x = 100."""
    costs = costs_of(
        invept_single={"cycles": 50, "range": [10, 500]},
        ipi_send={"cycles": 300, "range": [300, 300]},
        invept_global={"cycles": 600},
    )
    found = two({"invept_single": 3, "ipi_send": 1}, {"invept_global": 1}, costs)
    assert list(found.cycles.items()) == [("left", 450), ("right", 600)]
    (turn,) = found.turns
    assert (turn.entry, turn.at, turn.below, turn.above) == ("invept_single", 100, "left", "right")
    (pair,) = found.pairs
    assert (pair.saved, pair.least, pair.most, pair.always) == (150, 600 - 1800, 600 - 330, False)
    assert "From invept_single = 100 (table: 50, range: 10 to 500) right is cheaper than left." in sentences(
        found
    )


def test_a_figure_below_the_tables_turns_it_too() -> None:
    costs = costs_of(
        invept_single={"cycles": 400, "range": [10, 500]}, invept_global={"cycles": 600, "range": [600, 600]}
    )
    found = two({"invept_single": 3}, {"invept_global": 1}, costs)
    assert [(turn.at, turn.below, turn.above) for turn in found.turns] == [(200, "left", "right")]
    assert (
        "Up to invept_single = 200 (table: 400, range: 10 to 500) left is cheaper than right."
        in sentences(found)
    )


def test_more_of_everything_is_dearer_wherever_the_costs_lie() -> None:
    found = two({"invept_global": 1, "ipi_send": 2}, {"invept_global": 2, "ipi_send": 3}, load_costs())
    assert [pair.always for pair in found.pairs] == [True]
    assert found.turns == []
    assert "No figure turns the order by itself within its range." in sentences(found)


EVENTS = st.dictionaries(st.sampled_from(ENTRIES), st.floats(0, 100), min_size=1)


def one_each(values: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, float]]:
    return st.fixed_dictionaries(dict.fromkeys(ENTRIES, values))


@pytest.mark.slow
@given(EVENTS, EVENTS, one_each(FACTORS), one_each(st.floats(0, 1)))
def test_no_costs_in_the_ranges_contradict_it(
    left: dict[str, float], right: dict[str, float], factors: dict[str, float], where: dict[str, float]
) -> None:
    """Wherever the figures lie, the difference of two policies is within the pair's bounds."""
    ranges = {entry: {"cycles": 100 * x, "range": [50 * x, 300 * x]} for entry, x in factors.items()}
    found = two(left, right, costs_of(**ranges))
    (pair,) = found.pairs
    cycles = {entry: x * (50 + 250 * where[entry]) for entry, x in factors.items()}
    total = {
        name: sum(count * cycles[entry] for entry, count in events.items())
        for name, events in (("left", left), ("right", right))
    }
    saved = total[pair.dearer] - total[pair.cheaper]
    slack = 1e-6 * (1 + abs(saved) + abs(pair.least) + abs(pair.most))
    assert pair.least - slack <= saved <= pair.most + slack
    assert pair.least - slack <= pair.saved <= pair.most + slack


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(ENTRIES), st.floats(1, 100), min_size=1))
def test_at_a_turn_both_cost_the_same(left: dict[str, float]) -> None:
    right = {"invept_global": 40.0, "ipi_send": 3.0}
    found = two(left, right, load_costs())
    table = {entry: cost.cycles for entry, cost in load_costs()}
    for turn in found.turns:
        moved = {**table, turn.entry: turn.at}
        ends = [sum(count * moved[entry] for entry, count in each.items()) for each in (left, right)]
        assert ends[0] == pytest.approx(ends[1])
        moved[turn.entry] = turn.at + 1
        ends = [sum(count * moved[entry] for entry, count in each.items()) for each in (left, right)]
        assert ("left", "right")[ends[1] < ends[0]] == turn.above


def test_a_policy_with_violations_has_no_place_in_the_order() -> None:
    found = sensitivity(comparison())
    assert found.refuted == ["lkml-2025-cpu-flushed-mask"]
    assert sorted(found.cycles) == ["linux-7.3", "root-tlb-gen"]


def test_cycles_are_those_of_the_table() -> None:
    """The repetitions of a policy count as one long run."""
    found, compared = sensitivity(comparison()), comparison()
    (only,) = compared.measurements["root-tlb-gen"]
    assert found.cycles["root-tlb-gen"] == pytest.approx(only.values["flush cycles/unit"])
    twice = [m.values["flush cycles/unit"] for m in compared.measurements["linux-7.3"]]
    assert found.cycles["linux-7.3"] == pytest.approx(sum(twice) / 2)
    assert found.per == "root allocation"


def test_at_a_pace_cycles_are_per_access() -> None:
    compared = comparison()
    scenario = partitioned().changed(pace=1.0)
    plan = replace(compared.plan, scenario=scenario)
    runs = {name: [measure(m.result, scenario) for m in of] for name, of in compared.columns}
    found = sensitivity(Comparison(plan, runs))
    assert found.per == "million guest accesses"
    (only,) = runs["root-tlb-gen"]
    assert found.cycles["root-tlb-gen"] == pytest.approx(only.values["flush cycles/M"])


def asked() -> Comparison:
    compared = comparison()
    return replace(compared, plan=replace(compared.plan, sensitivity=True))


@pytest.mark.slow
def test_it_is_told_if_asked(tmp_path: Any) -> None:
    assert "wherever the costs lie" not in printed(comparison())
    assert "sensitivity" not in comparison_document(comparison())
    text = " ".join(printed(asked(), 80).split())
    assert "costs and the order of the policies Modelled cycles of flushing per root allocation:" in text
    told = json.loads(json.dumps(comparison_document(asked())))["sensitivity"]
    assert told["pairs"][0]["cheaper"] == "root-tlb-gen"
    assert told["ranges"]["invept_global"] == {"cycles": 450, "least": 400, "most": 1500}
    assert "Costs and the order of the policies" in page(asked(), tmp_path)


def test_without_two_sound_policies_there_is_no_order() -> None:
    few = snapshot(violations={"use-after-free": 1})
    compared = comparison()
    scenario = partitioned()
    runs = {
        "linux-7.3": compared.measurements["linux-7.3"],
        "root-tlb-gen": [measure(run_of("root-tlb-gen", now=few), scenario)],
    }
    (told,) = sentences(sensitivity(Comparison(compared.plan, runs)))
    assert "fewer than two" in told
