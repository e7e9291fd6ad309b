"""Verdicts in the forms that kernel and CI tools read: KTAP (Documentation/dev-tools/ktap.rst) and JUnit XML.

A case is a test under a policy.  It passed if nothing was found, however far the search came, which its text
says; it was skipped if nothing was tested.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal
from xml.etree import ElementTree

Ending = Literal["passed", "failed", "skipped"]
_NO_XML: Final = re.compile(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Case:
    """A test under a policy.  `said` is a line, `detail` the report of a violation."""

    test: str
    policy: str
    ending: Ending
    said: str
    detail: str = ""


def ktap(cases: Sequence[Case]) -> str:
    """Return the cases as KTAP, version 1."""
    lines = ["KTAP version 1", f"1..{len(cases)}"]
    for number, case in enumerate(cases, 1):
        result = "not ok" if case.ending == "failed" else "ok"
        # A number sign begins a directive.
        name = _one_line(f"{case.test}.{case.policy}").replace("#", "_")
        skipped = f" # SKIP {_one_line(case.said)}" if case.ending == "skipped" else ""
        if not skipped:
            lines.append(f"# {_one_line(case.said)}")
        lines += [f"# {line}" for line in case.detail.splitlines()]
        lines.append(f"{result} {number} {name}{skipped}")
    sums = Counter(case.ending for case in cases)
    lines.append(
        f"# Totals: pass:{sums['passed']} fail:{sums['failed']} xfail:0 xpass:0 skip:{sums['skipped']}"
        " error:0"
    )
    return "\n".join(lines) + "\n"


def junit(suite: str, cases: Sequence[Case]) -> str:
    """Return the cases as JUnit XML: a suite, with the policy as a case's class."""
    sums = Counter(case.ending for case in cases)
    numbers = {"tests": len(cases), "failures": sums["failed"], "errors": 0, "skipped": sums["skipped"]}
    attributes = {name: str(number) for name, number in numbers.items()}
    root = ElementTree.Element("testsuites", attributes)
    element = ElementTree.SubElement(root, "testsuite", {"name": suite, **attributes})
    for case in cases:
        one = ElementTree.SubElement(
            element, "testcase", {"name": _xml(case.test), "classname": _xml(case.policy)}
        )
        if case.ending == "passed":
            ElementTree.SubElement(one, "system-out").text = _xml(case.said)
            continue
        tag = "failure" if case.ending == "failed" else "skipped"
        ElementTree.SubElement(one, tag, {"message": _xml(_one_line(case.said))}).text = _xml(case.detail)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _xml(text: str) -> str:
    """Return the text without the characters that XML 1.0 forbids."""
    return _NO_XML.sub("\ufffd", text)
