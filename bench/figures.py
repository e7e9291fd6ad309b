"""A figure: samples beside samples of a reference, and the condition that it should meet."""

from __future__ import annotations

import re
from statistics import median
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Units of figures that count events: they depend neither on the machine's speed nor on its load.
COUNTS = frozenset({"flushes", "IPIs", "executions"})

_CONDITION = re.compile(r"(value|ratio) (<=|>=) (\d+(?:\.\d+)?)")

Sample = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Figure(BaseModel):
    """A figure.  `wanted` is empty or conditions joined by "and", such as "value <= 1000 and ratio >= 5"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    what: str
    unit: str
    values: tuple[Sample, ...] = Field(min_length=1, strict=False)
    reference_name: str
    references: tuple[Sample, ...] = Field(min_length=1, strict=False)
    ratio_of: Literal["value/reference", "reference/value"]
    wanted: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.values) != len(self.references):
            raise ValueError("as many values as references")
        conditions(self.wanted)
        return self

    @property
    def is_count(self) -> bool:
        return self.unit in COUNTS

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def reference(self) -> float:
        return median(self.references)

    @property
    def ratios(self) -> list[float]:
        """Return the ratio of each repeat, in ascending order."""
        pairs = zip(self.values, self.references, strict=True)
        if self.ratio_of == "value/reference":
            return sorted(value / reference for value, reference in pairs)
        return sorted(reference / value for value, reference in pairs)

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Return whether the figure meets its conditions; None if it has none."""
        if not self.wanted:
            return None
        measured = {"value": self.value, "ratio": self.ratio}
        return all(
            measured[what] <= bound if sign == "<=" else measured[what] >= bound
            for what, sign, bound in conditions(self.wanted)
        )

    def judged(self, *, quick: bool) -> bool | None:
        """Return `met`; None if the sizes were too small to tell, which cannot happen to a count."""
        return None if quick and not self.is_count else self.met

    def document(self, *, quick: bool) -> dict[str, Any]:
        """Return the figure for JSON.  `quick`: it was measured with tiny sizes."""
        ratios = self.ratios
        return {
            "name": self.name,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "reference_name": self.reference_name,
            "reference": self.reference,
            "ratio_of": self.ratio_of,
            "ratio": self.ratio,
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "wanted": self.wanted or None,
            "met": self.judged(quick=quick),
            "values": list(self.values),
            "references": list(self.references),
        }


def conditions(wanted: str) -> list[tuple[str, str, float]]:
    """Parse the conditions of a figure.

    >>> conditions("value <= 1000 and ratio >= 5")
    [('value', '<=', 1000.0), ('ratio', '>=', 5.0)]
    """
    found = []
    for text in wanted.split(" and ") if wanted else ():
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no condition such as 'ratio >= 5'")
        found.append((match[1], match[2], float(match[3])))
    return found
