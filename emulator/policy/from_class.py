"""Make a policy of a class in the caller's own program, from its source and the names that it uses.

Each run executes a policy's source anew, so that it never sees the state of the run before.  The program of a
class cannot be executed anew: it is running, and has called the emulator.  So only the text of the class is
executed, in a module that begins with those objects of the program that the text names.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, Final

from emulator.policy.guard import UserPolicyError
from emulator.policy.policy import Policy
from emulator.policy.source import Source, source_of_code

_READABLE: Final = "a class in a file or in a notebook's cell, so that its text can be read"
# Annotations stay text, because they may name objects that only the class's module imports.
_FLAGS: Final = __future__.annotations.compiler_flag


def class_source(cls: type[Policy]) -> Source:
    """Return the source of a class, from which policies can be made; raises UserPolicyError."""
    name = cls.__name__
    try:
        file = inspect.getsourcefile(cls) or "<unknown>"
        lines, first = inspect.getsourcelines(cls)
    except (OSError, TypeError) as error:
        raise UserPolicyError(f"class {name}", f"found no text of it ({error})", _READABLE) from error
    path = Path(f"{Path(file).name}::{name}")
    tree = ast.parse(textwrap.dedent("".join(lines)), str(path))
    ast.increment_lineno(tree, max(first, 1) - 1)
    code = compile(tree, str(path), "exec", flags=_FLAGS, dont_inherit=True)
    return source_of_code(path, tree, code, _named_by(cls, tree))


def _named_by(cls: type[Policy], tree: ast.Module) -> dict[str, Any]:
    """Return the objects of the class's module, and of the functions around it, that its text names."""
    known = dict(vars(sys.modules[cls.__module__])) if cls.__module__ in sys.modules else {}
    own = ("__class__", cls.__name__)
    for function in filter(inspect.isfunction, vars(cls).values()):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        known.update((name, cell.cell_contents) for name, cell in cells if name not in own)
    known |= {base.__name__: base for base in cls.__bases__ if base.__name__ not in known}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {name: known[name] for name in sorted(names & known.keys() - {cls.__name__})}
