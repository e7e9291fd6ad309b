"""One scrape of a service's metrics, and the rates between two."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

_PREFIX: Final = "flushlab_"
_MOST_BYTES: Final = 16 << 20
_TIMEOUT: Final = 5.0

Labels = frozenset[tuple[str, str]]


class NoService(Exception):
    """A scrape failed; the text is the reason."""


@dataclass(frozen=True)
class Sample:
    """The values of one scrape, by name without `flushlab_` and labels."""

    at: float
    values: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    def info(self) -> dict[str, str]:
        """Return the labels of the service's information: scenario, policy, version and so on."""
        found: dict[str, str] = {}
        for name in ("build_info", "run_info"):
            for labels in self.values.get(name, {}):
                found |= dict(labels)
        return found

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Return a metric's values by the values of these labels, summed over others."""
        found: dict[tuple[str, ...], float] = {}
        for key, value in self.values.get(name, {}).items():
            have = dict(key)
            place = tuple(have.get(label, "") for label in labels)
            found[place] = found.get(place, 0.0) + value
        return found

    def total(self, name: str) -> float:
        return sum(self.values.get(name, {}).values())


@dataclass(frozen=True)
class Interval:
    """Two scrapes of one service, the earlier first."""

    before: Sample
    now: Sample

    @property
    def seconds(self) -> float:
        return max(self.now.at - self.before.at, 1e-9)

    def grown(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Return the growth of a counter by label.  If a counter is lower than before, it has begun anew."""
        before, now = self.before.by(name, *labels), self.now.by(name, *labels)
        return {
            key: value - before.get(key, 0.0) if value >= before.get(key, 0.0) else value
            for key, value in now.items()
        }

    def rates(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return {key: value / self.seconds for key, value in self.grown(name, *labels).items()}

    def rate(self, name: str) -> float:
        return sum(self.rates(name).values())

    def percentile(self, histogram: str, percent: float) -> float | None:
        """Return the bucket, in seconds, that holds this percentile of the interval's samples; None without
        samples."""
        grown = {float(key[0]): value for key, value in self.grown(f"{histogram}_bucket", "le").items()}
        bounds = sorted(grown)
        if not bounds or not grown[bounds[-1]]:
            return None
        wanted = grown[bounds[-1]] * percent / 100
        return next(bound for bound in bounds if grown[bound] >= wanted)


def parse(text: str, at: float) -> Sample:
    """Return the sample in a text of Prometheus' format; raise NoService if it is none of flushlab's."""
    values: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for one in family.samples:
                if one.name.startswith(_PREFIX):
                    name = one.name.removeprefix(_PREFIX)
                    values.setdefault(name, {})[frozenset(one.labels.items())] = float(one.value)
    except (ValueError, KeyError, IndexError) as error:
        raise NoService(f"its answer has no metrics ({error})") from error
    if "build_info" not in values:
        raise NoService("its metrics are not those of flushlab")
    return Sample(at, values)


def scrape(host: str, port: int) -> Sample:
    """Scrape a service, without a proxy; raise NoService if that fails."""
    connection = HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read(_MOST_BYTES).decode("utf-8", "replace")
    except (OSError, HTTPException, ValueError) as error:
        raise NoService(str(getattr(error, "strerror", None) or error)) from error
    finally:
        connection.close()
    if answer.status != HTTPStatus.OK:
        raise NoService(f"it answers {answer.status} {answer.reason}")
    return parse(text, time.monotonic())
