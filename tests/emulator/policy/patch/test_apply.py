"""A diff of any two texts turns the one into the other, or says where it does not fit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.policy.patch.apply import applied
from emulator.policy.patch.code import SHIPPED
from emulator.policy.patch.diff import PatchError, full_path, parse_diff
from tests.emulator.policy.patch.edits import diff_of

FILES = sorted(path for path, text in SHIPPED.sources.items() if text.count("\n") > 20)
LINES = st.lists(
    st.sampled_from(["", "    return", "x = 1", "-- ", "+++ b/x", "--- a/x", "@@ -1 +1 @@", "\\", "é\x0c"])
)


def after(name: str, patch: str, path: str, text: str | None) -> str | None:
    diff = parse_diff(name, patch.encode())
    assert [one.path for one in diff.files] == [path]
    return applied(name, diff.files[0], text)


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, str, str]:
    """A shipped file, its text, and the text after some edits."""
    path = draw(st.sampled_from(FILES))
    lines = SHIPPED.sources[path].split("\n")
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(lines)))
        lines[at : at + draw(st.integers(0, 4))] = draw(LINES)
    text = "\n".join(lines)
    return path, SHIPPED.sources[path], text if draw(st.booleans()) else text.rstrip("\n")


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(edits(), st.sampled_from([1, 3, 10]))
def test_a_diff_makes_the_edited_file(edit: tuple[str, str, str], context: int) -> None:
    path, before, wanted = edit
    if before == wanted or not wanted:
        return
    assert after("own", diff_of(path, before, wanted, context), path, before) == wanted


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(edits(), st.data())
def test_a_hunk_is_found_at_another_line(edit: tuple[str, str, str], data: st.DataObject) -> None:
    path, before, wanted = edit
    if before == wanted or not wanted:
        return
    above = "".join(f"# {n}\n" for n in range(data.draw(st.integers(1, 60))))
    assert after("own", diff_of(path, before, wanted, 10), path, above + before) == above + wanted


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@given(edits(), st.data())
def test_context_that_differs_is_refused(edit: tuple[str, str, str], data: st.DataObject) -> None:
    """There is no fuzz: each old line of a hunk must be in the file."""
    path, before, wanted = edit
    if before == wanted or not wanted:
        return
    patch = diff_of(path, before, wanted)
    diff = parse_diff("own", patch.encode()).files[0]
    change = data.draw(st.sampled_from(diff.changes))
    lines = before.split("\n")
    at = change.start - 1 + data.draw(st.integers(0, len(change.old) - 1))
    lines[at] += "# another end"
    with pytest.raises(PatchError, match=rf"^own: hunk \d+ of {full_path(path)}: "):
        applied("own", diff, "\n".join(lines))


@pytest.mark.parametrize("path", FILES[:6])
@pytest.mark.parametrize("options", [[], ["--histogram"], ["-U1"], ["--function-context"], ["--no-prefix"]])
def test_diffs_of_git(path: str, options: list[str], tmp_path: Path) -> None:
    before = SHIPPED.sources[path]
    lines = before.split("\n")
    lines[12:14] = ["# one", "# two", "# three"]
    lines[-5:-4] = []
    wanted = "\n".join(lines)
    for side, text in (("old", before), ("new", wanted)):
        file = tmp_path / side / "emulator/kvm" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
    done = subprocess.run(
        ["git", "diff", "--no-index", *options, "old", "new"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    patch = done.stdout.replace("a/old/", "a/").replace("b/new/", "b/")
    assert after("own", patch, path, before) == wanted
