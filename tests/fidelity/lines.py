"""Reads the recordings, *.toml: the lines, their steps, their expectations."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SHADOW = Path(__file__).with_name("shadow.toml")
FIXTURES = (Path(__file__).with_name("ground_truth.toml"), SHADOW)
VCPUS = (1, 2, 4)
PRESETS = ("linux-6.12", "linux-7.3")
VCPU_KEYS = ("flush_all", "flush_current", "flush_guest", "tlb_flush", "kvm_mmu_load")

# A count per vCPU or VM, one for each vCPU, or the operation's result.
Expected = int | list[int] | Literal["result"]


@dataclass(frozen=True)
class Step:
    """One step of `setup` or `do`, written `op key=value key=value`; values are numbers or words."""

    op: str
    args: dict[str, int | str]

    @classmethod
    def parse(cls, text: str) -> Step:
        op, *words = text.split()
        args: dict[str, int | str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if not equals:
                # `guest write`: the word that is not a pair names the operation.
                key, value = "do", key
            try:
                args[key] = int(value, 0)
            except ValueError:
                args[key] = value
        return cls(op, args)

    def number(self, key: str, default: int | None = None) -> int:
        value = self.args.get(key, default)
        if not isinstance(value, int):
            raise ValueError(f"step {self}: {key} is {value!r}, expected a number")
        return value

    def word(self, key: str, default: str | None = None) -> str:
        value = self.args.get(key, default)
        if not isinstance(value, str):
            raise ValueError(f"step {self}: {key} is {value!r}, expected a word")
        return value

    def __str__(self) -> str:
        return " ".join([self.op, *(f"{key}={value}" for key, value in self.args.items())])


@dataclass(frozen=True)
class Machine:
    vms: int = 1
    thp: bool = False
    host_4k: bool = False
    manual_protect: bool = False
    guest_os: bool = False
    lazy_split: bool = False
    ept: bool = True
    tables: bool = False
    bits32: bool = False


@dataclass(frozen=True)
class Recorded:
    vcpus: int
    on: Literal["vmx", "svm"]
    scenario: str
    ops: str
    sum: bool = False
    kernel: str = "6.12"


@dataclass(frozen=True)
class Line:
    id: str
    recorded: tuple[Recorded, ...]
    machine: Machine
    setup: tuple[Step, ...]
    do: Step
    expect: dict[str, Expected]
    requests: dict[str, int | Literal["result"]] = field(default_factory=dict)
    executes: dict[str, int] | None = None
    result: int | None = None
    result_min: int | None = None
    merged: float = 0.0
    at_once: bool = False
    scale: bool = True
    yields: bool = False
    refaults: bool = False
    presets: tuple[str, ...] = PRESETS
    needs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.id

    @property
    def vcpus(self) -> tuple[int, ...]:
        """The numbers of vCPUs with which it was recorded."""
        return tuple(sorted({r.vcpus for r in self.recorded}))

    @property
    def scales_to(self) -> tuple[int, ...]:
        """Return other numbers of vCPUs, for which the counts follow from those recorded; none if the
        operation is about one vCPU."""
        if not self.scale or "vcpu" in self.do.args:
            return ()
        return tuple(n for n in VCPUS if n not in self.vcpus)

    @property
    def vm(self) -> int:
        """The VM that is operated on."""
        return self.do.number("vm", 0)

    @classmethod
    def parse(cls, table: dict[str, Any]) -> Line:
        known = dict(table)
        line = cls(
            id=known.pop("id"),
            recorded=tuple(Recorded(**r) for r in known.pop("recorded")),
            machine=Machine(**known.pop("machine", {})),
            setup=tuple(Step.parse(s) for s in known.pop("setup")),
            do=Step.parse(known.pop("do")),
            needs=frozenset(known.pop("needs", ())),
            presets=tuple(known.pop("presets", PRESETS)),
            **known,
        )
        unknown = set(line.expect) - {"remote_tlb_flush_requests", *VCPU_KEYS}
        if unknown:
            raise ValueError(f"line {line.id}: unknown counter {sorted(unknown)}")
        return line


def load(fixtures: tuple[Path, ...] = FIXTURES) -> list[Line]:
    return [line for fixture in fixtures for line in _load(fixture)]


def _load(fixture: Path) -> list[Line]:
    with fixture.open("rb") as file:
        document = tomllib.load(file)
    if document["format"] != 1:
        raise ValueError(f"{fixture}: format {document['format']}, expected 1")
    return [Line.parse(_with_defaults(table, document.get("defaults", {}))) for table in document["line"]]


def _with_defaults(table: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the line's table with the file's defaults, of which those of `machine` are for each key."""
    machine = {**defaults.get("machine", {}), **table.get("machine", {})}
    return {**defaults, **table, "machine": machine}
