"""Verdicts as KTAP and JUnit XML."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.report.cases import Case, junit, ktap

_CASES = st.lists(
    st.builds(
        Case,
        st.text(min_size=1, max_size=20),
        st.text(min_size=1, max_size=20),
        st.sampled_from(("passed", "failed", "skipped")),
        st.text(max_size=40),
        st.text(max_size=60),
    )
)


@pytest.mark.slow
@given(_CASES)
def test_xml_has_each_case_whatever_its_text(cases: list[Case]) -> None:
    root = ElementTree.fromstring(junit("suite", cases).encode("utf-8", "surrogatepass"))
    (suite,) = root
    assert len(suite) == int(suite.attrib["tests"]) == len(cases)
    for case, element in zip(cases, suite, strict=True):
        tags = [child.tag for child in element]
        assert tags == [{"passed": "system-out", "failed": "failure", "skipped": "skipped"}[case.ending]]
    assert suite.attrib["failures"] == str(sum(case.ending == "failed" for case in cases))


@pytest.mark.slow
@given(_CASES)
def test_ktap_has_a_line_for_each_case_in_order(cases: list[Case]) -> None:
    lines = ktap(cases).split("\n")
    assert lines[:2] == ["KTAP version 1", f"1..{len(cases)}"]
    results = [match for line in lines if (match := re.match(r"(not )?ok (\d+) ", line))]
    assert [int(match[2]) for match in results] == list(range(1, len(cases) + 1))
    assert [bool(match[1]) for match in results] == [case.ending == "failed" for case in cases]
    assert all(line.startswith(("#", "ok ", "not ok ")) for line in lines[2:-1])


def test_explore_as_ktap_and_junit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cases.xml"
    arguments = ["explore", "return-zap", "--policy", "linux-7.3", "--policy", "lkml-2025-cpu-flushed-mask"]
    assert main([*arguments, "--jobs", "1", "--ktap", "--junit", str(file)]) == 1
    text = capsys.readouterr().out
    assert "\nok 1 return-zap.linux-7.3\n" in text
    assert "\nnot ok 2 return-zap.lkml-2025-cpu-flushed-mask\n" in text
    assert re.search(r"^# no violation in (all \d+ interleavings|the only interleaving),", text, re.MULTILINE)
    assert re.search(r"^# .*stale-after-revoke", text, re.MULTILINE)
    assert "# Totals: pass:1 fail:1 " in text
    root = ElementTree.parse(file).getroot()
    assert (root.attrib["tests"], root.attrib["failures"]) == ("2", "1")


def test_an_expected_violation_is_a_case_that_passed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["litmus", "return-zap", "--policy", "lkml-2025-cpu-flushed-mask", "--explore"]
    assert main([*arguments, "--jobs", "1", "--ktap"]) == 0
    assert "\nok 1 return-zap.lkml-2025-cpu-flushed-mask\n" in capsys.readouterr().out


def test_a_test_that_tested_nothing_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = tmp_path / "idle.toml"
    test.write_text(
        'doc = "Nothing is taken away."\nsource = "made up"\n'
        '[threads.v0]\nvcpu = 0\nops = ["read 0x10"]\n[expect]\nneeds = ["averted"]\n'
    )
    assert main(["explore", str(test), "--ktap"]) == 0
    assert re.search(r"^ok 1 .* # SKIP inconclusive", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["explore", "return-zap", "--ktap", "--json"],
        ["explore", "return-zap", "--trace", "--ktap"],
        ["explore", "return-zap", "--audit", "--junit", "x.xml"],
        ["litmus", "return-zap", "--ktap", "--json"],
        ["explore", "return-zap", "--junit", "/no/such/place/x.xml"],
    ],
)
def test_bad_use_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
