"""Runs sequences on both sides, and reduces one on which they differ to the operations that matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from emulator.kernel_tree.argued import without_argued
from emulator.kernel_tree.model_side import ModelSide
from emulator.kernel_tree.operations import Operation, Sequence, random_sequence
from emulator.kernel_tree.sides import Kind, Outcome
from emulator.kernel_tree.tree_side import TreeSide
from emulator.policy import Policy

# Runs of shortened sequences for one difference; each takes some hundredths of a second.
_MOST_TRIALS: Final = 400


@dataclass(frozen=True, slots=True)
class Difference:
    """The last operation of a sequence, on which the sides differ, with both outcomes.  seed: of the
    sequence."""

    seed: int
    sequence: Sequence
    model: Outcome
    tree: Outcome

    @property
    def operation(self) -> Operation:
        return self.sequence.operations[-1]

    @property
    def aspects(self) -> tuple[str, ...]:
        """Return which parts of the outcomes differ."""
        model, tree = self.model, self.tree
        found = []
        if tree.complaints != model.complaints:
            found.append("complaints")
        if tree.returned != model.returned:
            found.append("returned")
        if [str(one) for one in tree.events] != [str(one) for one in model.events]:
            found.append("events")
        elif tree.events != model.events:
            found.append("order")
        if tree.state != model.state:
            found.append("state")
        if tree.tables != model.tables:
            found.append("tables")
        return tuple(found)

    @property
    def signature(self) -> tuple[str, ...]:
        """Return a key that differences of one cause are likely to share."""
        return (self.operation.name, *self.aspects)


@dataclass(slots=True)
class Comparison:
    """Both sides: the model under a policy, and a built tree.  Counts operations and events."""

    path: Path
    policy: Policy
    operations: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    others: int = 0
    # Differences that are known and have no effect, by their reasons.
    argued: Counter[str] = field(default_factory=Counter)
    # Called with each operation before it runs: the process may not survive it.
    before: Callable[[Operation], None] | None = None
    _models: dict[bool, ModelSide] = field(default_factory=dict)
    _tree: TreeSide | None = None

    def run(self, seed: int, sequence: Sequence) -> Difference | None:
        """Run a sequence until the sides differ; return the difference, with the sequence up to it."""
        model = self._model(ad_bits=sequence.ad_bits)
        if self._tree is None:
            self._tree = TreeSide(self.path, model.pfns, age_locked=model.age_locked)
        tree = self._tree
        tree.pfns = model.pfns
        tree.start(ad_bits=sequence.ad_bits)
        for at, operation in enumerate(sequence.operations):
            if self.before is not None:
                self.before(operation)
            ours, theirs = model.run(operation), tree.run(operation)
            self.operations[operation.name] += 1
            self.others += operation.point is not None and operation.point.other is not None
            self.events.update(one.kind.name for one in theirs.events)
            if ours != theirs:
                theirs, reasons = without_argued(self.policy.name, ours, theirs)
                self.argued.update(reasons)
            if ours != theirs:
                until = Sequence(sequence.ad_bits, sequence.operations[: at + 1])
                # The model's tables are in doubt from here on.
                self._models.pop(sequence.ad_bits).close()
                return Difference(seed, until, ours, theirs)
        return None

    def _model(self, *, ad_bits: bool) -> ModelSide:
        if ad_bits not in self._models:
            self._models[ad_bits] = ModelSide(self.policy, ad_bits=ad_bits)
        model = self._models[ad_bits]
        model.start()
        return model

    def counted(self) -> tuple[Counter[str], Counter[str], Counter[str], int]:
        """Return the counts so far, for `restore`."""
        return self.operations.copy(), self.events.copy(), self.argued.copy(), self.others

    def restore(self, counted: tuple[Counter[str], Counter[str], Counter[str], int]) -> None:
        self.operations, self.events, self.argued, self.others = counted

    def minimized(self, difference: Difference) -> Difference:
        """Return the difference with as few operations before it as are needed for the same aspects."""
        best = difference
        trials = 0
        size = max(1, len(best.sequence.operations) // 2)
        while size and trials < _MOST_TRIALS:
            shorter = None
            for first in range(0, len(best.sequence.operations) - 1, size):
                trials += 1
                shorter = self._without(best, first, size)
                if shorter is not None:
                    break
            if shorter is None:
                size //= 2
            else:
                best = shorter
        return self._without_point(best)

    def _without(self, difference: Difference, first: int, size: int) -> Difference | None:
        operations = difference.sequence.operations
        kept = (*operations[:first], *operations[min(first + size, len(operations) - 1) :])
        return self._again(difference, kept)

    def _without_point(self, difference: Difference) -> Difference:
        """Take away the moments inside of operations that are not needed for the difference."""
        for at, operation in enumerate(difference.sequence.operations):
            if operation.point is not None:
                plain = Operation(operation.name, operation.arguments)
                operations = difference.sequence.operations
                difference = (
                    self._again(difference, (*operations[:at], plain, *operations[at + 1 :])) or difference
                )
        return difference

    def _again(self, difference: Difference, operations: tuple[Operation, ...]) -> Difference | None:
        found = self.run(difference.seed, Sequence(difference.sequence.ad_bits, operations))
        if found is None or found.signature != difference.signature:
            return None
        return found


def sequence_of(seed: int, length: int) -> Sequence:
    return random_sequence(seed, length)


def happened(comparison: Comparison) -> dict[str, int]:
    """Return how often the moments occurred without which a comparison proves little."""
    flushes = sum(comparison.events[kind.name] for kind in (Kind.FLUSH, Kind.FLUSH_RANGE, Kind.FLUSH_SLOT))
    return {
        "operations": comparison.operations.total(),
        "flushes": flushes,
        "yields": comparison.events[Kind.YIELD.name],
        "inside": comparison.others,
        "tables": comparison.events[Kind.CALL_RCU.name],
    }
