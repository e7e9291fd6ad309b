"""The record: fingerprints of the kernel functions that the model cites, by the version of the kernel.

The shipped file has names, paths, versions and hashes, and no kernel source.  `flushlab drift TREE --record
FILE` adds the version of a tree to a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emulator.drift.tree import LinuxTree
from emulator.errors import BadInput, one_of
from emulator.output import check_file, write_file
from emulator.validation import first_error, read_json

_EXPECTED: Final = "fingerprints that `flushlab drift TREE --record FILE` wrote"
_Version = Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+[\w.+-]*$", max_length=100)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Recorded(_Part):
    """A definition, and the versions that have it."""

    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    file: Annotated[str, Field(min_length=1)]
    versions: Annotated[list[_Version], Field(min_length=1)]


class Record(_Part):
    # The version that the model follows, as far as it does not cite another one.
    modelled: _Version
    versions: Annotated[list[_Version], Field(min_length=1)]
    functions: dict[str, list[Recorded]]

    def fingerprints(self, name: str, version: str) -> frozenset[str]:
        """Return the fingerprints of a function in a version; none if that version lacks it."""
        return frozenset(one.fingerprint for one in self.functions.get(name, ()) if version in one.versions)

    def versions_with(self, name: str, fingerprints: frozenset[str]) -> list[str]:
        """Return the versions in which the function has exactly these definitions."""
        return [version for version in self.versions if self.fingerprints(name, version) == fingerprints]

    def version_named(self, text: str) -> str:
        """Return the newest recorded version that the text names, in full or as a series such as 6.12."""
        matching = [one for one in self.versions if one == text or one.startswith(f"{text}.")]
        if not matching:
            raise BadInput("--since", f"found {text!r}", one_of(text, self.versions))
        return matching[-1]


def shipped_record() -> Record:
    file = resources.files("emulator.drift").joinpath("kernel-functions.json")
    return Record.model_validate_json(file.read_text("utf-8"))


def load_record(path: Path) -> Record:
    """Load a record from a file; raise BadInput if it is none."""
    document = read_json(path, _EXPECTED)
    if not isinstance(document, dict):
        raise BadInput(str(path), "no table", _EXPECTED)
    try:
        record = Record.model_validate(document)
    except ValidationError as error:
        found, expected = first_error(error, Record)
        raise BadInput(str(path), found, expected) from error
    if record.modelled not in record.versions:
        raise BadInput(str(path), f"modelled: found {record.modelled!r}", one_of("", record.versions))
    return record


def record_tree(path: Path, tree: LinuxTree, names: Iterable[str]) -> Record:
    """Put the version of a tree into the record at `path`, which may be new; return the record.

    Functions that the model does not cite any more leave it.
    """
    check_file("--record", path)
    old = load_record(path) if path.exists() else None
    functions: dict[str, list[Recorded]] = {}
    for name in sorted(names):
        found: dict[tuple[str, str], set[str]] = {}
        for one in old.functions.get(name, ()) if old else ():
            found[one.fingerprint, one.file] = set(one.versions) - {tree.version}
        for place in tree.functions.get(name, ()):
            # JSON has no lone surrogates, which stand for bytes that are no UTF-8.
            file = place.file.encode("utf-8", "backslashreplace").decode()
            found.setdefault((place.fingerprint, file), set()).add(tree.version)
        entries = [
            Recorded(fingerprint=mark, file=file, versions=sorted(versions, key=_order))
            for (mark, file), versions in found.items()
            if versions
        ]
        if entries:
            functions[name] = sorted(
                entries, key=lambda one: (_order(one.versions[0]), one.file, one.fingerprint)
            )
    versions = sorted({tree.version, *(old.versions if old else ())}, key=_order)
    record = Record(modelled=old.modelled if old else tree.version, versions=versions, functions=functions)
    write_file("--record", path, _as_text(record))
    return record


def _order(version: str) -> list[tuple[int, int, str]]:
    """Return a key that puts 6.9.0 before 6.12.0, and 7.3.0-rc2 before 7.3.0-rc10 and both before 7.3.0."""
    parts = re.findall(r"\d+|[A-Za-z]+", version)
    return [(2, int(part), "") if part.isdigit() else (0, 0, part) for part in parts] + [(1, 0, "")]


def _as_text(record: Record) -> str:
    """Return JSON with one definition a line, so that changes are easy to read."""
    lines = [
        "{",
        f'"modelled": {json.dumps(record.modelled)},',
        f'"versions": {json.dumps(record.versions)},',
    ]
    lines.append('"functions": {')
    functions = []
    for name, entries in record.functions.items():
        rows = ",\n".join(f"  {json.dumps(one.model_dump())}" for one in entries)
        functions.append(f"{json.dumps(name)}: [\n{rows}\n]")
    return "\n".join([*lines, ",\n".join(functions), "}", "}", ""])
