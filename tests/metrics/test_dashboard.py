"""The dashboard and the alert rules speak of series that exist."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

import pytest

from metrics import MachineCollector
from tests.support import BareMachine


@pytest.fixture
def exported(bare_machine: BareMachine) -> set[str]:
    collector = MachineCollector()
    bare_machine.show_to(collector)
    names: set[str] = set()
    for family in collector.collect():
        names |= {sample.name for sample in family.samples}
        # A family without samples yet.
        names.add(f"{family.name}_total" if family.type == "counter" else family.name)
    return names


def dashboard() -> Any:
    return json.loads(resources.files("metrics").joinpath("grafana/flushlab.json").read_text())


def test_dashboard_uses_exported_series(exported: set[str]) -> None:
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    used = {name for expression in expressions for name in re.findall(r"flushlab_\w+", expression)}
    assert len(used) > 15
    assert used <= exported


def test_rules_use_exported_series(exported: set[str]) -> None:
    text = resources.files("metrics").joinpath("rules/flushlab.yml").read_text()
    used = set(re.findall(r"\bflushlab_\w+", text))
    assert used
    assert used <= exported


def test_console_page_uses_exported_series(exported: set[str]) -> None:
    text = resources.files("metrics").joinpath("consoles/flushlab.html").read_text()
    used = set(re.findall(r"\bflushlab_\w+", text)) - {"flushlab_build_info"}
    assert len(used) > 10
    assert used <= exported


def test_levels_of_nested_guests_have_panels() -> None:
    by_level = {
        name
        for panel in dashboard()["panels"]
        for target in panel["targets"]
        for name in re.findall(r"sum by \(level\) \(rate\((flushlab_\w+)", target["expr"])
    }
    assert {"flushlab_vm_entries_by_level_total", "flushlab_tlb_flushes_by_level_total"} <= by_level


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        grid = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not mine & cells, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        cells |= mine
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(ids) == len(set(ids))
