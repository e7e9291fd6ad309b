"""The layers of the C core hold, and each way to break them is found."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from native.headers import HERE
from native.layers import declared_layers, violations

LAYERS = declared_layers(HERE.parent / "pyproject.toml")


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """A copy of the core's C files."""
    for path in (*HERE.glob("*/*.c"), *HERE.glob("*/*.h")):
        copy = tmp_path / path.relative_to(HERE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_they_hold(core: Path) -> None:
    assert list(violations(core, LAYERS)) == []


def test_each_folder_is_a_layer(core: Path) -> None:
    assert sorted(LAYERS) == sorted(path.name for path in core.iterdir())
    assert len(LAYERS) == len(set(LAYERS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("core/events.h", '#include "oracle/oracle.h"', "includes oracle/oracle.h; oracle is above core"),
        ("sync/ipi.c", '#include "vm/vm.h"', "includes vm/vm.h; vm is above sync"),
        ("memory/frame.c", '#include "ept/ept.h"', "includes ept/ept.h; ept is above memory"),
        ("guest/run.c", '#include "sync/rcu_internal.h"', "which belongs to sync alone"),
        ("guest/run.c", '#include "walk.h"', "expected a header of the core with its folder: core/heap.h"),
        ("guest/run.c", '#include "walk/no_such.h"', "expected a header of the core with its folder"),
        ("guest/run.h", "int vm_create(struct machine *m, uint64_t gfns);", "expected in machine/vms.h"),
        (
            "sync/ipi.c",
            "struct vm *vm_get(struct machine *m, uint32_t cpu, uint32_t vm);",
            "expected in vm/vm.h",
        ),
        ("guest/run.h", "enum walk_result guest_nothing(void);", "is declared, and no source defines it"),
        (
            "guest/run.c",
            "int guest_nothing(void)\n{\n\treturn 0;\n}",
            "is in no header; expected to be static",
        ),
        ("guest/run.c", "/* See guest_stage.h. */", "mentions guest_stage.h, which does not exist"),
    ],
)
def test_what_breaks_a_rule_is_found(core: Path, path: str, text: str, found: str) -> None:
    append(core / path, f"\n{text}\n")
    (line,) = violations(core, LAYERS)
    assert line.startswith(path)
    assert found in line


def test_c_files_that_python_and_prose_mention_exist() -> None:
    root, mentioned = HERE.parent, 0
    paths = [
        path
        for folder in ("bench", "emulator", "metrics", "native")
        for path in (root / folder).rglob("*.py")
    ]
    for path in (*paths, *root.glob("*.md"), *root.glob("emulator/guide/*.md")):
        for name in re.findall(r"(?<![\w/])native/\w+/\w+\.[ch]\b", path.read_text()):
            assert (root / name).is_file(), f"{path.relative_to(root)} mentions {name}"
            mentioned += 1
    assert mentioned > 3


def test_a_declaration_in_a_second_header_is_found(core: Path) -> None:
    """The rule is about each declaration, not about there being one beside the source."""
    append(core / "vm/watch.h", "\nint ipi_drain(struct machine *m, uint32_t cpu);\n")
    (line,) = violations(core, LAYERS)
    assert "ipi_drain(); expected in sync/ipi.h" in line


@pytest.mark.slow
def test_a_folder_that_is_no_layer_is_found(core: Path) -> None:
    (core / "extra").mkdir()
    (core / "extra" / "extra.h").write_text("struct extra;\n")
    assert [line for line in violations(core, LAYERS) if line.startswith("extra/: no layer")]
    assert [
        line for line in violations(core, ["attic", *LAYERS]) if line.startswith("attic/: a layer without")
    ]


def test_what_is_static_or_in_a_comment_is_no_declaration(core: Path) -> None:
    append(core / "guest/run.c", "\n/* int hidden(void); */\nstatic int quiet(void)\n{\n\treturn 0;\n}\n")
    assert list(violations(core, LAYERS)) == []
