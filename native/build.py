"""Build `native._native`, the C core, with cffi in API mode.

`pip install` reaches `BuildExt` through pyproject.toml; `python -m native.build` builds in place for
development.  Python sees the declarations between `/* api */` and `/* end api */` in the headers; a second
list, which could contradict them, does not exist.  C files and headers stand in folders here, and an #include
names the folder: `#include "core/heap.h"`.

Environment:
    FLUSHLAB_SANITIZE=thread|address   instrument the core (address includes undefined behaviour)
    FLUSHLAB_WERROR=0                  accept warnings of other compilers than ours
"""

from __future__ import annotations

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from cffi import FFI
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

MODULE = "native._native"


def _by_path(name: str) -> None:
    """Load a module of this directory by its path, because pip's build cannot import the package `native`."""
    spec = spec_from_file_location(f"native.{name}", Path(__file__).resolve().with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(sys.modules.setdefault(spec.name, module))


_by_path("headers")
_by_path("description")
_by_path("brief")

from native.brief import keep_gil  # noqa: E402
from native.description import Malformed, described_calls, read  # noqa: E402
from native.headers import HERE, declarations, headers, public_headers, sources  # noqa: E402

ROOT = HERE.parent

# gcc and clang both take these.  Debian's hardening options come from the interpreter's own CFLAGS.
_FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-pthread"]

# cffi's generated wrappers may cause warnings; our headers in that file must not.
_PRELUDE_END = """
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wsign-compare"
"""


def compile_flags() -> list[str]:
    flags = list(_FLAGS)
    if os.environ.get("FLUSHLAB_WERROR", "1") != "0":
        flags.append("-Werror")
    # Loops of a few nanoseconds have assertions.  The interpreter's own CFLAGS come first.
    flags.append("-UNDEBUG" if os.environ.get("FLUSHLAB_SANITIZE") else "-DNDEBUG")
    return flags + _sanitizer_flags()


def _sanitizer_flags() -> list[str]:
    sanitizer = os.environ.get("FLUSHLAB_SANITIZE", "")
    if not sanitizer:
        return []
    if sanitizer not in ("thread", "address"):
        sys.exit(f"FLUSHLAB_SANITIZE: found {sanitizer!r}, expected thread or address")
    kinds = "thread" if sanitizer == "thread" else "address,undefined"
    return [f"-fsanitize={kinds}", "-fno-omit-frame-pointer", "-g"]


def ffibuilder() -> FFI:
    ffi = FFI()
    ffi.cdef(declarations())
    includes = "".join(f'#include "{header.relative_to(HERE)}"\n' for header in public_headers())
    ffi.set_source(MODULE, includes + _PRELUDE_END)
    return ffi


def _brief_calls() -> list[str]:
    """Return the calls during which Python keeps the GIL."""
    try:
        described = described_calls()
    except Malformed as error:
        sys.exit(str(error))
    return [name for name, one in described.items() if read(one).keeps_gil]


class BuildExt(build_ext):
    """`build_ext` that writes cffi's wrapper source first and then compiles it with the core.

    pyproject.toml names the extension without sources; they are found here, so that a new C file need not
    be listed.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        for extension in self.extensions:
            if extension.name == MODULE:
                self._describe(extension)

    def _describe(self, extension: Extension) -> None:
        # Paths relative to the project: distutils puts objects under build_temp by relative path, and
        # sdist puts the listed files into the archive.
        here = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
        extension.sources = [str(here / path.relative_to(HERE)) for path in sources()]
        extension.depends = [str(here / path.relative_to(HERE)) for path in headers()]
        extension.include_dirs = [str(here)]
        extension.extra_compile_args = compile_flags()
        extension.extra_link_args = ["-pthread", *_sanitizer_flags()]
        # cffi's wrappers use the stable ABI alone, so that one wheel serves CPython 3.11 and newer.
        extension.py_limited_api = True

    def build_extension(self, ext: Extension) -> None:
        if ext.name == MODULE:
            self._require_python_headers()
            generated = Path(self.build_temp) / "_native.c"
            generated.parent.mkdir(parents=True, exist_ok=True)
            emitted = generated.with_suffix(".cffi.c")
            ffibuilder().emit_c_code(str(emitted))
            wrappers = keep_gil(emitted.read_text(), _brief_calls())
            if not generated.exists() or generated.read_text() != wrappers:
                generated.write_text(wrappers)
            ext.sources = [*ext.sources, str(generated)]
        super().build_extension(ext)

    def _require_python_headers(self) -> None:
        # Debian packages them separately, and the compiler's message does not show the reason.
        if not any((Path(directory) / "Python.h").exists() for directory in self.include_dirs):
            looked = ", ".join(self.include_dirs)
            sys.exit(f"Python.h: not found in {looked}; expected from python3-dev (Debian) or python3-devel")


def _remove_others(built: Path) -> None:
    """Remove builds of the module under other file names, because Python might import one of them instead."""
    for other in built.parent.glob("_native*.so"):
        if other != built:
            other.unlink()


def build_in_place() -> None:
    """Compile into this directory, from which a checkout imports `native`."""
    os.chdir(ROOT)
    distribution = Distribution(
        {
            "name": "flushlab",
            "packages": ["native"],
            "ext_modules": [Extension(MODULE, sources=[])],
            "cmdclass": {"build_ext": BuildExt},
        }
    )
    command = distribution.get_command_obj("build_ext")
    command.inplace = True
    command.parallel = os.cpu_count()
    # Objects built with different sanitizers must not be linked together.
    command.build_temp = str(Path("build") / ("native-" + os.environ.get("FLUSHLAB_SANITIZE", "plain")))
    command.force = "--force" in sys.argv
    distribution.run_command("build_ext")
    _remove_others(Path(command.get_ext_fullpath(MODULE)).resolve())
    # Not at the top: pip's build cannot import the package `native`.
    from native import description, stub

    stub.update()
    description.update()


if __name__ == "__main__":
    build_in_place()
