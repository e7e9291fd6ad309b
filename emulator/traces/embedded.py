"""Finds traces by name or path, the traces that ship with the package among them."""

from __future__ import annotations

import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from emulator.errors import did_you_mean
from emulator.traces.container import parse_image, parse_metadata, read_image
from emulator.traces.errors import TraceError
from emulator.traces.model import Trace, TraceInfo

SUFFIX = ".fltrace"


def embedded() -> list[TraceInfo]:
    """Return the embedded traces in the order of their names."""
    return [_info(item.read_bytes(), name) for name, item in sorted(_items().items())]


def load(name_or_path: str | Path) -> Trace:
    """Load an embedded trace by name, or the trace of a file.  A plain word is tried as a name first."""
    image, where = _find(name_or_path)
    return parse_image(image, where)


def info(name_or_path: str | Path) -> TraceInfo:
    """Return the metadata of a trace.  The checksum is verified, the records are not decoded."""
    image, where = _find(name_or_path)
    return _info(image, where)


def _info(image: bytes, where: str) -> TraceInfo:
    metadata = parse_metadata(image, where)
    return TraceInfo(metadata.name, len(image), metadata)


def _items() -> dict[str, Traversable]:
    data = resources.files("emulator.traces") / "data"
    return {item.name.removesuffix(SUFFIX): item for item in data.iterdir() if item.name.endswith(SUFFIX)}


def _find(name_or_path: str | Path) -> tuple[bytes, str]:
    """Return the bytes of the trace, and its name in errors."""
    items = _items()
    if isinstance(name_or_path, str) and name_or_path in items:
        return items[name_or_path].read_bytes(), f"embedded trace {name_or_path}"
    path = Path(name_or_path)
    if path.name == str(name_or_path) and not path.suffix and not os.path.lexists(path):
        expected = (
            f"a file, or one of the embedded {', '.join(sorted(items))}{did_you_mean(path.name, items)}"
        )
        raise TraceError(str(path), "no such trace", expected)
    return read_image(path), str(path)
