"""Keep the GIL during the calls that their descriptions exempt from releasing it (native/description.py).

cffi releases it around every call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_CALL = re.compile(
    r"  Py_BEGIN_ALLOW_THREADS\n"
    r"  _cffi_restore_errno\(\);\n"
    r"(?P<call>  \{ (?:result = )?(?P<name>\w+)\([^\n]*\); \}\n)"
    r"  _cffi_save_errno\(\);\n"
    r"  Py_END_ALLOW_THREADS\n"
)


def keep_gil(wrappers: str, names: Iterable[str]) -> str:
    """Return cffi's generated C with the GIL kept around calls of these functions, all of which it calls."""
    brief = set(names)
    kept: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in brief:
            return match[0]
        kept.add(match["name"])
        return match["call"]

    changed = _CALL.sub(replace, wrappers)
    if kept != brief:
        raise ValueError(f"brief functions that cffi does not call as expected: {sorted(brief - kept)}")
    return changed
