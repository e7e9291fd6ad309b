"""Findings as text of 80 columns, as JSON, and as differences between two trees."""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

from emulator.drift.citations import Citation, How, Origin
from emulator.drift.compare import Base, Finding, RecordedBase, Status
from emulator.drift.tree import LinuxTree, Place

_WIDTH: Final = 80


def as_text(tree: LinuxTree, base: Base, findings: list[Finding], everything: bool) -> str:
    """Return the report, grouped by the project's files.

    A function is listed where it is mirrored, or where it is mentioned if no code mirrors it.
    """
    modelled = isinstance(base, RecordedBase) and base.version == base.record.modelled
    follows = ", which the model follows" if modelled else ""
    lines = [f"Linux {tree.version}, compared with Linux {base.version}{follows}", ""]
    for file, entries in _by_file(findings, everything).items():
        lines.append(file)
        for line, finding, mirrors in entries:
            row = f"{line:>6}  {finding.name}{'' if mirrors else ' (mentioned)'}: {_what(finding, base)}"
            lines += _wrapped(row)
        lines.append("")
    numbers = ", ".join(f"{number} {status}" for status, number in counts(findings).items())
    lines.append(f"cited functions: {len(findings)}; {numbers}")
    return "\n".join(lines) + "\n"


def strangers_text(strangers: dict[str, list[Citation]]) -> str:
    """Return the functions that were found nowhere, each with the first place that cites it."""
    lines = ["", "Found nowhere: misspelt, or of an origin that the citation does not name"]
    for name, citations in strangers.items():
        one = min(citations, key=lambda one: (one.how is How.NAMED, one.file, one.line))
        lines += _wrapped(f"        {name}: {one.file}:{one.line}")
    return "\n".join(lines) + "\n"


def elsewhere_text(elsewhere: dict[str, Origin]) -> str:
    """Return the functions that are in no KVM, each with the origin that its citation names."""
    lines = ["", "Of other parts of the kernel, of other versions, or proposed"]
    for name, origin in elsewhere.items():
        lines += _wrapped(f"        {name}: {origin}")
    return "\n".join(lines) + "\n"


def _wrapped(row: str) -> list[str]:
    return textwrap.wrap(
        row, _WIDTH, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False
    )


def _by_file(findings: list[Finding], everything: bool) -> dict[str, list[tuple[int, Finding, bool]]]:
    files: dict[str, list[tuple[int, Finding, bool]]] = defaultdict(list)
    for finding in findings:
        if finding.status is Status.SAME and not everything:
            continue
        mirrors = any(citation.mirrors for citation in finding.citations)
        lines: dict[str, int] = {}
        for citation in finding.citations:
            if citation.mirrors == mirrors:
                lines.setdefault(citation.file, citation.line)
        for file, line in lines.items():
            files[file].append((line, finding, mirrors))
    return {file: sorted(files[file], key=lambda entry: (entry[0], entry[1].name)) for file in sorted(files)}


def _what(finding: Finding, base: Base) -> str:
    parts = [f"not in {base.version}" if finding.status is Status.ADDED else str(finding.status)]
    if finding.status in (Status.CHANGED, Status.ADDED):
        if finding.same_as:
            parts.append(f"as in {', '.join(finding.same_as)}")
        elif isinstance(base, RecordedBase):
            parts.append("as in no recorded version")
    if finding.renamed:
        parts.append(f"its body is {', '.join(f'{name}()' for name in finding.renamed[:3])} now")
    elif finding.similar:
        parts.append(f"perhaps {finding.similar[0]}()")
    parts += [f"{place.file}:{place.first}" for place in finding.places[:3]]
    return "; ".join(parts)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """Return the number of findings by status, each status present."""
    number = Counter(finding.status for finding in findings)
    return {str(status): number[status] for status in Status}


def as_dict(
    tree: LinuxTree,
    base: Base,
    findings: list[Finding],
    strangers: dict[str, list[Citation]],
    diffs: dict[str, str],
) -> dict[str, Any]:
    """Return the JSON document."""
    functions = []
    for finding in findings:
        entry = {**asdict(finding), "status": str(finding.status)}
        if finding.name in diffs:
            entry["diff"] = diffs[finding.name]
        functions.append(entry)
    return {
        "flushlab_drift": 1,
        "tree": str(tree.top),
        "version": tree.version,
        "compared_with": base.version,
        "counts": counts(findings),
        "functions": functions,
        "found_nowhere": {name: [asdict(one) for one in places] for name, places in strangers.items()},
    }


def differences(new: LinuxTree, old: LinuxTree, findings: list[Finding]) -> dict[str, str]:
    """Return a unified diff for each function that changed from one tree to the other."""
    return {
        finding.name: "".join(_diff(new, old, finding))
        for finding in findings
        if finding.status is Status.CHANGED
    }


def _diff(new: LinuxTree, old: LinuxTree, finding: Finding) -> Iterator[str]:
    """Pair the definitions that differ, in the order of files and lines, and yield the lines of a diff."""
    before, after = old.fingerprints(finding.name), new.fingerprints(finding.name)
    gone = [place for place in old.functions[finding.name] if place.fingerprint not in after]
    come = [place for place in finding.places if place.fingerprint not in before]
    for number in range(max(len(gone), len(come))):
        one, other = gone[number : number + 1], come[number : number + 1]
        yield from difflib.unified_diff(
            _text(old, one),
            _text(new, other),
            _label("a", old, one),
            _label("b", new, other),
            n=8,
            lineterm="\n",
        )


def _text(tree: LinuxTree, places: list[Place]) -> list[str]:
    return [f"{_printable(line)}\n" for place in places for line in tree.text(place)]


def _label(side: str, tree: LinuxTree, places: list[Place]) -> str:
    return f"{side}/{places[0].file}\tLinux {tree.version}, line {places[0].first}" if places else "/dev/null"


def _printable(line: str) -> str:
    """Return the line with control characters spelled out, because it is printed on a terminal."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line.rstrip("\r"))
