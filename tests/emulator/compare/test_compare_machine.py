"""`flushlab compare` on a real machine, in a small way."""

from __future__ import annotations

import json

import pytest

from emulator.cli.main import main

pytestmark = pytest.mark.slow


def test_every_policy_meets_the_same_work(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--policy",
        "linux-7.3",
        "--policy",
        "root-tlb-gen",
        "--duration",
        "600ms",
        "--seed",
        "1",
        "--json",
    ]
    assert main(["compare", "migration-storm", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    before, after = document["policies"]
    assert (before["verdict"], after["verdict"]) == ("clean", "clean")
    accesses = [policy["figures"]["accesses"]["median"] for policy in (before, after)]
    # Guests go on until the machine has stopped, which a busy host takes its time for.
    wanted = 0.6 * document["pace_accesses_per_second"]
    assert all(wanted <= one < 2 * wanted for one in accesses)
    collateral = [policy["figures"]["collateral/M"]["median"] for policy in (before, after)]
    assert collateral[1] < collateral[0] / 10, "no INVEPT global, nothing of others is dropped"
    cycles = [policy["figures"]["flush cycles/M"]["median"] for policy in (before, after)]
    assert cycles[1] < cycles[0]


def test_user_policy_that_fails_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("policies") / "mine.py"
    path.write_text(
        "from emulator.policy import Policy\n\n\nclass Mine(Policy):\n"
        "    def migration(self, cpu, vcpu):\n        return 'nonsense'\n"
    )
    assert main(["compare", "migration-storm", "--policy", str(path), "--duration", "200ms"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Mine.migration: returned 'nonsense'; expected one of all-contexts" in last
