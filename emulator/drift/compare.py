"""Compares the cited functions of a tree with a record, or with another tree."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias

from emulator.drift.citations import Citation, How, Origin, origins
from emulator.drift.record import Record
from emulator.drift.tree import LinuxTree, Place

# Two names that share less than this of their letters are hardly one function's.
_SIMILAR: Final = 0.75


class Status(StrEnum):
    SAME = "same"
    CHANGED = "changed"
    GONE = "gone"
    ADDED = "added"
    UNRECORDED = "not recorded"


@dataclass(frozen=True, slots=True)
class Finding:
    """A cited function in a tree.

    `same_as`: the recorded versions with the definitions that the tree has.  `renamed` and `similar`: names
    in the tree with the former body, or else with a similar name.
    """

    name: str
    status: Status
    citations: list[Citation]
    places: list[Place]
    same_as: list[str]
    renamed: list[str]
    similar: list[str]


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """One version of a record, with which a tree is compared."""

    record: Record
    version: str

    def fingerprints(self, name: str) -> frozenset[str]:
        return self.record.fingerprints(name, self.version)

    def knows(self, name: str) -> bool:
        """Return whether the function was looked for when the version was recorded."""
        return name in self.record.functions

    def has(self, name: str) -> bool:
        return name in self.record.functions

    def same_as(self, name: str, fingerprints: frozenset[str]) -> list[str]:
        return self.record.versions_with(name, fingerprints)


@dataclass(frozen=True, slots=True)
class TreeBase:
    """Another tree, with which a tree is compared."""

    tree: LinuxTree

    @property
    def version(self) -> str:
        return self.tree.version

    def fingerprints(self, name: str) -> frozenset[str]:
        return self.tree.fingerprints(name)

    def knows(self, name: str) -> bool:
        return True

    def has(self, name: str) -> bool:
        return name in self.tree.functions

    def same_as(self, name: str, fingerprints: frozenset[str]) -> list[str]:
        return []


Base: TypeAlias = RecordedBase | TreeBase


def compare(tree: LinuxTree, base: Base, cited: Mapping[str, list[Citation]]) -> list[Finding]:
    """Return a finding for each cited function that the tree or the base has."""
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in tree.functions:
        for mark in tree.fingerprints(name):
            names_of[mark].append(name)
    findings = []
    for name, citations in cited.items():
        before, now = base.fingerprints(name), tree.fingerprints(name)
        if not before and not now:
            continue
        status = _status(base.knows(name), before, now)
        renamed: list[str] = []
        similar: list[str] = []
        if status is Status.GONE:
            renamed = sorted({other for mark in before for other in names_of[mark]})
            others = [other for other in tree.functions if other not in cited]
            similar = [] if renamed else difflib.get_close_matches(name, others, 1, _SIMILAR)
        same_as = base.same_as(name, now) if now else []
        places = tree.functions.get(name, [])
        findings.append(Finding(name, status, citations, places, same_as, renamed, similar))
    return findings


def strangers(tree: LinuxTree, base: Base, cited: Mapping[str, list[Citation]]) -> dict[str, list[Citation]]:
    """Return the functions that sentences cite and that neither the tree nor the record has.

    They are misspelt, or the citation names no origin (citations.py), or one that this tree contradicts.  A
    function of the project is among them only if a Python docstring says that it mirrors one of that name.
    """
    return {
        name: citations
        for name, citations in cited.items()
        if name not in tree.functions
        and not base.has(name)
        and _claims_a_kernel_function(citations)
        and not (name in origins() and is_plausible(tree, name, origins()[name]))
    }


def elsewhere(tree: LinuxTree, base: Base, cited: Mapping[str, list[Citation]]) -> dict[str, Origin]:
    """Return the origins of the functions that neither the tree's KVM nor the record has."""
    return {
        name: origin
        for name, origin in origins().items()
        if name in cited
        and name not in tree.functions
        and not base.has(name)
        and is_plausible(tree, name, origin)
    }


def is_plausible(tree: LinuxTree, name: str, origin: Origin) -> bool:
    """Return whether nothing in the tree contradicts this origin of a function that its KVM does not have.

    A tree may have KVM's files alone, and a stable kernel may lack a function of its version.
    """
    return not (tree.top / origin.file).is_file() or tree.has_word(origin.file, name)


def _claims_a_kernel_function(citations: list[Citation]) -> bool:
    if any(one.how is How.NAMED for one in citations):
        return any(one.how is How.MIRRORED and one.file.endswith(".py") for one in citations)
    return True


def _status(known: bool, before: frozenset[str], now: frozenset[str]) -> Status:
    if not known:
        return Status.UNRECORDED
    if before == now:
        return Status.SAME
    if not now:
        return Status.GONE
    return Status.CHANGED if before else Status.ADDED
