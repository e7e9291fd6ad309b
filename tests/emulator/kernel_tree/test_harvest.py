"""Declarations are harvested as the compiler asks for them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from emulator.kernel_tree.build import DoesNotBuild, build
from emulator.kernel_tree.compiler import Diagnostic, find_compiler
from emulator.kernel_tree.harvest import Harvest, Incomplete
from emulator.kernel_tree.headers import Headers

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

HEADERS = {
    "include/linux/kvm_pond.h": """\
#define POND_SHIFT 3
#define POND_SIZE (1 << POND_SHIFT)
enum fish { CARP, PIKE };
struct water { int litres; int unused_by_the_source; struct nowhere *also_unused; };
struct pond {
\tstruct unknown_to_all missing;
\tstruct water water;
\tenum fish fish;
\tint depth;
};
static inline int pond_litres(struct pond *p) { return p->water.litres * POND_SIZE; }
""",
    "arch/x86/include/asm/kvm_shore.h": "typedef unsigned long shore_t;\nint shore_length(shore_t s);\n",
}
SOURCE = """\
int visit(struct pond *p, shore_t s)
{
\tp->fish = PIKE;
\treturn pond_litres(p) + p->depth + shore_length(s);
}
"""


@pytest.fixture
def top(tmp_path: Path) -> Path:
    for name, text in HEADERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def harvested(top: Path, source: str) -> Harvest:
    compiler, unit = find_compiler(), top / "unit.c"
    harvest = Harvest(Headers(top, frozenset()))

    def check(text: str) -> list[Diagnostic]:
        unit.write_text(text + source)
        return compiler.compile(unit, None, [])

    harvest.until_complete(check)
    return harvest


def test_only_declarations_that_the_source_needs_are_taken(top: Path) -> None:
    text = harvested(top, SOURCE).text()
    for name in ("POND_SIZE", "enum fish", "litres", "depth", "pond_litres", "shore_t", "shore_length"):
        assert re.search(rf"\b{name}\b", text), name
    # Members that the source does not name would pull in declarations that nobody has.
    for name in ("unused_by_the_source", "also_unused", "unknown_to_all"):
        assert name not in text
    assert "/* include/linux/kvm_pond.h:" in text


def test_a_struct_is_never_empty(top: Path) -> None:
    """Return to a trap: two members of empty structs would have one address."""
    text = harvested(top, "struct both { struct water a, b; };\n").text()
    assert "shim_not_empty" in text


def test_a_name_that_no_header_has_is_told(top: Path) -> None:
    with pytest.raises(Incomplete) as raised:
        harvested(top, "int visit(struct pond *p) { return frobnicate(p->depth); }\n")
    assert raised.value.missing == ["frobnicate"]
    assert "frobnicate" in raised.value.said[0].message


def test_a_tree_that_does_not_compile(top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mmu = top / "arch/x86/kvm/mmu"
    mmu.mkdir(parents=True)
    (top / "Makefile").write_text("VERSION = 6\nPATCHLEVEL = 12\nSUBLEVEL = 1\n")
    for name in ("tdp_iter.c", "spte.c", "mmu_internal.h", "spte.h", "tdp_iter.h", "tdp_mmu.h", "mmutrace.h"):
        (mmu / name).write_text("")
    (mmu / "tdp_mmu.c").write_text("int zap(void)\n{\n\treturn frobnicate_all(7);\n}\n")
    with pytest.raises(DoesNotBuild) as raised:
        build(top)
    details = "\n".join(raised.value.details)
    assert "tdp_mmu.c:3: error: implicit declaration of function 'frobnicate_all'" in details
    assert "return frobnicate_all(7);" in details
    assert "frobnicate_all" in raised.value.details[-1]
    assert "\n" not in str(raised.value)
    # Nothing half-built is left.
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert not list((tmp_path / "cache" / "flushlab" / "trees").iterdir())


def test_a_directory_without_the_tdp_mmu(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("VERSION = 5\nPATCHLEVEL = 4\nSUBLEVEL = 0\n")
    with pytest.raises(Exception, match=r"tdp_mmu\.c: No such file"):
        build(tmp_path)
