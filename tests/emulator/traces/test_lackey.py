"""The converter: every line of a recording becomes its records; anything else is refused with its number."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator import traces
from emulator.traces import AccessType, Cut, TraceError, lackey
from emulator.traces.convert import read_recording, without_paths
from emulator.traces.record import USER_END, Records

from .build import records_of

SAMPLE = Path(__file__).with_name("sample.lackey")
WHOLE = Cut()
R, W, X = AccessType.READ, AccessType.WRITE, AccessType.EXECUTE


def converted(text: str | bytes, cut: Cut = WHOLE) -> Records:
    data = text.encode() if isinstance(text, str) else text
    return read_recording(io.BytesIO(data), "input", "name", cut).records


def plainly(text: str, instructions: bool = True) -> Records:
    """Convert as convert() does, a line at a time."""
    accesses: list[tuple[AccessType, int]] = []
    for line in text.splitlines():
        if found := re.fullmatch(r"(I | [LSM]) ([0-9a-f]+),(\d+)", line):
            address, size = int(found[2], 16), int(found[3])
            if found[1] == "I " and not instructions:
                continue
            last = address + size - 1
            pages = [address] if address >> 12 == last >> 12 else [address, last & ~0xFFF]
            kinds = {"I ": [X], " L": [R], " S": [W], " M": [R, W]}[found[1]]
            accesses += [(kind, page) for kind in kinds for page in pages]
    return records_of(*accesses)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_sample(chunk: int, instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lackey, "CHUNK", chunk)
    with SAMPLE.open("rb") as stream:
        trace = read_recording(stream, "sample", "sample", Cut(instructions=instructions))
    assert np.array_equal(trace.records, plainly(SAMPLE.read_text(), instructions))
    assert trace.metadata.valgrind == "3.19.0"
    assert trace.metadata.command == "sort --version"
    assert trace.metadata.program == "sort"
    assert trace.metadata.window.recording == trace.records.size


def test_the_sample_has_every_kind_of_line() -> None:
    lines = SAMPLE.read_text().splitlines()
    for start in ("I ", " L", " S", " M", "=="):
        assert any(line.startswith(start) for line in lines)
    accesses = sum(not line.startswith("==") for line in lines)
    modifies = sum(line.startswith(" M") for line in lines)
    assert plainly("\n".join(lines)).size > accesses + modifies, "no access straddles a page"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("I  04001000,3", [(X, 0x4001000)]),
        (" L 1ffeffe7e0,8", [(R, 0x1FFEFFE7E0)]),
        (" S 0,1", [(W, 0)]),
        (" M 04a17de0,4", [(R, 0x4A17DE0), (W, 0x4A17DE0)]),
        (" L 00001ffc,4", [(R, 0x1FFC)]),
        (" L 00001ffd,4", [(R, 0x1FFD), (R, 0x2000)]),
        (" M 00001fff,2", [(R, 0x1FFF), (R, 0x2000), (W, 0x1FFF), (W, 0x2000)]),
        ("I  00001ffe,11", [(X, 0x1FFE), (X, 0x2000)]),
        (" S 00001000,4096", [(W, 0x1000)]),
        (" S 00001001,4096", [(W, 0x1001), (W, 0x2000)]),
        (" L 7fffffffffff,1", [(R, 0x7FFF_FFFF_FFFF)]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\n==1== \n"])
def test_one_line(line: str, expected: list[tuple[AccessType, int]], end: str) -> None:
    assert np.array_equal(converted(line + end), records_of(*expected))


@pytest.mark.parametrize(
    "line",
    [
        "I 04001000,3", "L 04001000,3", " X 04001000,3", "  L 04001000,3", "I   04001000,3", " L 04001000",
        " L ,8", " L 04001000,", " L 0400100g,8", " L 0400100A,8", " L 04001000,x", " L 04001000,8 ",
        " L 04001000,0", " L 04001000,4097", " L 04001000,4,8", " L -4001000,8", " L 04001000,-8",
        " ", "I", "hello",
        " L 04001000,11111111111111111111", " L 11111111111111111,8",
        "=1= x", "\t", "\x00", "é", "I  04001000,3\r",
    ],
)  # fmt: skip
def test_malformed_line(line: str) -> None:
    for rest in ("\n", "\n L 04001000,8\n", "", "\n L 1,2"):
        with pytest.raises(TraceError) as caught:
            converted(f"==1== Command: x\n L 04001000,8\n{line}{rest}")
        message = str(caught.value)
        assert message.startswith("input, line 3: found ")
        assert "expected lines of lackey --trace-mem=yes" in message
        assert "\n" not in message


def test_line_numbers_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lackey, "CHUNK", 100)
    with pytest.raises(TraceError, match=r"^input, line 1001: found 'oops'"):
        converted(" L 04001000,8\n==1== noise\n" * 500 + "oops\n" + " L 04001000,8\n" * 50)


def test_endless_line_is_refused() -> None:
    with pytest.raises(TraceError, match=r"line 2: found 'x{60}\.\.\.'"):
        converted(" L 04001000,8\n" + "x" * (9 << 20))


@pytest.mark.parametrize(
    "line",
    [
        " L 800000000000,8",
        " L 7fffffffffff,2",
        " L ffffffffff600000,8",
        "I  ffffffffffffffff,8",
        " M fffffffffffff000,4096",
    ],
)
def test_kernel_addresses_are_refused(line: str) -> None:
    with pytest.raises(TraceError, match=r"^input, line 2: address 0x\w+; expected a user-space"):
        converted(f" L 04001000,8\n{line}\n")


LINES = st.lists(
    st.builds(
        lambda kind, address, size: f"{kind} {address:08x},{size}",
        st.sampled_from(["I ", " L", " S", " M"]),
        st.one_of(st.integers(0xFF0, 0x1010), st.integers(0, USER_END - 4096)),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=50,
)


@pytest.mark.slow
@settings(deadline=None)  # machines pause
@given(LINES, st.booleans())
def test_any_lines(lines: list[str], instructions: bool) -> None:
    text = "\n".join([*lines, " L 1000,1"])
    assert np.array_equal(converted(text, Cut(instructions=instructions)), plainly(text, instructions))


@pytest.mark.slow
@settings(deadline=None)
@given(LINES, st.integers(0, 40), st.integers(1, 40))
def test_any_window(lines: list[str], skip: int, limit: int) -> None:
    text = "\n".join(lines) + "\n"
    whole = plainly(text)
    if skip >= whole.size:
        with pytest.raises(TraceError, match=f"all skipped; expected more than {skip}"):
            converted(text, Cut(skip, limit))
        return
    trace = read_recording(io.BytesIO(text.encode()), "input", "name", Cut(skip, limit))
    assert np.array_equal(trace.records, whole[skip : skip + limit])
    assert (trace.metadata.window.skipped, trace.metadata.window.limit) == (skip, limit)


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("==1== Command: x\n", "no accesses after")])
def test_nothing_to_convert(text: str, found: str) -> None:
    with pytest.raises(TraceError, match=f"{found}.*valgrind --tool=lackey --trace-mem=yes --log-fd=9"):
        converted(text)


def test_a_full_window_stops_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lackey, "CHUNK", 140)
    stream = io.BytesIO(b" L 04001000,8\n" * 1000 + b"never read\n")
    trace = read_recording(stream, "input", "name", Cut(5, 20))
    assert trace.records.size == 20
    assert stream.tell() < 1000
    assert trace.metadata.window.recording is None


def test_converted_file_is_loaded_again(tmp_path: Path) -> None:
    output = tmp_path / "sample.fltrace"
    with SAMPLE.open("rb") as stream:
        trace, size = traces.convert(stream, "sample", output, description="what it does")
    loaded = traces.load(output)
    assert size == output.stat().st_size
    assert loaded.name == "sample"
    assert loaded.metadata == trace.metadata
    assert np.array_equal(loaded.records, trace.records)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sort --version", "sort --version"),
        ("/usr/bin/python3 -S /home/me/a.py", "python3 -S a.py"),
        ("cc1 -o /dev/null dir/a.c --root=/srv/x", "cc1 -o /dev/null dir/a.c --root=x"),
        ("awk BEGIN{print 4/2}", "awk BEGIN{print 4/2}"),
    ],
)
def test_paths_of_the_machine_are_left_out(command: str, expected: str) -> None:
    assert without_paths(command) == expected
