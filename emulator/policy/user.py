"""A user's own policy: a Python file with one class that derives from `Policy`.

    from emulator.policy import Policy

    class Lazy(Policy):
        base = "linux-7.3"                      # super() answers as this preset; the default is linux-7.3

        def migration(self, cpu, vcpu):
            if len(vcpu.kvm.vcpus) == 1:
                return "none"
            return super().migration(cpu, vcpu)

Its methods are the decision points (`flushlab list points`, emulator.kvm.decisions); the base answers points
that the class does not define.  KVM's threads call the methods at the moment of the decision, several
at once, and one object serves all VMs, so a method's state is best kept per `cpu` or `vcpu`.  The file is
executed anew for each run, and for each execution of a litmus test.  A method that raises, that returns no
alternative of its point, or that does not return, ends the run with one line that says so.

KVM's code never calls the file's object directly: it asks a `UserPolicy`, which asks that object through the
door (emulator.policy.guard).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from emulator.policy.acting import is_simple
from emulator.policy.confine import NO_PATCHES, Confinement
from emulator.policy.from_class import class_source
from emulator.policy.guard import Place, UserPolicyError, came_through, exact, failed, shown, through
from emulator.policy.patch import KvmPatch, Parts, read_patch
from emulator.policy.point import DONE, DecisionPoint
from emulator.policy.points import BY_NAME
from emulator.policy.policy import NAMED_BY, Policy, PolicyError, check_answer
from emulator.policy.presets import DEFAULT, preset
from emulator.policy.source import Source, read_source
from emulator.policy.spelling import parse_policy

__all__ = [
    "UserPolicyError",
    "base_of",
    "class_policy",
    "load_user_policy",
    "resolve_policy",
    "source_of",
    "spelled_policy",
]

# Processor seconds for making the object.
_MAKING = 10.0
_WITHOUT_ARGUMENTS = "a class that is made without arguments"


def resolve_policy(text: str) -> Policy:
    """Return the policy that a command line names: a preset, `mutant:NAME`, or a user's file (.py)."""
    if text.endswith(".py"):
        return load_user_policy(Path(text))
    return preset(text)


def spelled_policy(text: str, name: str | None = None, parts: Parts = ()) -> Policy:
    """Return the policy that `text` spells (emulator.policy.spelling), called `name`.

    parts: the patches, in place of the files that are named in the text.
    """
    base, answers, patches = parse_policy(text)
    policy = _patched(base, patches, parts, name) if patches else resolve_policy(base)
    return policy.with_settings(answers, name) if answers else policy


def base_of(text: str) -> str:
    """Return the name of the preset or mutant on which the policy that `text` spells is built.

    Raises PolicyError or UserPolicyError if the text, or a file that it names, is wrong.
    """
    base, _, patches = parse_policy(text)
    if base.endswith(".py"):
        return read_source(Path(base)).loaded.base.name
    return base or (_read(patches).base or DEFAULT)


def _patched(base: str, paths: tuple[str, ...], parts: Parts, name: str | None) -> Policy:
    patch = KvmPatch("+".join(Path(path).name for path in paths), parts) if parts else _read(paths)
    below = base or patch.base or DEFAULT
    where = NAMED_BY if base else f"{patch.name}: Flushlab-Base"
    policy = load_user_policy(Path(below)) if below.endswith(".py") else preset(below, where)
    if source_of(policy) is not None:
        found = f"found {below} below a patch: a file's class and a patch are not combined"
        raise PolicyError(where, found, "a preset or a mutant, or one of the two alone")
    names = "+".join([base] * bool(base) + [patch.name])
    patched = policy.patched(patch, "+".join([below, *paths]), name or names)
    assert patched.patch is not None
    patched.patch.check()
    return patched


def _read(paths: tuple[str, ...]) -> KvmPatch:
    patch: KvmPatch | None = None
    for path in paths:
        first, plus, _ = path.partition("+")
        if plus and not Path(path).exists():
            preset(first)  # raises the error of a base that does not exist
        one = read_patch(path)
        patch = one if patch is None else patch.together(one)
    assert patch is not None
    return patch


def load_user_policy(path: Path) -> Policy:
    """Load the policy that a file defines; raises UserPolicyError."""
    source = read_source(path)
    with Confinement.patched(NO_PATCHES, source.refused):
        return _made(source, {})


