"""The spelling of a policy on command lines and in files: a name, and answers that differ from it."""

from __future__ import annotations

from emulator.errors import shown
from emulator.policy.policy import NAMED_BY, PolicyError, check_answer
from emulator.policy.presets import DEFAULT, preset

_FILE = ".py"


def parse_setting(text: str, where: str = NAMED_BY) -> tuple[str, str]:
    """Parse `point=alternative`, without checking that the point exists; raises PolicyError."""
    point, _, alternative = (part.strip() for part in text.partition("="))
    if not point or not alternative:
        raise PolicyError(where, f"found {shown(text)}", "point=alternative, as in migration=none")
    return point, alternative


def parse_policy(text: str, where: str = "") -> tuple[str, dict[str, str]]:
    """Return the preset, mutant or file, and the answers that replace its own.

    Spelled `NAME+point=alternative+...`, or for the default policy `point=alternative,point=alternative`.  A
    file's path ends with .py, and may contain other characters of this syntax.  Raises PolicyError.
    """
    if text.endswith(_FILE):
        return text, {}
    if _FILE + "+" in text:
        base, settings = text.rsplit(_FILE + "+", 1)
        base += _FILE
    elif "+" in text:
        base, settings = text.split("+", 1)
    elif "=" in text:
        base, settings = DEFAULT, text
    else:
        return text, {}
    where = where or f"{NAMED_BY} {text}"
    return base, dict(parse_setting(part, where) for part in settings.replace("+", ",").split(","))


def check_policy(text: str, where: str) -> None:
    """Raise PolicyError unless there is such a policy; a file is not read."""
    base, answers = parse_policy(text, where)
    if not base.endswith(_FILE):
        preset(base, where)
    for point, alternative in answers.items():
        check_answer(point, alternative, where)
