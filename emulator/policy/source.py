"""A user's policy as a file: its text, its module, its class, and the decision points that the class decides.

All code here that inspects the file's objects does so behind the door (emulator.policy.guard), because a
class may have a metaclass, descriptors and properties that run the file's code.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

from emulator.errors import did_you_mean
from emulator.policy.acting import MOMENTS
from emulator.policy.confine import NO_PATCHES, Change, Confinement, Patches, collected, load_patchable
from emulator.policy.former import FormerNames, home_of
from emulator.policy.guard import Place, UserPolicyError, class_name, exact, register, shown, through
from emulator.policy.point import DecisionPoint
from emulator.policy.points import BY_NAME, POINTS
from emulator.policy.policy import Policy, PolicyError
from emulator.policy.presets import DEFAULT, preset

# A method with a name this similar to a point's is taken for a misspelling, not a helper.
_TYPO: Final = 0.75
# The emulator calls a policy through these; a user's class must not change them.
_RESERVED: Final = (
    "answers", "confined", "fresh", "given", "guarded", "heard", "is_patched_by_user", "may_answer",
    "module", "mutants", "new_data", "overrides", "parts", "spelled", "with_settings",
)  # fmt: skip
# Processor seconds for executing the file, making its object, and looking at either.
_LOADING: Final = 10.0
_ONE_CLASS: Final = "one class that derives from emulator.policy.Policy"
_OURS: Final = ("emulator", "native", "metrics")


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of executing the file."""

    module: ModuleType
    cls: type[Policy]
    name: str
    called: str  # the class's own name
    base: Policy
    points: tuple[DecisionPoint, ...]
    moments: tuple[str, ...]
    # By name, the line at which the class, or a class of the file that it derives from, defines it.
    at: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Source:
    """The file of a user's policy, its code and its contents, from which another such policy can be made."""

    path: str
    code: CodeType
    lines: Mapping[str, int]
    stores: Mapping[str, int]
    loaded: Loaded
    patches: Patches = NO_PATCHES
    # Names that the code finds defined: those of the module of a class that is given as a policy.
    names: Mapping[str, object] = field(default_factory=dict)

    def again(self) -> Source:
        """Execute the file's original text again, and return the new source."""
        path = Path(self.path)
        if not self.patches:
            with Confinement.entered():
                return replace(self, loaded=_load(path, self.code, self.lines, self.names))
        active = Confinement.swap(NO_PATCHES)
        try:
            loaded, active_now = _executed(path, self.code, self.lines, self.stores, self.names, first=False)
        except UserPolicyError:
            Confinement.swap(active)
            raise
        Confinement.swap(active_now if active else active)
        return replace(self, loaded=loaded, patches=active_now)

    def line(self, name: str) -> int:
        return self.loaded.at.get(name, self.lines.get(self.loaded.called, 1))

    def place(self, name: str, expected: str | None = None, seconds: float | None = None) -> Place:
        place = Place(self.path, self.line(name), f"{self.loaded.called}.{name}", expected)
        return place if seconds is None else replace(place, seconds=seconds)

    def refused(self, change: str) -> UserPolicyError:
        """Return the error for a change of a module that was made when the policy was asked."""
        line = self.stores.get(change.rpartition(".")[2], self.line("__init__"))
        found = f"changes {change} when it is asked"
        return UserPolicyError(
            f"{self.path}:{line}", found, "changes of emulator.kvm when the file is executed only"
        )


def read_source(path: Path) -> Source:
    """Load the file; raises UserPolicyError."""
    tree, code = _parse(path)
    _import_ours(tree)
    return source_of_code(path, tree, code, {})


def source_of_code(path: Path, tree: ast.Module, code: CodeType, names: Mapping[str, object]) -> Source:
    """Execute the code of a policy's class, which `tree` is and to which `names` are defined; raises
    UserPolicyError."""
    register(str(path))
    load_patchable()
    lines, stores = _lines(tree), _stores(tree)
    loaded, patches = _executed(path, code, lines, stores, names, first=True)
    return Source(str(path), code, lines, stores, loaded, patches, names)