def class_policy(cls: type[Policy]) -> Policy:
    """Return the policy that a class of the caller's program defines, under its own name; raises
    UserPolicyError."""
    source = class_source(cls)
    named = getattr(source.loaded.cls, "name", None) is not None
    with Confinement.patched(NO_PATCHES, source.refused):
        return _made(source, {}, source.loaded.name if named else source.loaded.called)


class UserPolicy(Policy):
    """A policy that asks the file's object, and counts and checks its answers.

    `_mine` is that object.  `_given` counts answers by (alternative, CPU), so that each thread has its own.
    """

    def __init__(self, source: Source, settings: Mapping[str, str], name: str | None) -> None:
        super().__init__(name or source.loaded.name)
        self._source = source
        self._settings = dict(settings)
        self._given: dict[str, dict[tuple[str, int], int]] = {
            point.name: {} for point in source.loaded.points if point.name not in settings
        }
        self._places = {name: source.place(name, _one_of(BY_NAME[name])) for name in self._given}
        self._places |= {name: source.place(name) for name in source.loaded.moments}
        self._mine: Any = None

    def adopt(self, mine: Any) -> None:
        """Answer points that the object's class does not decide by the object's table, as super() does."""
        own = object.__getattribute__(mine, "__dict__")
        base = self._source.loaded.base
        answers = base.answers()
        for point, given in own["_answers"].items():
            answer = exact(given)
            if point not in BY_NAME or answer not in BY_NAME[point].names():
                place = self._source.place("__init__")
                raise UserPolicyError(
                    place.at(), f"answers {shown(point)} with {shown(given)}", "one of its own"
                )
            if answer != BY_NAME[point].default:
                answers[point] = answer
        self._answers = {**answers, **self._settings}
        self.patch = base.patch
        own.update(
            name=self.name,
            patch=self.patch,
            _answers=dict(self._answers),
            _parts=self._parts,
            _acts=self._acts,
        )
        self._mine = mine

    def _acting(self) -> Policy:
        return self._mine  # type: ignore[no-any-return]

    def _engage(self) -> None:
        through(self._source.place("__init__"), super()._engage)

    def with_settings(self, settings: Mapping[str, str], name: str | None = None) -> Policy:
        for point, alternative in settings.items():
            check_answer(point, alternative)
        if name is None:
            name = "+".join([self.name, *(f"{point}={settings[point]}" for point in sorted(settings))])
        return _made(self._source, {**self._settings, **settings}, name)

    def may_answer(self, point: str, *alternatives: str) -> bool:
        return point in self._given or super().may_answer(point, *alternatives)

    def _as_proposed(self, answer: str, point: DecisionPoint) -> Callable[..., str]:
        """Return the proposal's method, if the table names the proposal or if the proposal is simple."""
        part = self._parts.get(answer)
        if part is None:
            where = self._places[point.name].at()
            found = f"returned {answer!r}, a proposal that keeps state or hears moments"
            raise UserPolicyError(where, found, "super()'s answer, with a base that is this proposal")
        return getattr(part, point.name)  # type: ignore[no-any-return]

    def _wanted(self) -> set[str]:
        simple = {name for point in self._given for name in BY_NAME[point].proposals() if is_simple(name)}
        return super()._wanted() | simple

    def fresh(self) -> Policy:
        return _made(self._source.again(), self._settings, self.name)

    def module(self) -> ModuleType | None:
        return self._source.loaded.module

    @contextmanager
    def confined(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.patch is not None:
                stack.enter_context(self.patch.live())
                # Execute the file once more: what it imports and changes is the patched code now.
                made = _made(self._source.again(), self._settings, self.name)
                assert isinstance(made, UserPolicy)
                self._source, self._mine = made._source, made._mine
            stack.enter_context(Confinement.patched(self._source.patches, self._source.refused))
            yield

    @contextmanager
    def guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not came_through(error, self._source.path):
                raise
            failure = failed(Place(self._source.path, self._source.line("__init__")), error)
        else:
            return
        raise failure

    def spelled(self) -> str:
        settings = (f"{point}={self._settings[point]}" for point in sorted(self._settings))
        return "+".join([self._source.path, *settings])

    def overrides(self) -> dict[str, str]:
        path = Path(self._source.path).name
        defined = [*(p for p in BY_NAME if p in self._given), *self._source.loaded.moments]
        return {name: f"{path}:{self._source.line(name)}" for name in defined}

    def given(self) -> dict[str, dict[str, int]]:
        return {point: self._sum(point) for point in BY_NAME if point in self._given}

    def _sum(self, point: str) -> dict[str, int]:
        given = dict(self._given[point])
        names = BY_NAME[point].answers()
        sums = {name: sum(n for (a, _), n in given.items() if a == name) for name in names}
        return {name: n for name, n in sums.items() if n}

    def mutants(self) -> tuple[str, ...]:
        """Return the errors of the table, and the wrong answers that the class has given."""
        table = [wrong for wrong in super().mutants() if wrong.partition("=")[0] not in self._given]
        case_by_case = [
            f"{point}={alternative} ({self.overrides()[point]})"
            for point, sums in self.given().items()
            for alternative in sums
            if alternative != DONE and BY_NAME[point].alternative(alternative).mutant
        ]
        return (*table, *case_by_case)


def source_of(policy: Policy) -> Source | None:
    """Return the source of a user's policy; None for any other policy."""
    return policy._source if isinstance(policy, UserPolicy) else None


def _made(source: Source, settings: Mapping[str, str], name: str | None = None) -> Policy:
    """Make a policy with a new object of the file's class.

    `settings` are the command line's, and take precedence over the class at their points.
    """
    points = frozenset(point.name for point in source.loaded.points if point.name not in settings)
    policy = _class(points, source.loaded.moments)(source, settings, name)
    with Confinement.entered():
        place = source.place("__init__", _WITHOUT_ARGUMENTS, _MAKING)
        policy.adopt(through(place, _new, source, settings))
    return policy


def _new(source: Source, settings: Mapping[str, str]) -> Any:
    cls = source.loaded.cls
    fixed = {point.name: _fixed(point.name) for point in source.loaded.points if point.name in settings}
    if fixed:
        cls = type(source.loaded.called, (cls,), {"__module__": source.loaded.module.__name__, **fixed})
    made = cls()
    names = object.__getattribute__(made, "__dict__") if issubclass(type(made), Policy) else {}
    if type(names.get("_answers")) is not dict:
        where = source.place("__init__").at()
        raise UserPolicyError(where, "Policy is not initialized", "a call of super().__init__()")
    return made


@lru_cache(maxsize=64)
def _class(points: frozenset[str], moments: tuple[str, ...]) -> type[UserPolicy]:
    asked = {point: _asked(BY_NAME[point]) for point in points}
    return type("UserPolicy", (UserPolicy,), asked | {moment: _told(moment) for moment in moments})


def _fixed(point: str) -> Callable[..., str]:
    def answer(self: Any, *_: object) -> str:
        return self._answers[point]  # type: ignore[no-any-return]

    return answer


def _asked(point: DecisionPoint) -> Callable[..., str]:
    """Wrap the user's method, with a clear error for each way in which it can fail."""
    name, names = point.name, frozenset(point.answers())

    proposals = frozenset(point.proposals())

    def ask(self: UserPolicy, cpu: Any, *arguments: Any) -> str:
        # The method may have state, and calls on other CPUs may come in between.
        cpu.point("policy", self._source.path, "write")
        answer: Any = through(self._places[name], _ask, self._mine, name, cpu, *arguments)
        cpu.point("policy answers", self._source.path, "write")
        if type(answer) is not str:
            answer = _checked(self, point, answer)
        if answer not in names:
            found = f"returned {answer!r:.80}"
            raise UserPolicyError(self._places[name].at(), found, _one_of(point, answer))
        given = self._given[name]
        key = (answer, cpu.id)
        given[key] = given.get(key, 0) + 1
        if answer in proposals:
            return self._as_proposed(answer, point)(cpu, *arguments)
        return answer  # type: ignore[no-any-return]

    return ask


def _told(moment: str) -> Callable[..., bool]:
    """Wrap the user's method for a moment."""

    def tell(self: UserPolicy, cpu: Any, *arguments: Any) -> bool:
        cpu.point("policy", self._source.path, "write")
        found = through(self._places[moment], _ask, self._mine, moment, cpu, *arguments)
        cpu.point("policy answers", self._source.path, "write")
        return found is True

    return tell


def _ask(mine: Any, name: str, cpu: Any, *arguments: Any) -> object:
    return getattr(mine, name)(cpu, *arguments)


def _checked(policy: UserPolicy, point: DecisionPoint, answer: object) -> str:
    """Return the string that an object of a class derived from str holds; raise an error for others."""
    text = exact(answer)
    if text is None:
        where = policy._places[point.name].at()
        raise UserPolicyError(where, f"returned {shown(answer)}", _one_of(point))
    return text


def _one_of(point: DecisionPoint, found: str = "") -> str:
    close = get_close_matches(found[:80], point.answers(), n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"one of {', '.join(point.answers())}{guess}"
