"""Builds a tree's TDP MMU into a shared object, once for each state of tree, shim and compiler.

The object lies in the user's cache directory, under the hash of all that went into it, and is there whole or
not at all.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Final

from emulator.drift.tree import tree_version
from emulator.errors import BadInput
from emulator.kernel_tree.compiler import Compiler, Diagnostic, find_compiler
from emulator.kernel_tree.cut import cut_functions
from emulator.kernel_tree.harvest import Harvest, Incomplete, source_line
from emulator.kernel_tree.headers import Headers, Kind, items

MMU: Final = "arch/x86/kvm/mmu"
KVM_MAIN: Final = "virt/kvm/kvm_main.c"
# The sources that are compiled, and the headers of the same directory that they include as they are.
SOURCES: Final = ("tdp_mmu.c", "tdp_iter.c", "spte.c")
_HEADERS: Final = ("mmu_internal.h", "spte.h", "tdp_iter.h", "tdp_mmu.h", "mmutrace.h")
_INCLUDE: Final = re.compile(r'^\s*#\s*include\s+(["<])([\w./-]+)[">]', re.MULTILINE)
_UNDEFINED: Final = re.compile(r"undefined reference to [`'](\w+)'")


class Use(StrEnum):
    """Name the use of the object: compare it with the model on one thread, run it on the machine, or run it
    there and log its accesses to memory."""

    COMPARED = "compared"
    MACHINE = "machine"
    LOGGED = "logged"


# The files of the shim: those that are compiled in one unit with the tree's files, behind them; those that
# are compiled on their own; and the headers.
_CALLS: Final = ("versions.c", "vms.c", "requests_calls.c", "faults.c", "zaps.c")
_BEHIND: Final = {Use.COMPARED: ("versions.c", "glue.c"), Use.MACHINE: _CALLS, Use.LOGGED: _CALLS}
_MACHINE = (
    "machine", "objects", "sptes", "sync", "kvm", "requests", "steps", "explored", "keep", "plain", "crash",
)  # fmt: skip
_ALONE: Final = {
    Use.COMPARED: ("shim.c", "compared.c"),
    Use.MACHINE: tuple(f"{name}.c" for name in _MACHINE),
    Use.LOGGED: tuple(f"{name}.c" for name in _MACHINE),
}
_SHIM: Final = {
    Use.COMPARED: ("linux.h", "api.h", "shim.h"),
    Use.MACHINE: ("linux.h", "machine.h", "machine_internal.h"),
    Use.LOGGED: ("linux.h", "machine.h", "machine_internal.h"),
}
# The compiler's calls go to shim/plain.c, and no sanitizer is linked.
_LOGGING: Final = (
    "-fsanitize=thread",
    "--param=tsan-distinguish-volatile=1",
    "--param=tsan-instrument-func-entry-exit=0",
)
_MOST_ERRORS: Final = 8


class DoesNotBuild(BadInput):
    """The tree does not compile against the shim.  details: the compiler's words, then the missing names."""

    def __init__(self, top: Path, details: list[str]) -> None:
        super().__init__(str(top / MMU), details[-1], "sources that compile against the shim")
        self.details = details


@dataclass(frozen=True, slots=True)
class Built:
    """A shared object.

    `sources`: a hash of the tree's files that were compiled.  `harvested`: lines of declarations taken;
    `stubs`: functions that the tree calls and the shim lacks, which report themselves when they are called;
    `cached`: it was there already.  `cut`: the functions of kvm_main.c that were compiled.
    """

    path: Path
    version: str
    top: Path
    sources: str
    harvested: int
    rounds: int
    stubs: tuple[str, ...]
    cached: bool
    cut: tuple[str, ...] = ()

    @property
    def code(self) -> list[str]:
        """Return the files and functions of the tree that run."""
        files = [f"{MMU}/{name}" for name in SOURCES]
        return files + [f"{name}() in {KVM_MAIN}" for name in self.cut]


