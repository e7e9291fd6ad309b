"""Starting points for a user's own policy and litmus test: files that run as they are, and teach.

The texts are templates in this directory; the lists of decision points in them come from the code.
"""

from __future__ import annotations

import inspect
import keyword
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from emulator.errors import BadInput, shown
from emulator.kvm.notifications import Notifications
from emulator.output import write_new_file
from emulator.policy import POINTS, DecisionPoint, Policy, preset
from emulator.policy.acting import MOMENTS

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LETTERS: Final = "a letter, then at most 63 letters, digits, - and _"
_WIDTH: Final = 100
# The point that the policy's template decides.
_DECIDED: Final = "migration"


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written, and the commands to try on it, each with its purpose."""

    path: Path
    commands: tuple[tuple[str, str], ...]


def write_policy(name: str, base: str) -> Written:
    """Write NAME.py in the current directory; raises BadInput."""
    preset(base, "--base")
    path = _path(name, ".py")
    decided = next(point for point in POINTS if point.name == _DECIDED)
    others = "\n".join(line for point in POINTS if point is not decided for line in _outline(point))
    text = _filled("policy.txt", {
        "name": path.stem,
        "cls": _class_name(path.stem),
        "base": base,
        "answers": "\n".join(_answers(decided)),
        "others": others,
        "moments": "\n".join(line for moment in MOMENTS for line in _hearing(moment)),
    })  # fmt: skip
    write_new_file("NAME", path, text)
    return Written(path, (
        (f"flushlab explore return-zap --policy {path}", "prove or refute it on a small race"),
        (
            f"flushlab litmus return-zap bounce-zap --policy linux-7.3 --policy {path} --iterations 50",
            "the same on real threads, beside Linux's",
        ),
        (f"flushlab run migration-storm --policy {path} --duration 5s", "what it costs"),
        ("flushlab guide policies", "all that a policy can decide"),
    ))  # fmt: skip


def write_litmus(name: str) -> Written:
    """Write NAME.toml in the current directory; raises BadInput."""
    path = _path(name, ".toml")
    write_new_file("NAME", path, _filled("litmus.txt", {"name": path.stem}))
    return Written(path, (
        (f"flushlab explore {path} --trace", "see one execution, step by step"),
        (f"flushlab explore {path} --policy linux-7.3", "every interleaving"),
        (f"flushlab litmus {path} --iterations 20", "all presets on real threads"),
        ("flushlab list litmus --ops", "all keys and operations"),
        ("flushlab guide litmus", "how to read and write one"),
    ))  # fmt: skip


def _path(name: str, suffix: str) -> Path:
    stem = name.removesuffix(suffix)
    if not _NAME.fullmatch(stem):
        raise BadInput("NAME", f"found {shown(name)}", f"{_LETTERS}; the file gets the name NAME{suffix}")
    return Path(stem + suffix)


def _filled(template: str, values: dict[str, str]) -> str:
    return Template(resources.files(__name__).joinpath(template).read_text("utf-8")).substitute(values)


def _class_name(stem: str) -> str:
    name = "".join(part[:1].upper() + part[1:] for part in re.split("[-_]", stem))
    # A class called Policy would derive from itself.
    return f"{name}Policy" if keyword.iskeyword(name) or name == "Policy" else name


def _answers(point: DecisionPoint) -> Iterator[str]:
    """Yield comments with each answer of a point and what it does."""
    for alternative in point.alternatives:
        wrong = " (known to be wrong)" if alternative.mutant else ""
        lines = textwrap.wrap(alternative.doc, _WIDTH - 14)
        yield f'        #   "{alternative.name}"{wrong}'
        yield from (f"        #       {line}" for line in lines)


def _hearing(moment: str) -> Iterator[str]:
    """Yield the method that hears a moment as a comment, with the first sentence about it."""
    function = getattr(Notifications, moment)
    sentence = " ".join((inspect.getdoc(function) or "").split()).partition(". ")[0].rstrip(".") + "."
    yield f"    # def {moment}({', '.join(MOMENTS[moment])}):"
    yield from (f"    #     # {line}" for line in textwrap.wrap(sentence, _WIDTH - 12))


def _outline(point: DecisionPoint) -> Iterator[str]:
    """Yield the method of a point as a comment, with its answers."""
    parameters = ", ".join(inspect.signature(getattr(Policy, point.name)).parameters)
    yield f"    # def {point.name}({parameters}):"
    yield from (f"    #     # {line}" for line in textwrap.wrap(point.doc, _WIDTH - 12))
    answers = ", ".join(f'"{name}"' for name in point.names())
    wrapped = textwrap.wrap(f"One of {answers}.", _WIDTH - 12, break_on_hyphens=False)
    yield from (f"    #     # {line}" for line in wrapped)
