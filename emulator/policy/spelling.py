"""The spelling of a policy on command lines and in files: a name, patches, and answers that differ."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final, NamedTuple

from emulator.errors import shown
from emulator.policy.mutants import PREFIX
from emulator.policy.patch import is_patch
from emulator.policy.points import BY_NAME
from emulator.policy.policy import NAMED_BY, PolicyError, check_answer, parse_setting
from emulator.policy.presets import DEFAULT, PRESETS, preset

_FILE: Final = ".py"


class Spelled(NamedTuple):
    """base: a preset, mutant or file; "" if none is named.  patches: paths, in their order."""

    base: str
    answers: dict[str, str]
    patches: tuple[str, ...] = ()


def parse_policy(text: str, where: str = "") -> Spelled:
    """Return the parts of a policy's spelling.

    Spelled `NAME+PATCH+...+point=alternative+...`, or for the default policy without NAME; commas may stand
    for plus signs between answers.  A file's path ends with .py, a patch's with .patch, .diff, / or /series,
    and may contain other characters of this syntax.  Raises PolicyError.
    """
    where = where or f"{NAMED_BY} {text}"
    base, rest = _base(text)
    if not rest:
        return Spelled(base or DEFAULT, {})
    if not _has_patch(rest):
        return Spelled(base or DEFAULT, dict(parse_setting(part, where) for part in re.split("[+,]", rest)))
    patches: list[str] = []
    answers: dict[str, str] = {}
    path = ""
    for part in re.split("([+,])", rest):
        if part in ("+", ","):
            path += part if path else ""
        elif not path and part.partition("=")[0].strip() in BY_NAME:
            point, answers[point] = parse_setting(part, where)
        else:
            path += part
            if is_patch(path):
                patches.append(path)
                path = ""
    if path or rest.endswith(("+", ",")):
        raise PolicyError(where, f"found {shown(path)}", "a patch, or point=alternative as in migration=none")
    return Spelled(base, answers, tuple(patches))


def digests(spelled: str) -> list[str]:
    """Return the digests of the files that a policy's spelling names."""
    parsed = parse_policy(spelled)
    names = [*([parsed.base] if parsed.base.endswith(".py") else []), *parsed.patches]
    files = [
        file
        for name in names
        for file in (sorted(Path(name).rglob("*")) if Path(name).is_dir() else [Path(name)])
        if file.is_file()
    ]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _base(text: str) -> tuple[str, str]:
    """Return the base that the text begins with, "" if none, and the rest."""
    if text.endswith(_FILE):
        return text, ""
    if _FILE + "+" in text:
        base, rest = text.rsplit(_FILE + "+", 1)
        return base + _FILE, rest or "+"
    first, plus, rest = text.partition("+")
    if _has_patch(text):
        named = bool(plus) and (first in PRESETS or first.startswith(PREFIX))
        return (first, rest) if named else ("", text)
    if plus:
        return first, rest or "+"
    return ("", text) if "=" in text else (text, "")


def _has_patch(text: str) -> bool:
    """Return whether a part of the text ends as the path of a patch does."""
    return any(is_patch(part) for part in re.split("[+,]", text))


def check_policy(text: str, where: str) -> None:
    """Raise PolicyError unless there is such a policy; a file is not read."""
    base, answers, patches = parse_policy(text, where)
    if not base.endswith(_FILE) and (base or not patches):
        preset(base, where)
    for point, alternative in answers.items():
        check_answer(point, alternative, where)
