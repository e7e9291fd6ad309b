"""Build a kernel's TDP MMU for a command that runs it in the place of the model's."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emulator.kernel_tree.build import Built
    from emulator.litmus.model import LitmusTest


def built_tree(top: Path) -> Built:
    """Return the tree's object for the machine; print the compiler's words if it does not build."""
    from emulator.kernel_tree.build import DoesNotBuild, Use, build

    try:
        return build(top, Use.MACHINE)
    except DoesNotBuild as error:
        for line in error.details[:-1]:
            print(line, file=sys.stderr)
        raise


@dataclass(frozen=True, slots=True)
class OnTree:
    """A command's tree, the tests that can run on it, and the policies that decide the rest."""

    object: Built
    tests: list[LitmusTest]
    policies: list[str]

    @classmethod
    def built(cls, top: Path, tests: Sequence[LitmusTest], policies: list[str], *, named: bool) -> OnTree:
        """Build the tree.  Raises BadInput for what the tree does not have, or decides itself."""
        from emulator.kernel_tree.execute import policy_for
        from emulator.kernel_tree.on_machine.points import check_policy_for_tree
        from emulator.kernel_tree.on_machine.suite import fitting_tests
        from emulator.litmus.policies import named_policy

        fitting = fitting_tests(tests, named=named)
        for name in policies:
            check_policy_for_tree(named_policy(name))
        built = built_tree(top)
        return cls(built, fitting, policies or [policy_for(built.version)])

    def work(self) -> Callable[..., Any]:
        """Return the function that runs a task of a suite."""
        from emulator.kernel_tree.on_machine.suite import run_on_tree

        return partial(run_on_tree, self.object)

    def document(self) -> dict[str, str]:
        return {"tree": str(self.object.top), "version": self.object.version}

    def heading(self, chosen: Sequence[str]) -> str:
        """Return which code runs, and if policies were chosen, what they do not decide, in 80 columns."""
        from emulator.kernel_tree.on_machine.points import OWN_POINTS

        built = self.object
        how = "from the cache" if built.cached else f"{built.harvested} lines of declarations harvested"
        text = f"Linux {built.version} has the TDP MMU ({how})"
        if chosen:
            text += f", and decides {', '.join(OWN_POINTS)}; {', '.join(chosen)} decides the rest"
        return "\n".join([*textwrap.wrap(text, 80, break_on_hyphens=False), ""])