def build(top: Path, use: Use = Use.COMPARED) -> Built:
    """Return the shared object of a tree, from the cache if nothing has changed; raise BadInput if it does
    not build."""
    version = tree_version(top)
    files = _tree_files(top, use)
    compiler = find_compiler()
    cache = cache_directory()
    directory = cache / _key(top, files, compiler, use)
    target = directory / "tdp_mmu.so"
    if target.is_file():
        return _described(directory, version, top, files, use, cached=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as work:
        _Build(top, compiler, Path(work), use).run()
        try:
            Path(work).rename(directory)
        except OSError:
            # Another process has built the same meanwhile.
            if not target.is_file():
                raise
        else:
            Path(work).mkdir()
    return _described(directory, version, top, files, use, cached=False)


def cache_directory() -> Path:
    """Return the directory for built trees: flushlab/trees in XDG_CACHE_HOME, or in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".cache"
    return base / "flushlab" / "trees"


def shim_text(name: str) -> str:
    return resources.files("emulator.kernel_tree").joinpath("shim", name).read_text("utf-8")


def _tree_files(top: Path, use: Use) -> dict[str, bytes]:
    found = {}
    cut = () if use is Use.COMPARED else (KVM_MAIN,)
    for name in (*(f"{MMU}/{name}" for name in (*SOURCES, *_HEADERS)), *cut):
        path = top / name
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            expected = "the sources of a kernel with the TDP MMU, 6.1 or newer"
            raise BadInput(str(path), error.strerror or str(error), expected) from error
    return found


def _shim_files(use: Use) -> tuple[str, ...]:
    return (*_SHIM[use], *_BEHIND[use], *_ALONE[use])


def _key(top: Path, files: dict[str, bytes], compiler: Compiler, use: Use) -> str:
    """Return a hash of all that goes in.  Headers outside of the directory count by their sizes and times,
    because there are thousands."""
    hashed = hashlib.blake2b(digest_size=16)
    parts: list[bytes] = [str(top.resolve()).encode(), compiler.path.encode(), compiler.version.encode()]
    parts += [name.encode() + b"\0" + data for name, data in sorted(files.items())]
    parts += [use.encode(), *(shim_text(name).encode() for name in _shim_files(use))]
    builders = ("build", "cut", "harvest", "headers")
    parts += [Path(__file__).with_name(f"{name}.py").read_bytes() for name in builders]
    for path in Headers(top, frozenset()).files():
        state = path.stat()
        parts.append(f"{path} {state.st_size} {state.st_mtime_ns}".encode())
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()


def _described(
    directory: Path, version: str, top: Path, files: dict[str, bytes], use: Use, *, cached: bool
) -> Built:
    lines = (directory / "report").read_text("utf-8").splitlines()
    hashed = hashlib.blake2b(digest_size=8)
    for name, data in sorted(files.items()):
        hashed.update(b"%s %d\0" % (name.encode(), len(data)) + data)
    harvested, rounds, stubs = int(lines[0]), int(lines[1]), tuple(lines[2:])
    target = directory / "tdp_mmu.so"
    cut = () if use is Use.COMPARED else tuple(one.name for one in cut_functions(files[KVM_MAIN]))
    return Built(target, version, top, hashed.hexdigest(), harvested, rounds, stubs, cached, cut)


@dataclass(slots=True)
class _Build:
    """One build, in a directory of its own."""

    top: Path
    compiler: Compiler
    work: Path
    use: Use

    def run(self) -> None:
        harvest = self._prepare()
        try:
            harvest.until_complete(lambda text: self._check(text))
        except Incomplete as error:
            raise DoesNotBuild(self.top, self._failure(error.said, error.missing)) from None
        logging = _LOGGING if self.use is Use.LOGGED else ()
        objects = [self._object("unit.c", [*self._options(), *logging])]
        objects += [self._object(name, ["-I", str(self.work)]) for name in _ALONE[self.use]]
        stubs = self._link(objects, harvest)
        text = harvest.text()
        (self.work / "report").write_text(
            "\n".join([str(len(text.splitlines())), str(harvest.rounds), *stubs])
        )

    def _prepare(self) -> Harvest:
        include = self.work / "include"
        for name in _included(self.top):
            file = include / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        for name in _shim_files(self.use):
            (self.work / name).write_text(shim_text(name), "utf-8")
        (self.work / "tree.h").write_text(_described_functions(self.top), "utf-8")
        parts = [f'#include "{self.top.resolve() / MMU / name}"' for name in SOURCES]
        if self.use is not Use.COMPARED:
            self._cut()
            parts.append('#include "cut.c"')
        parts += [f'#include "{name}"' for name in _BEHIND[self.use]]
        (self.work / "unit.c").write_text("\n".join([*parts, ""]), "utf-8")
        return Harvest(Headers(self.top, frozenset(f"{MMU}/{name}" for name in _HEADERS)))

    def _cut(self) -> None:
        """Write the functions of kvm_main.c that are compiled, each with the place that it has there."""
        path = self.top.resolve() / KVM_MAIN
        functions = cut_functions(path.read_bytes())
        parts = [f'#line {one.line} "{path}"\n{one.text}' for one in functions]
        (self.work / "cut.c").write_text("\n".join([*parts, ""]), "utf-8")

    def _options(self) -> list[str]:
        given = ("linux.h", "config.h", "harvest.h")
        (self.work / "config.h").write_text(_CONFIG, "utf-8")
        includes = [part for name in given for part in ("-include", str(self.work / name))]
        return [*includes, "-I", str(self.work / "include"), "-I", str(self.work)]

    def _check(self, text: str) -> list[Diagnostic]:
        (self.work / "harvest.h").write_text(text, "utf-8")
        return self.compiler.compile(self.work / "unit.c", None, self._options())

    def _object(self, name: str, options: list[str]) -> Path:
        output = self.work / f"{name}.o"
        errors = [one for one in self.compiler.compile(self.work / name, output, options) if one.error]
        if errors:
            raise DoesNotBuild(self.top, self._failure(errors, []))
        return output

    def _link(self, objects: list[Path], harvest: Harvest) -> list[str]:
        target = self.work / "tdp_mmu.so"
        said = self.compiler.link(objects, target, ["-Wl,-z,defs"])
        missing = sorted(set(_UNDEFINED.findall(said)))
        if missing:
            (self.work / "stubs.c").write_text("\n".join(_stubs(missing, harvest)), "utf-8")
            objects = [*objects, self._object("stubs.c", [])]
            said = self.compiler.link(objects, target, ["-Wl,-z,defs"])
        if said:
            raise BadInput(str(self.top / MMU), textwrap.shorten(said, 300), "objects that link")
        return [name for name in missing if not _is_variable(name, harvest)]

    def _failure(self, said: list[Diagnostic], missing: list[str]) -> list[str]:
        """Return the compiler's errors with the lines that they are about, and then the reason in one
        line."""
        lines = []
        for one in said[:_MOST_ERRORS]:
            lines.append(str(one).replace(f"{self.work}/", "shim/"))
            if source := source_line(one).strip():
                lines.append(f"    {source}")
        if len(said) > _MOST_ERRORS:
            lines.append(f"and {len(said) - _MOST_ERRORS} more errors")
        if missing:
            names = ", ".join(missing[:_MOST_ERRORS])
            return [*lines, f"it needs {names}, which neither the shim nor the tree's headers have"]
        return [*lines, f"{len(said)} errors of the compiler"]


_CONFIG: Final = """\
#define CONFIG_64BIT 1
#define CONFIG_X86_64 1
#define CONFIG_SMP 1
#define IS_ENABLED(option) 0
#define IS_BUILTIN(option) 0
"""


def _included(top: Path) -> Iterator[str]:
    """Yield the headers that the sources include from elsewhere: for each stands an empty one."""
    for name in (*SOURCES, *_HEADERS):
        text = (top / MMU / name).read_bytes().decode("utf-8", "replace")
        for how, included in _INCLUDE.findall(text):
            if ".." not in included and not (how == '"' and (top / MMU / included).is_file()):
                yield included


def _described_functions(top: Path) -> str:
    """Return macros that say which functions the directory has, with how many and which parameters, and which
    members its structures have."""
    lines = []
    for name in (*SOURCES, *_HEADERS):
        text = (top / MMU / name).read_bytes().decode("utf-8", "replace")
        for function, parameters in _functions(text):
            lines.append(f"#define TREE_ARGS_{function} {len(parameters)}")
            lines += [f"#define TREE_ARG_{function}_{one} {at}" for at, one in enumerate(parameters) if one]
        for item in items(text):
            members = [one for _, names in item.members for one in names]
            lines += [f"#define TREE_MEMBER_{item.names[0]}_{one} 1" for one in members]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _functions(source: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the parameters' names of each function that is declared or defined."""
    for item in items(source):
        if item.kind is Kind.FUNCTION:
            match = re.search(rf"\b{item.names[0]} \((.*?)\)\s*(?:[;{{]|$)", item.text, re.DOTALL)
            inside = match[1].strip() if match else "void"
            names = [] if inside in ("void", "") else [one.split()[-1] for one in inside.split(",")]
            yield item.names[0], [one if one.isidentifier() else "" for one in names]


def _stubs(names: list[str], harvest: Harvest) -> Iterator[str]:
    """Yield C source for the names that the tree uses and nothing defines: zero for variables, a report for
    functions."""
    yield "void shim_missing(const char *name);"
    for name in names:
        if _is_variable(name, harvest):
            yield f"unsigned long long {name}[512];"
        else:
            yield f'long {name}(void) {{ shim_missing("{name}"); return 0; }}'


def _is_variable(name: str, harvest: Harvest) -> bool:
    """Return whether the tree declares a variable of this name; headers that are compiled as they are
    count."""
    everywhere = Headers(harvest.headers.top, frozenset())
    item = harvest.taken.get(name) or everywhere.find(name, (Kind.VARIABLE, Kind.FUNCTION))
    return item is not None and item.kind is Kind.VARIABLE
