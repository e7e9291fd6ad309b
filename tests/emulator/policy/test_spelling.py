"""Names of policies, with answers of one's own."""

from __future__ import annotations

import pytest

from emulator.cli.main import main
from emulator.policy import DEFAULT, PolicyError, parse_policy, parse_setting


@pytest.mark.parametrize(
    ("text", "base", "settings"),
    [
        ("linux-6.12", "linux-6.12", {}),
        ("mutant:iterator-skips-spte", "mutant:iterator-skips-spte", {}),
        ("linux-6.12+migration=none", "linux-6.12", {"migration": "none"}),
        (
            "linux-6.12+migration=none+root_load=none",
            "linux-6.12",
            {"migration": "none", "root_load": "none"},
        ),
        ("migration=none", DEFAULT, {"migration": "none"}),
        ("migration=none,root_load = none", DEFAULT, {"migration": "none", "root_load": "none"}),
        ("a+b=c/mine.py", "a+b=c/mine.py", {}),
        ("c++/mine.py+migration=none", "c++/mine.py", {"migration": "none"}),
    ],
)
def test_what_is_spelled(text: str, base: str, settings: dict[str, str]) -> None:
    assert parse_policy(text) == (base, settings, ())


@pytest.mark.parametrize(
    ("text", "base", "patches", "settings"),
    [
        ("idea.patch", "", ("idea.patch",), {}),
        ("linux-5.18+idea.diff", "linux-5.18", ("idea.diff",), {}),
        ("mutant:B6+one.patch+two.patch", "mutant:B6", ("one.patch", "two.patch"), {}),
        ("idea.patch,migration=none", "", ("idea.patch",), {"migration": "none"}),
        ("migration=none+idea.patch+zap=x", "", ("idea.patch",), {"migration": "none", "zap": "x"}),
        ("linux-6.12+a+b=c,d/idea.patch", "linux-6.12", ("a+b=c,d/idea.patch",), {}),
        ("ideas/+series+more/series", "", ("ideas/", "series", "more/series"), {}),
        ("mine.py+idea.patch", "mine.py", ("idea.patch",), {}),
    ],
)
def test_what_is_spelled_with_patches(
    text: str, base: str, patches: tuple[str, ...], settings: dict[str, str]
) -> None:
    assert parse_policy(text) == (base, settings, patches)


@pytest.mark.parametrize(
    "text",
    [
        "linux-7.3+",
        "linux-7.3+migration",
        "linux-7.3+migration:none",
        "linux-7.3+migration=",
        "linux-7.3+=none",
        "linux-7.3+migration=none,root_load",
        "migration=none,",
        "mine.py+",
        "idea.patch+",
        "idea.patch,nothing",
        "linux-7.3+idea.patch+migration=none,",
    ],
)
def test_no_part_is_passed_over(text: str) -> None:
    with pytest.raises(PolicyError, match=r"expected (a patch, or )?point=alternative"):
        parse_policy(text)


def test_a_setting_names_its_option() -> None:
    with pytest.raises(PolicyError, match=r"^--set: found 'migration'; expected"):
        parse_setting("migration", "--set")


@pytest.mark.parametrize("command", ["explore", "litmus"])
def test_nothing_is_judged_under_a_name_that_is_not_understood(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "return-zap", "--policy", "linux-7.3+migration:none"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "flushlab: --policy linux-7.3+migration:none: found 'migration:none'; "
        "expected point=alternative, as in migration=none\n"
    )
