"""The store of a sweep: a file of JSON lines, one for each unit, written as soon as the unit has run.

A process that is killed leaves at most a last line without its end, which the next one drops.  One process
writes a store at a time; shards have stores of their own, which `flushlab merge` joins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from emulator.errors import BadInput, shown
from emulator.output import Appending, write_file
from emulator.validation import read_text

VERSION: Final = 1
Record = dict[str, Any]
_FIELDS: Final[dict[str, type]] = {
    "key": str, "number": int, "scenario": str, "point": dict, "policy": str, "seed": int,
    "verdict": str, "values": dict,
}  # fmt: skip
# Each line of a store begins so, see as_line().
_BEGINS: Final = '{"flushlab_sweep":'
# The most bytes that a store may have.
_MOST: Final = 1 << 30


def read_store(path: Path) -> dict[str, Record]:
    """Return the records by key, in the order of their lines.  Raises BadInput for a file of another kind."""
    found: dict[str, Record] = {}
    whole, _, _ = read_text(path, "a store of --store", _MOST).rpartition("\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        record = _record(f"{path}:{number}", line)
        found.setdefault(str(record["key"]), record)
    return found


def _record(where: str, line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadInput(where, f"found no JSON ({error})", "a line of a store") from error
    version = record.get("flushlab_sweep") if isinstance(record, dict) else None
    if version != VERSION:
        raise BadInput(where, f"found version {version!r}", f"a store's line of version {VERSION}")
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise BadInput(where, f"{name} is {shown(record.get(name))}", "a line as --store writes it")
    for figure, value in record["values"].items():
        if not isinstance(value, int | float):
            raise BadInput(where, f"values.{figure} is {shown(value)}", "a number")
    return dict(record)


class Store:
    """A store that is being filled; without a path the results are kept in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.records: dict[str, Record] = {}
        self._file = None if path is None else Appending("--store", path)
        self._path = path

    def __enter__(self) -> Self:
        if self._file is not None and self._path is not None:
            self._file.open()
            try:
                self.records = read_store(self._path)
                self._file.mend(_BEGINS)
            except BaseException:
                self._file.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, record: Record) -> None:
        """Keep a record.  When this returns, the record is in the file."""
        self.records[str(record["key"])] = record
        if self._file is not None:
            self._file.line(as_line(record))


def as_line(record: Record) -> str:
    return json.dumps(record, allow_nan=False, separators=(",", ":"))


def merged(paths: Iterable[Path]) -> list[Record]:
    """Return the records of several stores, in an order that does not depend on the division into shards.

    If two stores have a unit, its record comes from the first.
    """
    found: dict[str, Record] = {}
    for path in paths:
        for key, record in read_store(path).items():
            found.setdefault(key, record)
    return sorted(found.values(), key=lambda record: (record["number"], record["key"]))


def write_store(where: str, path: Path, records: Iterable[Record]) -> None:
    write_file(where, path, "".join(as_line(record) + "\n" for record in records))
