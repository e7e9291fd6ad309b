"""The code of emulator.kvm and of the proposals, as shipped or patched, and its modules, imported anew.

A patched KVM is a KVM of its own: every module of emulator.kvm and every proposal is executed again, so that
it has functions, classes and globals of its own and shares none with another policy's.  Files that no patch
changes are not compiled again.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Final

from emulator.policy.guard import Place, UserPolicyError, error_text, register_patched, through
from emulator.policy.imports import PACKAGE, PACKAGES, is_patchable
from emulator.policy.patch.diff import PROPOSALS, PatchError, full_path

# Processor seconds for executing the modules.
_IMPORTING: Final = 10.0

Modules = Mapping[str, ModuleType]


@dataclass(frozen=True, slots=True)
class Unit:
    """One module's code.  `source`: its text, if a patch changes it."""

    name: str
    code: CodeType
    is_package: bool
    path: str
    source: str | None = None


class Shipped:
    """The code as it is on disk; nothing changes it while the process runs."""

    @cached_property
    def directory(self) -> Path:
        """Return the directory of emulator/kvm."""
        return _directory(PACKAGE)

    @cached_property
    def sources(self) -> dict[str, str]:
        """Return the text of each file, by its path as FileDiff has it."""
        return {path: file.read_text("utf-8") for path, file in self.files.items()}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Return each file by its path as FileDiff has it."""
        found = {}
        for package in PACKAGES:
            directory, prefix = _directory(package), "" if package == PACKAGE else PROPOSALS
            for file in sorted(directory.rglob("*.py")):
                found[prefix + file.relative_to(directory).as_posix()] = file
        return found

    @cached_property
    def units(self) -> dict[str, Unit]:
        """Return the code of each file, by its path; as the import system compiled it once."""
        return {path: self._unit(path) for path in self.sources}

    def code_of(self, module: str) -> CodeType | None:
        return next((unit.code for unit in self.units.values() if unit.name == module), None)

    def _unit(self, path: str) -> Unit:
        name, is_package = module_name(path)
        spec = importlib.util.find_spec(name)
        loader = spec.loader if spec is not None else None
        code = loader.get_code(name) if isinstance(loader, InspectLoader) else None
        if code is None:
            code = compile(self.sources[path], str(self.files[path]), "exec", dont_inherit=True)
        return Unit(name, code, is_package, str(self.files[path]))


def _directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


SHIPPED: Final = Shipped()


def module_name(path: str) -> tuple[str, bool]:
    """Return the name of a file's module, by its path as FileDiff has it, and whether it is a package."""
    parts = full_path(path).removesuffix(".py").split("/")
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


@dataclass(frozen=True, slots=True)
class Code:
    """The code of all modules under some patches.  name: the patches' name."""

    name: str
    units: Mapping[str, Unit]
    changed: frozenset[str]  # names of modules

    def blamed(self, error: BaseException) -> PatchError | None:
        """Return the error in the user's words if it came out of KVM's code, which the patch has changed.

        KVM's own failures (a WARN, a wait that is forbidden) are verdicts, and are left to the caller.
        """
        found: tuple[FrameType, int] | None = None
        trace = error.__traceback__
        while trace is not None:
            name = str(trace.tb_frame.f_globals.get("__name__"))
            if is_patchable(name) and (found is None or self._is_changed(trace.tb_frame)):
                found = trace.tb_frame, trace.tb_lineno
            trace = trace.tb_next
        if found is None:
            return None
        frame, line = found
        where = f"{self.name}: {self._file(frame)}:{line}, in {frame.f_code.co_name}()"
        return PatchError(where, error_text(error), "code that runs")

    def _is_changed(self, frame: FrameType) -> bool:
        return frame.f_globals.get("__name__") in self.changed

    def _file(self, frame: FrameType) -> str:
        filename = frame.f_code.co_filename
        return next((label(unit) for unit in self.units.values() if unit.path == filename), filename)


