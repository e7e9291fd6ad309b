"""A comparison as a table, a document and a page."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from emulator.compare import plots
from emulator.compare.bound import NAME
from emulator.compare.document import comparison_document
from emulator.compare.measure import Measurement
from emulator.compare.runner import Comparison
from emulator.compare.table import comparison_table
from emulator.scenario.workload import Activity
from native import FLUSH_REASONS
from tests.emulator.compare.figures import comparison


def printed(what: Comparison, width: int = 200) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, highlight=False)
    console.print(comparison_table(what, console))
    return text.getvalue()


def page(what: Comparison, tmp_path: Path) -> str:
    pytest.importorskip("matplotlib")
    from emulator.compare.html import write_page

    write_page(what, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text("utf-8")


def test_table_has_a_column_per_policy_and_the_bound() -> None:
    text = printed(comparison())
    head = next(line for line in text.splitlines() if "root-tlb-gen" in line)
    assert re.search(r"linux-7\.3 +root-tlb-gen +lkml-2025-cpu-flushed-mask +oracle-optimal", head)
    assert "partitioned: " in text
    assert re.search(r"verdict +clean +clean +violations", text)
    assert "received by tenants" in text
    assert "interruptions of uninvolved pCPUs" in text
    assert "use-after-free: <vCPU 0> & more" in text


@pytest.mark.parametrize("width", [80, 100])
def test_on_a_narrow_terminal_letters_stand_for_policies(width: int) -> None:
    text = printed(comparison(), width)
    assert "A  linux-7.3\nB  root-tlb-gen\nC  lkml-2025-cpu-flushed-mask\nbound  oracle-optimal" in text
    assert re.search(r"\n +A +B +C +bound *\n", text)
    assert re.search(r"verdict +clean +clean +violations *\n", text)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


def test_wall_clock_figures_have_their_spread() -> None:
    assert "2 s (1 s to 3 s)" in printed(comparison())


def test_what_was_cut_short_says_so() -> None:
    assert "cut short by the time limit: linux-7.3, repetition 1" in printed(
        comparison(cut_short=("linux-7.3, repetition 1",))
    )


def test_rates_that_were_not_reached_are_said() -> None:
    def having(name: str, *activities: Activity) -> list[Measurement]:
        return [replace(m, result=replace(m.result, activities=activities)) for m in whole.measurements[name]]

    whole = comparison()
    runs = {
        "linux-7.3": having("linux-7.3", Activity("migrate", 100.0, 1), Activity("unmap", 100.0, 95)),
        "root-tlb-gen": having("root-tlb-gen", Activity("migrate", 3.0, 1)),
    }
    text = " ".join(printed(Comparison(whole.plan, runs)).split())
    assert "linux-7.3 reached less than the scenario's rates: migrate 1%" in text
    assert "root-tlb-gen reached" not in text


@pytest.mark.slow
def test_nothing_finished_is_said_and_no_error(tmp_path: Path) -> None:
    empty = Comparison(comparison().plan, {"linux-7.3": []}, interrupted=True)
    assert "interrupted" in printed(empty)
    assert comparison_document(empty)[NAME] is None
    assert "No run was finished" in page(empty, tmp_path)


def test_document_is_json_with_every_figure() -> None:
    document = json.loads(json.dumps(comparison_document(comparison()), allow_nan=False))
    assert document["baseline"] == "linux-7.3"
    assert document["exit_status"] == 1
    first, second, third = document["policies"]
    assert (first["verdict"], third["verdict"]) == ("clean", "violations")
    assert [len(policy["runs"]) for policy in document["policies"]] == [2, 1, 1]
    assert second["figures"]["flushes/M"]["median"] < first["figures"]["flushes/M"]["median"]
    assert first["runs"][0][NAME]["flushes"] == document[NAME]["flushes"] == 8
    assert document[NAME]["figures"]["times the bound"] == 1


@pytest.mark.slow
def test_page_is_self_contained_and_escapes_what_it_shows(tmp_path: Path) -> None:
    text = page(comparison(), tmp_path)
    assert "&lt;vCPU 0&gt; &amp; more" in text
    assert "<vCPU" not in text
    links = re.findall(r'(?:src|href)="([^"#]+)"', text)
    assert all(link.startswith("data:") for link in links), "a page that must be shown without anything else"
    assert not re.search(r"url\((?!#)", text)
    assert text.count("<figure>") == 6
    assert text.count("<svg") == 6


@pytest.mark.slow
def test_page_holds_its_figures_and_says_when_and_where_it_was_made(tmp_path: Path) -> None:
    text = page(comparison(), tmp_path)
    (data,) = re.findall(r'href="data:application/json;base64,([^"]+)"', text)
    assert json.loads(base64.b64decode(data)) == json.loads(json.dumps(comparison_document(comparison())))
    assert re.search(r"flushlab [\w.]+, \d{4}-\d\d-\d\d \d\d:\d\d \w+, \S+, Linux ", text)


def _refuted_and_cheaper() -> Comparison:
    """The policy that violates also has fewer flushes."""
    whole = comparison()
    few = whole.measurements["root-tlb-gen"][0]
    wrong = replace(few.result, snapshot=replace(few.result.snapshot, violations={"use-after-free": 1}))
    runs = {**whole.measurements, "root-tlb-gen": [replace(few, result=wrong)]}
    return Comparison(whole.plan, runs)


@pytest.mark.slow
def test_a_refuted_policy_has_no_figure_that_looks_good(tmp_path: Path) -> None:
    good = page(comparison(), tmp_path)
    assert 'class="better"' in good
    assert "delta better" in good
    text = page(_refuted_and_cheaper(), tmp_path)
    assert 'class="better"' not in text
    assert "delta better" not in text
    for what, green in ((comparison(), True), (_refuted_and_cheaper(), False)):
        console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
        console.print(comparison_table(what, console))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert bool(re.search(r"\x1b\[32m +-94%", shown)) == green


@pytest.mark.slow
def test_bars_have_units_and_the_spread_of_the_runs(tmp_path: Path) -> None:
    text = page(comparison(), tmp_path)
    assert "cycles per root allocation" in text
    assert "guest accesses per second" in text
    whole = comparison()
    two = whole.measurements["linux-7.3"]
    values = {key: 2 * value for key, value in two[1].values.items()}
    runs = {**whole.measurements, "linux-7.3": [two[0], replace(two[1], values=values)]}
    spread = page(Comparison(whole.plan, runs), tmp_path)
    assert spread.count('<g id="line2d_') > text.count('<g id="line2d_')


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2, 5, len(FLUSH_REASONS)])
def test_legends_lie_in_their_pictures(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Figure] = []

    class Kept(Figure):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            made.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    names = [reason.replace("_", " ") for reason in FLUSH_REASONS[:parts]]
    policies = ("lkml-2025-cpu-flushed-mask+migration=none", "root-tlb-gen")
    stacks = {policy: dict.fromkeys(names, 1.0) for policy in policies}
    plots._stacked(stacks, "cycles", {}, marks=dict.fromkeys(policies, 1.0))
    (figure,) = made
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == parts + 1
    whole, box, bars = figure.bbox, legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert bars.y1 <= box.y0 < box.y1 <= whole.y1


@pytest.mark.slow
def test_page_is_readable_on_light_and_dark_ground(tmp_path: Path) -> None:
    text = page(comparison(), tmp_path)
    assert "prefers-color-scheme: dark" in text
    assert "var(--text)" in text[text.index("<svg") :]
    assert not re.search(r"#0[123]0[123]0[123]", text), "a placeholder stayed"


@pytest.mark.slow
def test_costs_are_per_operation_where_the_guests_do_not_set_the_pace(tmp_path: Path) -> None:
    """More accesses in the same time would look like less flushing."""
    text = page(comparison(), tmp_path)
    assert "modelled cycles of flushing per root allocation;" in text
    paced = comparison()
    scenario = paced.plan.scenario.changed(pace=100)
    text = page(replace(paced, plan=replace(paced.plan, scenario=scenario)), tmp_path)
    assert "modelled cycles of flushing per million guest accesses;" in text


@pytest.mark.slow
def test_page_says_how_to_run_it_again_and_where_policies_differ(tmp_path: Path) -> None:
    text = page(comparison(), tmp_path)
    assert "flushlab compare partitioned --policy linux-7.3 --policy root-tlb-gen" in text
    assert "--pcpus 16 --duration 5s --ept --repeat 2 --seed 1" in text
