"""The traces that ship with the package, and finding one by name or path."""

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
    """The embedded traces by name."""
    return [_info(item.read_bytes(), name) for name, item in sorted(_items().items())]


def load(name_or_path: str | Path) -> Trace:
    """The trace of a file, or the embedded one of that name (a plain word is a name first)."""
    image, where = _find(name_or_path)
    return parse_image(image, where)


def info(name_or_path: str | Path) -> TraceInfo:
    """What a trace says about itself; the checksum is verified, the records are not decoded."""
    image, where = _find(name_or_path)
    return _info(image, where)


def _info(image: bytes, where: str) -> TraceInfo:
    metadata = parse_metadata(image, where)
    return TraceInfo(metadata.name, len(image), metadata)


def _items() -> dict[str, Traversable]:
    data = resources.files("emulator.traces") / "data"
    return {item.name.removesuffix(SUFFIX): item for item in data.iterdir() if item.name.endswith(SUFFIX)}


def _find(name_or_path: str | Path) -> tuple[bytes, str]:
    """The bytes of the trace and what to call it in errors."""
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