def label(unit: Unit) -> str:
    """Return a module's file as patches name it."""
    path = unit.name.replace(".", "/")
    return f"{path}/__init__.py" if unit.is_package else f"{path}.py"


def patched_code(name: str, sources: Mapping[str, str | None], *, users: bool) -> Code:
    """Compile the files that a patch changes; raises PatchError.  `users`: the patch is a user's."""
    units = {unit.name: unit for unit in SHIPPED.units.values()}
    changed = set()
    for path, text in sources.items():
        module, is_package = module_name(path)
        changed.add(module)
        if text is None:
            units.pop(module, None)
            continue
        # Tracebacks show it, with lines of the patched text.
        filename = f"{full_path(path)} ({name})"
        if users:
            register_patched(filename)
        units[module] = Unit(module, _compiled(name, path, filename, text), is_package, filename, text)
    return Code(name, units, frozenset(changed))


def _compiled(name: str, path: str, filename: str, text: str) -> CodeType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compile(text, filename, "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{name}: {full_path(path)}:{error.lineno or 1}"
        raise PatchError(where, f"{type(error).__name__}: {error.msg}", "Python") from error
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise PatchError(f"{name}: {full_path(path)}", error_text(error), "Python") from error


# --- importing it -------------------------------------------------------------------------------------------


class _Loader(InspectLoader):
    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def is_package(self, fullname: str) -> bool:
        return self.unit.is_package

    def get_code(self, fullname: str) -> CodeType:
        return self.unit.code

    def get_source(self, fullname: str) -> str | None:
        source = self.unit.source
        return Path(self.unit.path).read_text("utf-8") if source is None else source

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.unit.path
        exec(self.unit.code, module.__dict__)


class _Finder(MetaPathFinder):
    """Finds the patchable modules here, and nowhere else."""

    def __init__(self, units: Mapping[str, Unit]) -> None:
        self._units = units

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not is_patchable(fullname):
            return None
        unit = self._units.get(fullname)
        if unit is None:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        spec = ModuleSpec(fullname, _Loader(unit), origin=unit.path, is_package=unit.is_package)
        if unit.is_package:
            spec.submodule_search_locations = [str(Path(unit.path).parent)]
        return spec


def loaded() -> dict[str, ModuleType]:
    """Return the patchable modules that the import system has now."""
    return {name: module for name, module in sys.modules.items() if is_patchable(name)}


def install(modules: Modules) -> None:
    """Make these the patchable modules that imports find."""
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(modules)
    for package in PACKAGES:
        parent, _, child = package.rpartition(".")
        if package in modules:
            setattr(sys.modules[parent], child, modules[package])


def load_shipped() -> Modules:
    """Import all patchable modules; return them."""
    for unit in SHIPPED.units.values():
        importlib.import_module(unit.name)
    return loaded()


def imported(code: Code) -> Modules:
    """Import the code as modules of their own; the import system has the former ones again afterwards.

    Raises PatchError for each error in it.
    """
    with _finding(code.units):
        through(Place(code.name, seconds=_IMPORTING), _import_all, code)
        return loaded()


@contextmanager
def _finding(units: Mapping[str, Unit]) -> Iterator[None]:
    before, finder = loaded(), _Finder(units)
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        install(before)


def _import_all(code: Code) -> None:
    for name in code.units:
        try:
            importlib.import_module(name)
        except (UserPolicyError, KeyboardInterrupt):
            raise
        except BaseException as error:
            failure = _not_imported(code, name, error)
        else:
            continue
        raise failure


def _not_imported(code: Code, name: str, error: BaseException) -> PatchError:
    """Return the error that names the line of KVM's code in which an import ended."""
    where = label(code.units[name])
    frames = {unit.path: label(unit) for unit in code.units.values()}
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if filename in frames:
            where = f"{frames[filename]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return PatchError(f"{code.name}: {where}", error_text(error), "code that can be imported")
