"""SVG, JSON and Perfetto traces of a race: well-formed, self-contained, complete."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from emulator.explain.document import Case
from emulator.explain.explanation import as_dict, explain
from emulator.explain.facts import Facts
from emulator.explain.meanings import CULPRITS, ELIDED
from emulator.explain.perfetto import perfetto
from emulator.explain.svg import svg
from tests.emulator.explain.race import HOST, Race, flushed_mask, noisy

SVG = "{http://www.w3.org/2000/svg}"


def case(race: Race, policy: str = "p", timed: bool = True) -> Case:
    whole = race.report()
    names = {int(cpu): name for cpu, name in whole["actors"].items()}
    return Case("main", policy, whole, Facts.of_report(whole), tuple(race.events), names, timed)


def texts(picture: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in picture.iter(f"{SVG}text")]


def test_svg_is_whole_and_alone() -> None:
    source = svg(explain(case(flushed_mask(), policy="a<b & c")))
    picture = ElementTree.fromstring(source)
    assert "use-after-free under a<b & c (main), VM 0" in texts(picture)
    for words in ("CPU0", "CPU1", "host0", "ELIDED", "[4]", "kick: IPI to CPU1"):
        assert words in texts(picture)
    # Nothing is fetched: no links, images, fonts or scripts.
    assert not re.search(r"href|@import|<script|<image|url\((?!#m\))", source)
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    for rect in picture.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", 0)), float(rect.get("y", 0))
        assert 0 <= x <= x + float(rect.attrib["width"]) <= width
        assert 0 <= y <= y + float(rect.attrib["height"]) <= height


def test_svg_boxes_do_not_overlap() -> None:
    picture = ElementTree.fromstring(svg(explain(case(flushed_mask()))))
    boxes = [
        (float(r.attrib["y"]), float(r.attrib["height"]))
        for r in picture.iter(f"{SVG}rect")
        if "rx" in r.attrib
    ]
    assert len(boxes) == 13
    for (y, height), (following, _) in itertools.pairwise(boxes):
        assert y + height < following


def test_svg_shows_whichever_moment_is_to_blame() -> None:
    explained = explain(case(flushed_mask()))
    (elided,) = (i for i, row in enumerate(explained.rows) if row.meaning == ELIDED)
    for meaning in CULPRITS:
        rows = list(explained.rows)
        rows[elided] = replace(rows[elided], meaning=meaning)
        picture = ElementTree.fromstring(svg(replace(explained, rows=tuple(rows))))
        boxes = [rect for rect in picture.iter(f"{SVG}rect") if "rx" in rect.attrib]
        assert boxes[elided].attrib["stroke"] == "#b3261e", meaning


def test_svg_has_arrows_for_moves_and_interrupts() -> None:
    picture = ElementTree.fromstring(svg(explain(case(flushed_mask()))))
    assert [path.get("class") for path in picture.iter(f"{SVG}path") if path.get("class")] == ["a", "i", "a"]


def test_json_says_what_the_diagram_shows() -> None:
    whole = json.loads(json.dumps(as_dict(explain(case(flushed_mask())))))
    assert [actor["label"] for actor in whole["actors"]] == ["CPU0", "CPU1", "host0"]
    marks = {moment["mark"]: moment["part"] for moment in whole["moments"] if moment["mark"]}
    assert marks == {1: "fill", 2: "revoke", 3: "elided", 4: "use"}
    assert [note["mark"] for note in whole["legend"]] == [1, 2, 3, 4]
    assert whole["moments"][0]["time_ns"] > 0
    untimed = as_dict(explain(case(flushed_mask(), timed=False)))
    assert "time_ns" not in untimed["moments"][0]


def trace_of(race: Race, timed: bool = True) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(perfetto(case(race, timed=timed)))["traceEvents"]
    return events


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("race", [flushed_mask(), noisy(flushed_mask())])
def test_perfetto_has_what_the_format_wants(race: Race, timed: bool) -> None:
    events = trace_of(race, timed)
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= set(event)
        assert event["ph"] in {"M", "X", "i", "s", "f"}
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] > 0
        if event["ph"] == "i":
            assert event["s"] == "t"
        if event["ph"] in "sf":
            assert event["id"]
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in events if event["ph"] != "M"} <= threads


def test_perfetto_has_guest_mode_flushes_and_arrows() -> None:
    events = trace_of(flushed_mask())
    guest = [e for e in events if e["ph"] == "X" and e["name"].startswith("guest mode")]
    # From entry to exit, a microsecond each here; the last one goes on to the use.
    assert [(e["tid"], e["dur"]) for e in guest][:1] == [(0, 1.0)]
    assert len(guest) == 4
    flushes = [e for e in events if e["ph"] == "i" and e["cat"] == "flush"]
    assert [e["tid"] for e in flushes] == [0, 1, 1]
    assert [e["name"] for e in events if e["ph"] == "i" and e["cat"] == "elided"] == [
        "[elided] flush for migration, ELIDED"
    ]
    (start,) = [e for e in events if e["ph"] == "s"]
    (finish,) = [e for e in events if e["ph"] == "f"]
    assert (start["tid"], finish["tid"]) == (HOST, 1)
    assert start["id"] == finish["id"]
    assert start["ts"] < finish["ts"]
    # An arrow ends in the slice that encloses it.
    assert finish["bp"] == "e"
    assert any(e["ph"] == "X" and e["tid"] == 1 and e["ts"] == finish["ts"] for e in events)


def test_pcpus_and_threads_are_processes_of_their_own() -> None:
    events = trace_of(flushed_mask())
    names = {e["args"]["name"]: (e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert names["CPU0"][0] == names["CPU1"][0] != names["host0"][0]
