"""A user's own policy: a Python file with one class that derives from `Policy`.

    from emulator.policy import Policy

    class Lazy(Policy):
        base = "linux-7.3"                      # what super() answers; this one if not given

        def migration(self, cpu, vcpu):
            if len(vcpu.kvm.vcpus) == 1:
                return "none"
            return super().migration(cpu, vcpu)

Its methods are the decision points (`flushlab list points`, emulator.policy.policy.Policy): whatever the
class does not define, the base answers.  KVM's threads call them at the moment of the decision, several at
once, and one object serves all VMs, so what a method remembers is best kept per `cpu` or `vcpu`.  The file
is executed anew for each run, and for each execution of a litmus test.  A method that raises, or returns what
is no alternative of its point, ends the run with one line that says so.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from emulator.policy.points import BY_NAME, POINTS, DecisionPoint
from emulator.policy.policy import Policy, PolicyError, check_answer
from emulator.policy.presets import DEFAULT, preset
from emulator.policy.spelling import parse_policy
from emulator.runtime import MachineStopped

# A method whose name resembles a point's this much is a slip of the pen, not a helper.
_TYPO = 0.75
# A policy is asked through these; what they do is not for the user's class to change.
_RESERVED = (
    "answers", "fresh", "given", "mutants", "module", "overrides", "spelled", "with_settings",
)  # fmt: skip


class UserPolicyError(PolicyError):
    """What is wrong with a user's policy: file, line, method, what was found, what was expected."""


def resolve_policy(text: str) -> Policy:
    """What a command line may name: a preset, `mutant:NAME`, or the path of a user's policy (.py)."""
    if text.endswith(".py"):
        return load_user_policy(Path(text))
    return preset(text)


def spelled_policy(text: str, name: str | None = None) -> Policy:
    """The same, with other answers as emulator.policy.spelling has it; called `name`."""
    base, answers = parse_policy(text)
    policy = resolve_policy(base)
    return policy.with_settings(answers, name) if answers else policy


def load_user_policy(path: Path) -> Policy:
    """The policy that a file defines; raises UserPolicyError."""
    tree, code = _parse(path)
    lines = _lines(tree)
    module = _execute(path, code)
    cls = _policy_class(path, module, lines)
    source = Source(str(path), code, module, cls, lines, _base(path, cls, lines))
    if not _overridden(source):
        points = ", ".join(BY_NAME)
        raise UserPolicyError(
            f"{path}:{lines[cls.__name__]}", f"{cls.__name__} decides nothing", f"a method of {points}"
        )
    return source.make({})


@dataclass(frozen=True, slots=True)
class Source:
    """Where a user's policy comes from, and how to make another one like it."""

    path: str
    code: CodeType
    module: ModuleType
    cls: type[Policy]
    lines: Mapping[str, int]
    base: Policy

    def again(self) -> Source:
        """As if the file had been loaded just now, with the text that it had."""
        path = Path(self.path)
        module = _execute(path, self.code)
        return replace(self, module=module, cls=_policy_class(path, module, self.lines))

    def line(self, name: str) -> int:
        """Where the class, or a class of the file that it derives from, defines `name`."""
        for cls in self.cls.__mro__:
            if name in vars(cls):
                return self.lines.get(f"{cls.__name__}.{name}", 1)
        return self.lines[self.cls.__name__]

    def where(self, name: str, line: int | None = None) -> str:
        return f"{self.path}:{line or self.line(name)}: {self.cls.__name__}.{name}"

    def make(self, settings: Mapping[str, str], name: str | None = None) -> Policy:
        """A new object of the user's class with an empty memory, asked through checks.

        `settings` are the command line's: a point among them is not the class's to decide any more.
        """
        namespace: dict[str, Any] = {
            point.name: _fixed(point.name) if point.name in settings else _checked(self, point)
            for point in _overridden(self)
        }
        checked = type(self.cls.__name__, (_Asked, self.cls), namespace)
        try:
            policy: Any = checked()
        except Exception as error:
            where = self.where("__init__", _error_line(error, self.path))
            raise UserPolicyError(where, _told(error), "a class that is made without arguments") from error
        if not isinstance(getattr(policy, "_answers", None), dict):
            raise UserPolicyError(
                self.where("__init__"), "Policy is not initialized", "a call of super().__init__()"
            )
        own = {p: a for p, a in Policy.answers(policy).items() if a != BY_NAME[p].default}
        policy.name = name or getattr(self.cls, "name", None) or Path(self.path).stem
        policy.bugs |= self.base.bugs
        policy._answers = {**self.base.answers(), **own, **settings}
        policy._source, policy._settings = self, dict(settings)
        policy._given = {point: {} for point in namespace if point not in settings}
        return policy  # type: ignore[no-any-return]