def _executed(
    path: Path,
    code: CodeType,
    lines: Mapping[str, int],
    stores: Mapping[str, int],
    names: Mapping[str, object],
    *,
    first: bool,
) -> tuple[Loaded, Patches]:
    def refuse(change: str) -> UserPolicyError:
        line = stores.get(change.rpartition(".")[2], 1)
        return UserPolicyError(f"{path}:{line}", f"changes {change}", "changes of emulator.kvm only")

    with Confinement.entered():
        loaded, patches = collected(lambda: _load(path, code, lines, names), refuse, others=first)
    for change in patches.new_names:
        raise _without_effect(path, change, stores)
    return loaded, patches


def _without_effect(path: Path, change: Change, stores: Mapping[str, int]) -> UserPolicyError:
    """Return the error for a name that KVM's code does not have: what the file means was never tried."""
    where = f"{path}:{stores.get(change.name, 1)}"
    home = home_of(change.name)
    if home is not None:
        return UserPolicyError(
            where, f"sets {change}, which does not exist", f"{home.__name__}.{change.name}"
        )
    guess = did_you_mean(change.name, vars(change.namespace))
    return UserPolicyError(where, f"sets {change}, which does not exist", f"a name that KVM has{guess}")


def _load(path: Path, code: CodeType, lines: Mapping[str, int], names: Mapping[str, object]) -> Loaded:
    module = ModuleType(f"flushlab policy {path}")
    vars(module).update(names)
    module.__file__ = str(path)
    vars(module)["__builtins__"] = builtins  # not a dictionary of them, as exec would do
    place = Place(str(path), seconds=_LOADING)
    with FormerNames():
        through(place, exec, code, module.__dict__)
    return through(place, _inspected, path, module, lines)


def _inspected(path: Path, module: ModuleType, lines: Mapping[str, int]) -> Loaded:
    cls = _policy_class(path, module, lines)
    called = class_name(cls)
    defined, at = _defined(cls, lines)
    base = _base(path, cls, called, at)
    for name, value in defined.items():
        _check_name(f"{path}:{at[name]}: {called}.{name}", name, value)
    points = tuple(point for point in POINTS if point.name in defined)
    moments = tuple(name for name in MOMENTS if name in defined)
    if not points and not moments:
        raise UserPolicyError(
            f"{path}:{lines.get(called, 1)}", f"{called} decides nothing", f"a method of {', '.join(BY_NAME)}"
        )
    return Loaded(module, cls, _name(path, cls, called, at), called, base, points, moments, at)


