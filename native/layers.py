"""Hold the C core to its layers, as import-linter does for Python: `python -m native.layers`.

[tool.native-layers] in pyproject.toml lists the folders from top to bottom.  An #include leads down or stays
in its folder.  A function that other files may call is declared in the header beside its source and nowhere
else, so an upward call needs an upward #include.  A header that ends in _internal.h is its folder's own.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from native.headers import HERE, Statement, includes, statements

# Files of Linux that comments name without a path.
KERNEL_FILES: Final = {"srcutree.c", "tdp_mmu.c"}


def declared_layers(project: Path) -> list[str]:
    """Return the folders from top to bottom."""
    layers = tomllib.loads(project.read_text())["tool"]["native-layers"]["layers"]
    return [str(layer) for layer in layers]


def violations(root: Path, layers: list[str]) -> Iterator[str]:
    """Yield the violations of the rules, by file and line."""
    files = sorted([*root.glob("*/*.c"), *root.glob("*/*.h")])
    folders = {path.parent.name for path in files}
    for folder in sorted(folders - set(layers)):
        yield f"{folder}/: no layer; [tool.native-layers] must name each folder with C files"
    for layer in sorted(set(layers) - folders):
        yield f"{layer}/: a layer without C files"
    height = {layer: -number for number, layer in enumerate(layers)}
    for path in files:
        if path.parent.name in height:
            yield from _upward(root, path, height)
    yield from _astray(root, files)
    names = {path.name for path in files}
    for path in files:
        yield from _missing(root, path, names)


def _upward(root: Path, path: Path, height: dict[str, int]) -> Iterator[str]:
    own = path.parent.name
    for name, line in includes(path.read_text()):
        place = f"{path.relative_to(root)}:{line}: includes {name}"
        folder = name.partition("/")[0]
        if not (root / name).is_file() or folder not in height:
            yield f"{place}; expected a header of the core with its folder: core/heap.h"
        elif height[folder] > height[own]:
            yield f"{place}; {folder} is above {own}"
        elif name.endswith("_internal.h") and folder != own:
            yield f"{place}, which belongs to {folder} alone"


def _functions(path: Path) -> Iterator[tuple[str, Statement]]:
    """Yield the functions that a file declares or defines for other files."""
    for statement in statements(path.read_text()):
        function = statement.function()
        if function is not None and not statement.static:
            yield function[0], statement


def _astray(root: Path, files: list[Path]) -> Iterator[str]:
    """Yield the functions that are declared elsewhere than in the header beside their source."""
    source: dict[str, Path] = {}
    for path in files:
        for name, statement in _functions(path):
            if statement.body:
                source[name] = path
    declared: set[str] = set()
    for path in files:
        for name, statement in _functions(path):
            if statement.body and path.suffix == ".c":
                continue
            place = f"{path.relative_to(root)}:{statement.line}: {name}()"
            if name not in source:
                yield f"{place} is declared, and no source defines it"
            elif path != source[name].with_suffix(".h"):
                yield f"{place}; expected in {source[name].with_suffix('.h').relative_to(root)}"
            declared.add(name)
    for name in sorted(source.keys() - declared):
        yield f"{source[name].relative_to(root)}: {name}() is in no header; expected to be static"


def _missing(root: Path, path: Path, names: set[str]) -> Iterator[str]:
    """Yield mentions of C files that do not exist."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        # Without paths: bench/native/walk.c, arch/x86/kvm/mmu/spte.h, <sched.h>.
        for name in re.findall(r"(?<![\w/<.-])[a-z_]\w*\.[ch]\b", line):
            if name not in names | KERNEL_FILES:
                yield f"{path.relative_to(root)}:{number}: mentions {name}, which does not exist"


def main() -> None:
    layers = declared_layers(HERE.parent / "pyproject.toml")
    found = list(violations(HERE, layers))
    for violation in found:
        print(f"native/{violation}", file=sys.stderr)
    if found:
        sys.exit(1)
    print(f"{len(layers)} layers of C kept")


if __name__ == "__main__":
    main()
