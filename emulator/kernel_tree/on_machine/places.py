"""Find the kernel's functions and lines for addresses in a tree's object."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Final

from emulator.kernel_tree.build import KVM_MAIN, MMU, Built

_SECONDS: Final = 60
# The parts of the kernel's places by which functions of the tree are told from the shim's.
_TREES: Final = (f"{MMU}/", KVM_MAIN)


def kernel_places(
    built: Built, returns: Sequence[int], *, exact: int = 0, innermost: bool = False
) -> list[tuple[str, str]]:
    """Return the kernel's functions with their lines, innermost first; inlined functions are among them.

    returns: return addresses, as offsets in the object.  The first `exact` of them are addresses of the
    instructions themselves.  innermost: return nothing for a place in a function that is not the tree's,
    inlined or not.  Needs addr2line, which comes with the linker; without it the list is empty.
    """
    wanted = [f"{offset - (at >= exact):#x}" for at, offset in enumerate(returns) if 0 < offset < 1 << 32]
    if not wanted:
        return []
    command = ["addr2line", "-f", "-i", "-e", str(built.path), *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines()
    every = list(zip(lines[::2], lines[1::2], strict=False))
    if innermost and not _is_tree(every[0][1]):
        return []
    found = [(name, short_place(place.split(" ")[0])) for name, place in every if _is_tree(place)]
    return list(dict.fromkeys(found))


def _is_tree(place: str) -> bool:
    return any(part in place for part in _TREES)


def short_place(place: str) -> str:
    """Return a place without the directories above the tree."""
    at = max(place.find("arch/x86/kvm/"), place.find("virt/kvm/"))
    return place[at:] if at >= 0 else place
