"""The file in which a search keeps its state, so that another process goes on with it.

The first line names everything on which the search's result depends, and has the digest of the rest, which
is the state.  A file is replaced in one step, so a process that is killed leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import emulator
import native
from emulator import __version__
from emulator.errors import BadInput, shown
from emulator.litmus.model import LitmusTest
from emulator.output import write_file
from emulator.policy.spelling import digests
from emulator.validation import read_bytes

if TYPE_CHECKING:
    from emulator.explore.results.verdict import Plan

OPTION: Final = "--state"
FORMAT: Final = 1
_MOST: Final = 1 << 30
_EXPECTED: Final = "a search's state, as --state writes it"
_ELSE: Final = "or another directory, or remove the file"
# Data of the package on which a search depends, beside its modules.
_CODE: Final = frozenset({".py", ".patch", ".so"})


def key_of(test: LitmusTest, policy: str, plan: Plan) -> dict[str, Any]:
    """Return everything on which the result of a search depends.  policy: as the user spells it."""
    key = {
        "flushlab": __version__,
        "code": _code(),
        "test": test.name,
        "text": _digest(test.text.encode()),
        "policy": policy,
        "files": digests(policy),
    }
    return {**key, **asdict(plan)}


class SearchFile:
    """The file of one search in a directory.  state: the state that `load` has found; {} without a file."""

    def __init__(self, directory: Path, test: LitmusTest, policy: str, plan: Plan) -> None:
        self.key = key_of(test, policy, plan)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{test.name}-{policy}")[:150]
        # Two policies may differ in characters that a file's name cannot have.
        self.path = directory / f"{name}-{_digest(json.dumps([test.name, policy]).encode())[:8]}.search"
        self.state: dict[str, Any] = {}

    def load(self) -> SearchFile:
        """Read the state.  Raises BadInput for a file of another search, and one that is damaged."""
        if not self.path.exists():
            return self
        where = f"{OPTION} {self.path}"
        head, _, body = read_bytes(self.path, _EXPECTED, _MOST).partition(b"\n")
        try:
            header = json.loads(head)
        except ValueError as error:
            raise BadInput(where, "found no JSON in its first line", _EXPECTED) from error
        if not isinstance(header, dict) or header.get("flushlab_search") != FORMAT:
            version = header.get("flushlab_search") if isinstance(header, dict) else None
            raise BadInput(where, f"found format {shown(version)}", f"{FORMAT}, {_ELSE}")
        self._check(where, header.get("key"))
        if header.get("sha256") != _digest(body):
            raise BadInput(where, "found a state that is damaged", f"{_EXPECTED}, {_ELSE}")
        self.state = json.loads(body)
        return self

    def _check(self, where: str, found: object) -> None:
        found = found if isinstance(found, dict) else {}
        for name, ours in json.loads(json.dumps(self.key)).items():
            theirs = found.get(name)
            if theirs != ours:
                of = f"a search of other {name}" if name in ("code", "text", "files") else ""
                said = of or f"a search with {name} {shown(theirs)}"
                expected = "the present one" if of else shown(ours)
                raise BadInput(where, f"found {said}", f"{expected}, {_ELSE}")

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file.  Raises Unwritable."""
        body = json.dumps(state, separators=(",", ":"))
        header = {"flushlab_search": FORMAT, "key": self.key, "sha256": _digest(body.encode())}
        write_file(OPTION, self.path, f"{json.dumps(header)}\n{body}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=1)
def _code() -> str:
    """Return the digest of flushlab's own code: a model that was edited since is another one."""
    found = hashlib.sha256()
    for package in (emulator, native):
        top = Path(str(package.__file__)).parent
        for path in sorted(path for path in top.rglob("*") if path.suffix in _CODE):
            found.update(f"{path.relative_to(top)}\0".encode())
            found.update(path.read_bytes())
    return found.hexdigest()
