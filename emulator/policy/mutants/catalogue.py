"""The mutants, read from the files of this directory.

A mutant is a base preset with other answers or with a patch of KVM's code, or both.  The patch reverses a
fix of the kernel's, at its place, or another part of the code.  Mutants that only cost flushes or memory must
not trip the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Final

from emulator.errors import closest, shown
from emulator.policy.mutants.header import ALIAS, PREFIX, parse_header
from emulator.policy.patch import KvmPatch
from emulator.policy.policy import NAMED_BY, Policy, PolicyError, parse_setting

_SUFFIX: Final = ".patch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A mutant; emulator.policy.mutants.header describes what its file says.  file: the file's text."""

    name: str
    id: str
    doc: str
    source: str
    expected: tuple[str, ...]
    base: str
    settings: Mapping[str, str]
    store_buffers: bool
    patch: KvmPatch | None
    file: str

    @property
    def cost_only(self) -> bool:
        return not self.expected

    def policy(self, base: Policy) -> Policy:
        """Return the mutant's policy, on top of `base`, the preset that `self.base` names."""
        name = PREFIX + self.name
        policy = base.with_settings(self.settings, name)
        return policy if self.patch is None else policy.patched(self.patch, name, name)


def read_mutant(name: str, text: str) -> Mutant:
    """Return the mutant of that name from its file; raises BadInput."""
    header = parse_header(name, text)
    expected = header.listed("Expected")
    full = PREFIX + name
    return Mutant(
        name=name,
        id=header.keys["Alias"],
        doc=header.doc,
        source=header.keys["Source"],
        expected=() if expected == ("none",) else expected,
        base=header.keys["Flushlab-Base"],
        settings=dict(parse_setting(part, f"{full}: Answers") for part in header.listed("Answers")),
        store_buffers="Store-Buffers" in header.keys,
        # One object, so that its code is compiled once in a process.
        patch=KvmPatch(full, ((full, text.encode()),), (name,)) if header.has_diff else None,
        file=text,
    )


def _read() -> Iterator[Mutant]:
    for file in resources.files(__package__).iterdir():
        if file.name.endswith(_SUFFIX):
            yield read_mutant(file.name.removesuffix(_SUFFIX), file.read_text("utf-8"))


def _order(mutant: Mutant) -> tuple[str, int, str]:
    """Return the key by which mutants are sorted: by their ids, with B2 before B10."""
    letters, number, rest = ALIAS.findall(mutant.id)[0]
    return letters, int(number), rest


MUTANTS: Final[dict[str, Mutant]] = {mutant.name: mutant for mutant in sorted(_read(), key=_order)}
# An id is an alias of the name wherever a policy is named (`mutant:B6`): older recordings, litmus tests and
# notes have the ids.  Output has the names.
NAMES: Final[dict[str, str]] = {mutant.id: mutant.name for mutant in MUTANTS.values()}


def canonical(policy: str) -> str:
    """Return the spelling of a policy with a mutant's id, if it has one, replaced by the name."""
    if not policy.startswith(PREFIX):
        return policy
    name, plus, settings = policy.removeprefix(PREFIX).partition("+")
    return PREFIX + NAMES.get(name, name) + plus + settings


def find_mutant(name: str, where: str = NAMED_BY) -> Mutant:
    """Return the mutant of that name or id, which may have the prefix or not."""
    short = name.removeprefix(PREFIX)
    short = NAMES.get(short, short)
    try:
        return MUTANTS[short]
    except KeyError:
        close = closest(short, MUTANTS)
        guess = f" (did you mean {PREFIX}{close}?)" if close else ""
        # There are more of them than one line holds.
        expected = f"one of those that `flushlab list mutants` prints{guess}"
        raise PolicyError(where, f"unknown mutant {shown(name)}", expected) from None
