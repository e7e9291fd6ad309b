"""Results that are kept, so that a change shows: one line of JSON per run, compared by machine.

Times differ from machine to machine, so a run is compared with the last one that was kept on a processor of
its own kind.  Ratios are compared, because each is taken against a reference in its own run.  A ratio has
changed if its median lies outside of the range of the earlier run's repeats, and the earlier median outside
of the range of the new run's.  Noise makes these ranges wide, so that it is not taken for a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.figures import Figure
from emulator.errors import BadInput


class KeptFigure(BaseModel):
    """A figure without its samples: medians, and the extremes of the repeats' ratios."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    benchmark: str
    name: str
    reference_name: str
    unit: str
    value: float
    reference: float
    ratio: float
    ratio_low: float
    ratio_high: float
    met: bool | None


class Kept(BaseModel):
    """One run: when, on which processor and kernel, and how loaded the machine was when it began."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    date: str
    cpu: str
    kernel: str
    load_at_start: float
    figures: tuple[KeptFigure, ...] = ()


def keep(path: Path, machine: dict[str, Any], figures: Sequence[tuple[str, Figure]]) -> None:
    """Append a run to `path`."""
    kept = Kept(
        date=datetime.now(UTC).date().isoformat(),
        cpu=_cpu(machine),
        kernel=machine["kernel"],
        load_at_start=machine["load_at_start"],
        figures=tuple(_kept(name, figure) for name, figure in figures),
    )
    line = kept.model_dump_json() + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def last_of(path: Path, machine: dict[str, Any]) -> Kept | None:
    """Return the last run that was kept on a processor of this machine's kind; None if there is none.

    Raises BadInput if a line is no run.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("--against", f"{path}: {error}", "a file that --keep has written") from None
    runs = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    ours = [run for run in runs if run.cpu == _cpu(machine)]
    return ours[-1] if ours else None


def changes(before: Kept, figures: Sequence[tuple[str, Figure]]) -> Iterator[str]:
    """Yield a line with the number of ratios that have changed since `before`, then a line for each."""
    known = {(f.benchmark, f.name, f.reference_name): f for f in before.figures}
    keyed = [((name, f.name, f.reference_name), f) for name, f in figures]
    pairs = [(known[key], f) for key, f in keyed if key in known]
    changed = [(then, now) for then, now in pairs if _differ(then, now)]
    yield f"Since {before.date}, {before.cpu}: {len(changed)} of {len(pairs)} ratios have changed."
    for then, now in changed:
        what = f"{then.benchmark}: {now.name} to {now.reference_name}"
        yield f"  {what}: ratio {then.ratio:.3g} then, {now.ratio:.3g} now"


def _differ(then: KeptFigure, now: Figure) -> bool:
    ratios = now.ratios
    return not (then.ratio_low <= now.ratio <= then.ratio_high or ratios[0] <= then.ratio <= ratios[-1])


def _kept(benchmark: str, figure: Figure) -> KeptFigure:
    ratios = figure.ratios
    return KeptFigure(
        benchmark=benchmark,
        name=figure.name,
        reference_name=figure.reference_name,
        unit=figure.unit,
        value=figure.value,
        reference=figure.reference,
        ratio=figure.ratio,
        ratio_low=ratios[0],
        ratio_high=ratios[-1],
        met=figure.met,
    )


def _cpu(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']} ({machine['cpu_family']})"


def _parse(path: Path, number: int, line: str) -> Kept:
    try:
        return Kept.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "line"
        raise BadInput(f"--against: {path}:{number}: {key}", first["msg"], "a line of --keep") from None