class _Asked(Policy):
    """Stands before the user's class: counts and checks what its methods answer."""

    _source: Source
    _settings: dict[str, str]
    # Answers by (alternative, CPU): each CPU's thread counts for itself.
    _given: dict[str, dict[tuple[str, int], int]]

    def with_settings(self, settings: Mapping[str, str], name: str | None = None) -> Policy:
        for point, alternative in settings.items():
            check_answer(point, alternative)
        if name is None:
            name = "+".join([self.name, *(f"{point}={settings[point]}" for point in sorted(settings))])
        return self._source.make({**self._settings, **settings}, name)

    def fresh(self) -> Policy:
        return self._source.again().make(self._settings, self.name)

    def module(self) -> ModuleType | None:
        return self._source.module

    def spelled(self) -> str:
        settings = (f"{point}={self._settings[point]}" for point in sorted(self._settings))
        return "+".join([self._source.path, *settings])

    def overrides(self) -> dict[str, str]:
        path = Path(self._source.path).name
        return {p: f"{path}:{self._source.line(p)}" for p in BY_NAME if p in self._given}

    def given(self) -> dict[str, dict[str, int]]:
        return {point: self._sum(point) for point in BY_NAME if point in self._given}

    def _sum(self, point: str) -> dict[str, int]:
        given = dict(self._given[point])
        sums = {name: sum(n for (a, _), n in given.items() if a == name) for name in BY_NAME[point].names()}
        return {name: n for name, n in sums.items() if n}

    def mutants(self) -> tuple[str, ...]:
        """As of any policy; of the points that the class decides, what it did answer."""
        table = [wrong for wrong in super().mutants() if wrong.partition("=")[0] not in self._given]
        case_by_case = [
            f"{point}={alternative} ({self.overrides()[point]})"
            for point, sums in self.given().items()
            for alternative in sums
            if BY_NAME[point].alternative(alternative).mutant
        ]
        return (*table, *case_by_case)


def _fixed(point: str) -> Callable[..., str]:
    def answer(self: Any, *_: object) -> str:
        return self._answers[point]  # type: ignore[no-any-return]

    return answer


def _checked(source: Source, point: DecisionPoint) -> Callable[..., str]:
    """The user's method, with a clear error for whatever it does wrong."""
    method: Callable[..., object] = getattr(source.cls, point.name)
    names = frozenset(point.names())

    def ask(self: _Asked, cpu: Any, *arguments: Any) -> str:
        # Whatever it remembers, others may have been asked in between.
        cpu.point("policy", source.path, "write")
        try:
            answer = method(self, cpu, *arguments)
        except (MachineStopped, UserPolicyError):
            raise
        except (Exception, SystemExit) as error:
            where = source.where(point.name, _error_line(error, source.path))
            raise UserPolicyError(where, _told(error), _one_of(point, "")) from error
        cpu.point("policy answers", source.path, "write")
        if not isinstance(answer, str) or answer not in names:
            raise UserPolicyError(source.where(point.name), f"returned {answer!r}", _one_of(point, answer))
        given = self._given[point.name]
        key = (answer, cpu.id)
        given[key] = given.get(key, 0) + 1
        return answer

    return ask


