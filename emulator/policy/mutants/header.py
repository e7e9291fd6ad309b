"""A mutant's file: lines `Key: value`, an empty line, a description, and the diff, if KVM's code changes.

    Alias: B6
    Source: 3a0f64de479c, 5.16
    Flushlab-Base: linux-7.3
    Expected: use-after-free

    After a yield the iterator is restarted and then advanced, so one SPTE is skipped and survives the zap.

    diff --git ...

Alias: a short name.  Source: the commit that fixed the bug, or the code that the mutant reverses.  Answers:
`point=alternative`, those in which it differs from its base.  Expected: the kinds of violation that catch it,
or `none` if it only costs flushes or memory.  Store-Buffers: `yes` if it is caught only where stores become
visible late, that is, by `flushlab explore --store-buffers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from emulator.errors import BadInput, one_of, shown

PREFIX: Final = "mutant:"
ALIAS: Final = re.compile(r"([A-Z]+)(\d+)([a-z]?)")
_DIFF: Final = "diff --git "
_REQUIRED: Final = ("Alias", "Source", "Flushlab-Base", "Expected")
_OPTIONAL: Final = ("Answers", "Store-Buffers")


@dataclass(frozen=True, slots=True)
class Header:
    """The keys, the description, and whether a diff follows."""

    keys: Mapping[str, str]
    doc: str
    has_diff: bool

    def listed(self, key: str) -> tuple[str, ...]:
        """Return the parts of a value, which commas divide; none for a key that is left out."""
        return tuple(part.strip() for part in self.keys[key].split(",")) if key in self.keys else ()


def parse_header(name: str, text: str) -> Header:
    """Parse the file of the mutant `name` up to its diff; raises BadInput."""
    message, mark, _ = text.partition(f"\n{_DIFF}")
    head, _, doc = message.partition("\n\n")
    keys: dict[str, str] = {}
    for number, line in enumerate(head.splitlines(), 1):
        key, _, value = (part.strip() for part in line.partition(":"))
        where = f"{PREFIX}{name}: line {number}"
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise BadInput(where, f"found {shown(key)}", one_of(key, (*_REQUIRED, *_OPTIONAL)))
        if not value or key in keys:
            raise BadInput(where, f"{key} is {'given twice' if value else 'empty'}", "one value")
        keys[key] = value
    for key in _REQUIRED:
        if key not in keys:
            raise BadInput(f"{PREFIX}{name}", f"has no {key}", ", ".join(_REQUIRED))
    if not ALIAS.fullmatch(keys["Alias"]):
        raise BadInput(f"{PREFIX}{name}: Alias", f"found {shown(keys['Alias'])}", "a short name such as B6")
    if keys.get("Store-Buffers", "yes") != "yes":
        raise BadInput(f"{PREFIX}{name}: Store-Buffers", f"found {shown(keys['Store-Buffers'])}", "yes")
    if not doc.strip():
        raise BadInput(f"{PREFIX}{name}", "has no description", "one below the keys")
    if not mark and "Answers" not in keys:
        raise BadInput(f"{PREFIX}{name}", "changes nothing", "a diff, or Answers")
    return Header(keys, " ".join(doc.split()), bool(mark))
