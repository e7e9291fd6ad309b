"""Documents with one thing wrong, for tests of the errors."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

# Of each type of JSON, and numbers that no 64 bits hold.
_VALUES = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        5,
        1 << 70,
        10**400,
        0.5,
        float("inf"),
        float("nan"),
        "",
        "x",
        "\ud800",
        [],
        [1],
        {},
        {"x": [1]},
    ]
)


def damage(document: Any, data: st.DataObject) -> Any:
    """A copy in which somewhere a key or an entry is missing, or its value is another one."""
    where = document = copy.deepcopy(document)
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        inside = where[key]
        if not isinstance(inside, dict | list) or not inside or data.draw(st.booleans()):
            break
        where = inside
    if data.draw(st.booleans()):
        del where[key]
    else:
        where[key] = data.draw(_VALUES)
    return document