def _parse(path: Path) -> tuple[ast.Module, CodeType]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
        return tree, compile(tree, str(path), "exec")
    except OSError as error:
        raise UserPolicyError(str(path), error.strerror or str(error), "a readable Python file") from error
    except SyntaxError as error:
        raise UserPolicyError(
            f"{path}:{error.lineno or 1}", f"{type(error).__name__}: {error.msg}"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserPolicyError(str(path), str(error) or type(error).__name__, "a Python file") from error


def _import_ours(tree: ast.Module) -> None:
    """Import the emulator's modules that the file names, so that its changes in them are detected."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    for name in sorted(names):
        if name.partition(".")[0] in _OURS:
            with suppress(ImportError):
                importlib.import_module(name)


def _lines(tree: ast.Module) -> dict[str, int]:
    """Return the lines of classes and of their definitions, by `Class` and `Class.name`."""
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            lines[node.name] = node.lineno
            lines.update((f"{node.name}.{name}", line) for name, line in _names(node))
    return lines


def _names(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inner.name, inner.lineno
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            yield inner.id, inner.lineno


def _stores(tree: ast.Module) -> dict[str, int]:
    """Return the lines at which attributes of other objects are assigned, by name."""
    return {
        node.attr: node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
    }


# --- looking at the class -----------------------------------------------------------------------------------


def _policy_class(path: Path, module: ModuleType, lines: Mapping[str, int]) -> type[Policy]:
    """Return the file's policy class; of several that derive from each other, the most derived."""
    found: list[type[Policy]] = [
        value
        for value in dict.fromkeys(v for v in module.__dict__.values() if issubclass(type(v), type))
        if issubclass(value, Policy) and value.__module__ == module.__name__
    ]
    last = [cls for cls in found if not any(cls in other.__mro__[1:] for other in found)]
    if len(last) == 1:
        return last[0]
    if not found:
        raise UserPolicyError(str(path), "no policy", _ONE_CLASS)
    names = " and ".join(f"{class_name(cls)} (line {lines.get(class_name(cls), 1)})" for cls in last)
    raise UserPolicyError(str(path), f"{len(last)} policies, {names}", _ONE_CLASS)


def _defined(cls: type[Policy], lines: Mapping[str, int]) -> tuple[dict[str, object], dict[str, int]]:
    """Return the definitions of the class and of its bases in the file, and their lines."""
    defined: dict[str, object] = {}
    at: dict[str, int] = {}
    for one in cls.__mro__:
        if one not in Policy.__mro__:
            names = {name: value for name, value in vars(one).items() if type(name) is str}
            defined = {**names, **defined}
            at = {**{name: lines.get(f"{class_name(one)}.{name}", 1) for name in names}, **at}
    return defined, at


def _base(path: Path, cls: type[Policy], called: str, at: Mapping[str, int]) -> Policy:
    found: object = getattr(cls, "base", DEFAULT)
    file, key = f"{path}:{at.get('base', 1)}", f"{called}.base"
    name = exact(found)
    if name is None:
        raise UserPolicyError(f"{file}: {key}", shown(found), "the name of a preset")
    try:
        return preset(name, key)
    except PolicyError as error:
        raise UserPolicyError(file, str(error)) from error


def _name(path: Path, cls: type[Policy], called: str, at: Mapping[str, int]) -> str:
    """Return the policy's name in verdicts, which must not be another policy's name."""
    found: object = getattr(cls, "name", None)
    where = f"{path}:{at.get('name', 1)}: {called}.name"
    if found is None:
        return path.name if _is_taken(path.stem) else path.stem
    name = exact(found)
    if name is None or not name.strip() or not name.isprintable():
        raise UserPolicyError(where, shown(found), "a name in one line")
    if _is_taken(name):
        raise UserPolicyError(where, f"{name} is another policy", "a name of its own")
    return name


def _is_taken(name: str) -> bool:
    with suppress(PolicyError):
        preset(name)
        return True
    return False


def _check_name(where: str, name: str, value: object) -> None:
    if name in BY_NAME:
        _check_signature(where, name, value, tuple(inspect.signature(getattr(Policy, name)).parameters))
    elif name in MOMENTS:
        _check_signature(where, name, value, MOMENTS[name])
    elif name in _RESERVED:
        raise UserPolicyError(where, "this name is taken", "another one")
    elif inspect.isfunction(value) and not name.startswith("_"):
        close = get_close_matches(name, [*BY_NAME, *MOMENTS], n=1, cutoff=_TYPO)
        if close:
            expected = f"{close[0]}, or a name that starts with _ for a helper"
            raise UserPolicyError(where, "no such decision point or moment", expected)


def _check_signature(where: str, name: str, value: object, wanted: tuple[str, ...]) -> None:
    expected = f"a method {name}({', '.join(wanted)})"
    if not inspect.isfunction(value):
        raise UserPolicyError(where, shown(value), expected)
    found = inspect.signature(value)
    try:
        found.bind(*wanted)
    except TypeError as error:
        raise UserPolicyError(where, f"{name}{_plain(found)}", expected) from error


def _plain(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"