# --- reading the file -----------------------------------------------------------------------------------


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
    except ValueError as error:
        raise UserPolicyError(str(path), str(error), "a Python file") from error


def _lines(tree: ast.Module) -> dict[str, int]:
    """Where classes start, and what they define: by `Class` and `Class.name`."""
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


def _execute(path: Path, code: CodeType) -> ModuleType:
    module = ModuleType(f"flushlab policy {path}")
    module.__file__ = str(path)
    vars(module)["__builtins__"] = builtins  # not a dictionary of them, as exec would do
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserPolicyError(f"{path}:{_error_line(error, str(path)) or 1}", _told(error)) from error
    return module


def _policy_class(path: Path, module: ModuleType, lines: Mapping[str, int]) -> type[Policy]:
    """The file's class; of several that derive from each other, the last."""
    found = [
        value
        for value in dict.fromkeys(v for v in module.__dict__.values() if isinstance(v, type))
        if issubclass(value, Policy) and value.__module__ == module.__name__
    ]
    last = [cls for cls in found if not any(cls in other.__mro__[1:] for other in found)]
    if len(last) == 1:
        return last[0]
    expected = "one class that derives from emulator.policy.Policy"
    if not found:
        raise UserPolicyError(str(path), "no policy", expected)
    names = " and ".join(f"{cls.__name__} (line {lines.get(cls.__name__, 1)})" for cls in last)
    raise UserPolicyError(str(path), f"{len(last)} policies, {names}", expected)


def _base(path: Path, cls: type[Policy], lines: Mapping[str, int]) -> Policy:
    name: object = getattr(cls, "base", DEFAULT)
    file, key = f"{path}:{lines.get(f'{cls.__name__}.base', 1)}", f"{cls.__name__}.base"
    if not isinstance(name, str):
        raise UserPolicyError(f"{file}: {key}", repr(name), "the name of a preset")
    try:
        return preset(name, key)
    except PolicyError as error:
        raise UserPolicyError(file, str(error)) from error


def _overridden(source: Source) -> tuple[DecisionPoint, ...]:
    """The points that the class decides; what else it defines is checked for slips of the pen."""
    defined: dict[str, object] = {}
    for cls in source.cls.__mro__:
        if cls not in Policy.__mro__:
            defined = {**vars(cls), **defined}
    for name, value in defined.items():
        _check_name(source, name, value)
    return tuple(point for point in POINTS if point.name in defined)


def _check_name(source: Source, name: str, value: object) -> None:
    if name in BY_NAME:
        _check_signature(source, name, value)
    elif name in _RESERVED:
        raise UserPolicyError(source.where(name), "this name is taken", "another one")
    elif inspect.isfunction(value) and not name.startswith("_"):
        close = get_close_matches(name, BY_NAME, n=1, cutoff=_TYPO)
        if close:
            expected = f"{close[0]}, or a name that starts with _ for a helper"
            raise UserPolicyError(source.where(name), "no such decision point", expected)


def _check_signature(source: Source, name: str, value: object) -> None:
    wanted = inspect.signature(getattr(Policy, name))
    expected = f"a method {name}{_plain(wanted)}"
    if not inspect.isfunction(value):
        raise UserPolicyError(source.where(name), f"{value!r:.60}", expected)
    found = inspect.signature(value)
    try:
        found.bind(*wanted.parameters)
    except TypeError as error:
        raise UserPolicyError(source.where(name), f"{name}{_plain(found)}", expected) from error


def _plain(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"


# --- saying where and what --------------------------------------------------------------------------------


def _error_line(error: BaseException, path: str) -> int | None:
    """The line of the user's file that the error came through last."""
    line = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _told(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_of(point: DecisionPoint, found: object) -> str:
    close = get_close_matches(found, point.names(), n=1) if isinstance(found, str) else []
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"one of {', '.join(point.names())}{guess}"
