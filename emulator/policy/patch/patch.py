"""A patch of KVM's code as users name it: a diff, a directory of diffs, or a series file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from emulator.errors import BadInput, shown
from emulator.policy.confine import Change, Confinement, State
from emulator.policy.imports import is_patchable
from emulator.policy.patch.apply import applied
from emulator.policy.patch.code import SHIPPED, Code, imported, load_shipped, patched_code
from emulator.policy.patch.diff import Diff, PatchError, parse_diff
from emulator.policy.patch.rebinding import Rebinding

SUFFIXES: Final = (".patch", ".diff")
SERIES: Final = "series"
# Bytes of a patch file at most: all of emulator/kvm is a twentieth of it.
_MOST: Final = 4 << 20


# Patch files in their order: the name and the bytes of each.
Parts = tuple[tuple[str, bytes], ...]


def is_patch(text: str) -> bool:
    """Return whether a policy's name names patches, by its spelling alone."""
    return text.endswith((*SUFFIXES, "/", "/" + SERIES)) or text == SERIES


@dataclass(frozen=True)
class KvmPatch:
    """Patches of emulator/kvm in their order.

    name: as in verdicts.  parts: the name and the bytes of each patch file.  mutants: the names of those that
    are known to be wrong.  base: the policy that they name in a line `Flushlab-Base: POLICY`.
    """

    name: str
    parts: Parts
    mutants: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """Return the parts of users as texts, for recordings: a mutant's name tells its patch."""
        return tuple((name, data.decode()) for name, data in self.parts[len(self.mutants) :])

    @property
    def is_shipped(self) -> bool:
        """Return whether all of it is a mutant, which is trusted as KVM's shipped code is."""
        return len(self.mutants) == len(self.parts)

    @cached_property
    def base(self) -> str | None:
        named = {one.base: one.name for one in self._diffs if one.base is not None}
        if len(named) > 1:
            found = " and ".join(f"{shown(base)} in {name}" for base, name in named.items())
            raise PatchError(f"{self.name}: Flushlab-Base", found, "one policy")
        return next(iter(named), None)

    @cached_property
    def _diffs(self) -> tuple[Diff, ...]:
        return tuple(parse_diff(name, data) for name, data in self.parts)

    @cached_property
    def sources(self) -> dict[str, str | None]:
        """Return the texts of the files that the patches change, by path within emulator/kvm; None: removed.

        Raises PatchError if a patch does not apply.
        """
        changed: dict[str, str | None] = {}
        shipped = SHIPPED.sources
        for diff in self._diffs:
            for one in diff.files:
                before = changed[one.path] if one.path in changed else shipped.get(one.path)
                changed[one.path] = applied(diff.name, one, before)
        return {path: text for path, text in changed.items() if text != shipped.get(path)}

    def together(self, other: KvmPatch) -> KvmPatch:
        """Return both patches as one, `other` on top of this one."""
        return KvmPatch(
            f"{self.name}+{other.name}", (*self.parts, *other.parts), (*self.mutants, *other.mutants)
        )

    @cached_property
    def code(self) -> Code:
        """Return the compiled code; raises PatchError."""
        return patched_code(self.name, self.sources, users=not self.is_shipped)

    def check(self) -> None:
        """Raise PatchError unless the patch applies, compiles and can be imported."""
        with self.live():
            pass

    def live(self) -> AbstractContextManager[None]:
        """Make the patched code KVM's, everywhere in this process, until the context ends.

        Each context has modules of its own, so nothing that they remember outlives it.  Raises PatchError if
        the code cannot be imported; a user's also if it raises an error in the context, or changes other
        modules.
        """
        return self._trusted() if self.is_shipped else self._confined()

    @contextmanager
    def _trusted(self) -> Iterator[None]:
        shipped = load_shipped()
        rebinding = Rebinding(self.name, shipped, imported(self.code), self.code.changed)
        try:
            rebinding.apply()
            yield
        finally:
            rebinding.undo()

    @contextmanager
    def _confined(self) -> Iterator[None]:
        code = self.code
        with Confinement.entered():
            shipped = load_shipped()
            before = State()
            try:
                modules = imported(code)
                self._check(before.changes())
            finally:
                before.put_back()
            before.forget_new_modules()
        rebinding = Rebinding(self.name, shipped, modules, code.changed)
        rebinding.check()
        # KVM's code runs all the time: no call of it has to return soon.
        with Confinement.entered(watch=False):
            try:
                rebinding.apply()
                yield
            except Exception as error:
                blamed = self.blamed(error)
                if blamed is None:
                    raise
                raise blamed from error
            finally:
                rebinding.undo()
                # Also after an error: the changes may be its cause.
                for name in before.put_back():
                    raise self._refused(name)

    def blamed(self, error: BaseException) -> PatchError | None:
        """Return the error in the user's words, if it is one that the patched code has raised."""
        seen: BaseException | None = error
        while seen is not None and not isinstance(seen, BadInput):
            if not isinstance(seen, AssertionError) and not _is_ours(type(seen)):
                found = self.code.blamed(seen)
                if found is not None:
                    return found
            seen = seen.__cause__
        return None

    def _check(self, changes: list[Change]) -> None:
        for change in changes:
            raise self._refused(str(change))

    def _refused(self, name: str) -> PatchError:
        return PatchError(self.name, f"changes {name}", "changes of emulator.kvm only")


def _is_ours(cls: type) -> bool:
    """Return whether an error's class is the emulator's, which has its own words for it, and not KVM's."""
    return cls.__module__.partition(".")[0] in ("emulator", "native") and not is_patchable(cls.__module__)


def read_patch(text: str) -> KvmPatch:
    """Read the patches that are named so; raises PatchError."""
    path = Path(text)
    name = path.name or text
    if path.name == SERIES and not path.is_dir():
        files = list(_series(path))
    elif text.endswith("/") or path.is_dir():
        files = _in_directory(path)
        name += "/"
    else:
        files = [path]
    return KvmPatch(name, tuple((str(file), _bytes(file)) for file in files))


def _in_directory(path: Path) -> list[Path]:
    """Return the patches of a directory: in the order of its series file, or of their names."""
    try:
        if (path / SERIES).is_file():
            return list(_series(path / SERIES))
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    except OSError as error:
        raise PatchError(str(path), error.strerror or str(error), "a directory of patches") from error
    if not files:
        raise PatchError(str(path), "no patch in it", f"files {' or '.join('*' + s for s in SUFFIXES)}")
    return files


def _series(path: Path) -> Iterator[Path]:
    """Yield the patches that a series file names, one a line, as quilt has them."""
    names = 0
    for number, line in enumerate(_bytes(path).decode(errors="replace").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 1 and words[1] != "-p1":
            raise PatchError(f"{path}:{number}", shown(line.strip()), "the name of a patch")
        names += 1
        yield path.parent / words[0]
    if not names:
        raise PatchError(str(path), "names no patch", "one a line")


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise PatchError(str(path), "no file" if not path.exists() else "no regular file", "a patch")
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
    except (OSError, ValueError) as error:
        raise PatchError(str(path), str(getattr(error, "strerror", None) or error), "a patch") from error
    if len(data) > _MOST:
        raise PatchError(str(path), "more than 4 MiB", "a patch of emulator/kvm")
    return data
