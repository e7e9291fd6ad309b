"""Declarations are found in headers without preprocessing them."""

from __future__ import annotations

import pytest

from emulator.kernel_tree.headers import Kind, holds, items

HEADER = """\
#ifndef _MADE_UP_H
#define _MADE_UP_H
#include <linux/other.h>
typedef unsigned long pond_t; /* a comment; with a semicolon */
typedef int (*visitor_t)(struct pond *p, int how);
#define POND_DEPTH(p) \\
\t((p)->depth + 1)
enum fish { CARP, PIKE = 1 << 3, TENCH };
struct pond {
\tunsigned long depth;
#ifdef CONFIG_64BIT
\tint wide, *deep;
#else
\tint narrow;
#endif
\tunion {
\t\tint carps;
\t\tstruct { int pikes; } inner;
\t};
\tDECLARE_BITMAP(islands, 64);
\tvoid (*drain)(struct pond *p);
\tint flags : 3;
};
#if defined(CONFIG_SMP) && !IS_ENABLED(CONFIG_DESERT)
static inline int pond_depth(struct pond *p)
{
\treturn POND_DEPTH(p);
}
#else
static inline int pond_depth(struct pond *p) { return 0; }
#endif
extern struct pond the_pond;
int pond_fill(struct pond *p, int litres);
#endif
"""


def test_items_of_a_header() -> None:
    found = {(item.kind, item.names) for item in items(HEADER)}
    assert found >= {
        (Kind.TYPEDEF, ("pond_t",)),
        (Kind.TYPEDEF, ("visitor_t",)),
        (Kind.MACRO, ("POND_DEPTH",)),
        (Kind.ENUM, ("fish", "CARP", "PIKE", "TENCH")),
        (Kind.STRUCT, ("pond",)),
        (Kind.FUNCTION, ("pond_depth",)),
        (Kind.VARIABLE, ("the_pond",)),
        (Kind.FUNCTION, ("pond_fill",)),
    }


def test_the_branch_that_is_compiled_is_taken() -> None:
    bodies = [item.text for item in items(HEADER) if item.names == ("pond_depth",)]
    assert len(bodies) == 1
    assert "POND_DEPTH" in bodies[0]


def test_members_of_a_struct() -> None:
    pond = next(item for item in items(HEADER) if item.kind is Kind.STRUCT)
    assert [names for _, names in pond.members] == [
        ("depth",),
        ("wide", "deep"),
        ("carps", "inner"),
        ("islands",),
        ("drain",),
        ("flags",),
    ]


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("defined(CONFIG_SMP)", True),
        ("!defined(CONFIG_SMP)", False),
        ("IS_ENABLED(CONFIG_KVM) && defined CONFIG_X86_64", True),
        ("IS_ENABLED(CONFIG_DESERT) || CONFIG_PGTABLE_LEVELS > 4", True),
        ("KVM_MAX_NR_ADDRESS_SPACES > 1", True),
        ("SIZE(3) == 4", False),
        ("__import__('os')", False),
        ("0", False),
        ("1", True),
    ],
)
def test_conditions(condition: str, expected: bool) -> None:
    assert holds(condition) is expected
