"""Damaged files: always a TraceError of one line that names the file, never a crash, never wrong records."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emulator import traces
from emulator.traces import TraceError
from emulator.traces.container import HEADER_SIZE, PREFIX, build_image, parse_image, seal

from .build import loop_trace, metadata_of

WHERE = "some/file.fltrace"


@pytest.fixture(scope="module")
def image() -> bytes:
    records = loop_trace()
    return build_image(records, metadata_of(records))


def refusal(image: bytes) -> str:
    with pytest.raises(TraceError) as caught:
        parse_image(image, WHERE)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    assert "\n" not in message
    assert "expected" in message
    return message


def test_every_flipped_byte_is_found(image: bytes) -> None:
    for position in range(len(image)):
        damaged = bytearray(image)
        damaged[position] ^= 0x40
        refusal(bytes(damaged))


def test_every_truncation_is_found(image: bytes) -> None:
    for length in range(len(image)):
        refusal(image[:length])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda image: b"", "an empty file"),
        (lambda image: b"I  04001000,3\n" * 9, "not a trace (starts with 49 20 20"),
        (lambda image: image[:20], "truncated (20 bytes)"),
        (lambda image: image[:-1], "truncated"),
        (lambda image: image + b"\0", "too long"),
        (lambda image: image[:8] + struct.pack("<H", 9) + image[10:], "version 9; expected version 1"),
        (lambda image: image[:-1] + bytes([image[-1] ^ 1]), "corrupt (checksum"),
    ],
)
def test_what_is_said(image: bytes, damage: Callable[[bytes], bytes], words: str) -> None:
    assert words in refusal(damage(image))


def resealed(image: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file with other metadata and a right checksum, as a careless writer could make it."""
    _, _, _, size, _ = PREFIX.unpack_from(image)
    metadata = json.loads(image[HEADER_SIZE : HEADER_SIZE + size])
    change(metadata)
    return seal(json.dumps(metadata).encode(), image[HEADER_SIZE + size :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda meta: meta["trace"].update(surprise=1), "metadata field trace.surprise"),
        (lambda meta: meta["trace"].pop("name"), "metadata field trace.name"),
        (lambda meta: meta["trace"].update(name="../x"), "metadata field trace.name"),
        (lambda meta: meta["trace"].update(accesses=1 << 60), "metadata field trace.accesses"),
        (lambda meta: meta["trace"].update(reads=51), "differ from accesses"),
        (lambda meta: meta["trace"].update(reads=49, writes=51), "as its metadata says"),
        (lambda meta: meta["trace"].update(distinct_pages=9), "as its metadata says"),
        (lambda meta: meta["trace"].update(accesses=251, reads=51), "inconsistent columns"),
        (lambda meta: meta["columns"].pop(), "columns symbol_address"),
        (lambda meta: meta["columns"][0].update(name="x"), "columns x, symbol_shape"),
        (lambda meta: meta["columns"][0].update(items=10**6), "at most 250"),
        (lambda meta: meta["columns"][0].update(items=2), "holds other than 16 bytes"),
        (lambda meta: meta["columns"][5].update(items=101), "holds other than 808 bytes"),
        (lambda meta: meta["columns"][0].update(stored=0), "a payload of"),
        (lambda meta: meta["columns"][0].update(stored=-1), "metadata field columns.0.stored"),
    ],
)
def test_metadata_that_does_not_fit(
    image: bytes, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    assert words in refusal(resealed(image, change))


def test_metadata_that_is_not_json(image: bytes) -> None:
    assert "metadata field JSON" in refusal(seal(b"{", b""))


def test_payload_that_is_not_xz(image: bytes) -> None:
    _, _, _, size, payload = PREFIX.unpack_from(image)
    assert "column symbol_address" in refusal(seal(image[HEADER_SIZE : HEADER_SIZE + size], bytes(payload)))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file or directory; expected a trace written by"):
        traces.load(tmp_path / "absent.fltrace")
    with pytest.raises(TraceError, match=r"no-such-name: no such trace; expected a file, or one of .*cc1"):
        traces.load("no-such-name")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="Is a directory; expected a trace written by"):
        traces.load(tmp_path)
