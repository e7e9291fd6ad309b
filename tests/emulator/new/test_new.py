"""`flushlab new`: its files run as they are, and after their comments' advice; so do the printed commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.litmus.loader import load_test
from emulator.new import write_policy
from emulator.policy import POINTS, PRESETS, load_user_policy, preset
from emulator.policy.acting import MOMENTS

PRINTED = re.compile(r"^    flushlab (.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """Run `flushlab new`; return the arguments of the commands that it prints."""
    assert main(["new", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [shlex.split(line) for line in PRINTED.findall(out)]


@pytest.mark.slow
@pytest.mark.parametrize("base", PRESETS)
def test_a_policy_answers_as_its_base(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    new(capsys, "policy", "mine", "--base", base)
    policy = load_user_policy(Path("mine.py"))
    assert list(policy.overrides()) == ["migration"]
    assert policy.answers() == preset(base).answers()
    assert all(len(line) <= 110 for line in Path("mine.py").read_text().splitlines())


def test_a_policy_says_what_each_point_can_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Each outline is a method that can be uncommented."""
    new(capsys, "policy", "mine")
    text = Path("mine.py").read_text()
    shown, _, outlines = text.partition("    # The other points.")
    outlines, _, hearing = outlines.partition("    # Moments.")
    outlines, hearing = (part.split("    #\n", 1)[1] for part in (outlines, hearing))
    methods = re.sub(r"^    # ", "    ", outlines, flags=re.MULTILINE)
    for point in POINTS:
        for name in point.names():
            assert f'"{name}"' in (shown if point.name == "migration" else methods)
    methods = re.sub(r"^(    def .*)$", r'\1\n        return "no such answer"', methods, flags=re.MULTILINE)
    moments = re.sub(r"^    # (def .*)$", r"    \1\n        pass", hearing, flags=re.MULTILINE)
    Path("mine.py").write_text(shown + methods + moments)
    policy = load_user_policy(Path("mine.py"))
    assert set(policy.overrides()) == {*(point.name for point in POINTS), *MOMENTS}


@pytest.mark.slow
def test_its_example_is_refuted_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    first = new(capsys, "policy", "mine")[0]
    assert first[0] == "explore"
    text = Path("mine.py").read_text()
    for line in ("if len(vcpu.kvm.vcpus) == 1:", '    return "none"'):
        assert f"        #     {line}\n" in text
        text = text.replace(f"        #     {line}\n", f"        {line}\n")
    Path("mine.py").write_text(text)
    assert main(first) == 1


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["policy", "litmus"])
def test_the_printed_commands_end_well(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = new(capsys, kind, "a-first_one")
    assert len(commands) >= 4
    for command in commands:
        assert main(command) == 0, (command, capsys.readouterr())


def test_a_test_is_proved_and_its_need_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    commands = new(capsys, "litmus", "mine")
    assert load_test("mine.toml").name == "mine"
    for command in commands[:2]:
        assert main(command) == 0
    assert "precondition (averted): met" in capsys.readouterr().out
    assert main(["explore", "mine.toml", "--policy", "migration=none"]) == 1


def test_the_optional_parts_of_a_test_can_be_uncommented(capsys: pytest.CaptureFixture[str]) -> None:
    new(capsys, "litmus", "mine")
    text = Path("mine.toml").read_text()
    first, last = text.index("# [machine]"), text.index("\n# A vCPU's thread")
    text = text[:first] + re.sub("^# ?", "", text[first:last], flags=re.MULTILINE) + text[last:]
    Path("mine.toml").write_text(text)
    assert tomllib.loads(text)["vm"][0]["vcpus"] == 2
    assert len(load_test("mine.toml").vm) == 1


@pytest.mark.parametrize("name", ["policy", "none", "Policy", "x-1", "class", "mine.py"])
def test_names(name: str) -> None:
    path = Path(name.removesuffix(".py") + ".py")
    assert write_policy(name, "linux-7.3").path == path
    load_user_policy(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["policy", "there"], "NAME there.py: it exists already; expected a name of no file"),
        (["policy", "directory"], "NAME directory.py: it exists already; expected a name of no file"),
        (["policy", "dangling"], "NAME dangling.py: it exists already; expected a name of no file"),
        (["litmus", "there"], "NAME there.toml: it exists already; expected a name of no file"),
        (
            ["policy", "../up"],
            "NAME: found '../up'; expected a letter, then at most 63 letters, digits, - and _",
        ),
        (["litmus", "mine.py"], "NAME: found 'mine.py'; expected a letter"),
        (["policy", "1st"], "NAME: found '1st'; expected a letter"),
        (["policy", "mine", "--base", "linux-7"], "--base: unknown policy 'linux-7'; expected one of"),
        (["policy", "n" * 65], "NAME: found 'nnn"),
    ],
)
def test_what_is_refused_is_one_line_and_writes_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("there.py", "there.toml"):
        Path(file).write_text("mine")
    Path("directory.py").mkdir()
    Path("dangling.py").symlink_to("nowhere")
    before = sorted(Path().iterdir())
    assert main(["new", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"flushlab: {said}")
    assert err.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    assert Path("there.py").read_text() == Path("there.toml").read_text() == "mine"


def test_an_unwritable_directory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["new", "litmus", "mine"]) == 2
    assert capsys.readouterr().err == (
        "flushlab: NAME mine.toml: No such file or directory; expected a file that can be written\n"
    )
