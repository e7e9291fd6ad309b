"""Cuts functions out of a source file that is too large to be compiled as a whole."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from emulator.drift.c_source import definitions
from emulator.errors import BadInput

# Functions of virt/kvm/kvm_main.c, and whether every version has them: requests to all vCPUs of a VM, and the
# remote TLB flush.  The static functions that they call are cut out, too, also those that a patch adds.
REQUESTS: Final = {
    "kvm_make_all_cpus_request": True,
    "kvm_make_all_cpus_request_except": False,
    "kvm_flush_remote_tlbs": True,
    "kvm_flush_remote_tlbs_range": False,
}
_WORD: Final = re.compile(r"\b[a-z_]\w*\b")


@dataclass(frozen=True, slots=True)
class Function:
    """The text of a function, and its first line in the file."""

    name: str
    line: int
    text: str


def cut_functions(source: bytes) -> list[Function]:
    """Return the functions of kvm_main.c that a tree's object has, in their order in the file.

    Raises BadInput if one that every version has is missing.
    """
    text = source.decode("utf-8", "replace")
    lines = text.splitlines()
    every = {
        one.name: Function(one.name, one.first, "\n".join(lines[one.first - 1 : one.last]))
        for one in definitions(text)
        if not lines[one.first - 1].startswith("#")
    }
    missing = [name for name, always in REQUESTS.items() if always and name not in every]
    if missing:
        raise BadInput("virt/kvm/kvm_main.c", f"no {missing[0]}()", f"a file with {', '.join(REQUESTS)}")
    wanted = [name for name in REQUESTS if name in every]
    for name in wanted:
        for word in _WORD.findall(every[name].text):
            called = every.get(word)
            if called is not None and called.text.startswith("static ") and word not in wanted:
                wanted.append(word)
    return sorted((every[name] for name in wanted), key=lambda one: one.line)
