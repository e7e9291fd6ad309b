"""Names that a shell offers when it completes a command line (`flushlab --install-completion`).

If no name begins as the word does, the shell offers files.
"""

from __future__ import annotations

from collections.abc import Iterable


def scenarios(incomplete: str) -> list[str]:
    """Return the embedded scenarios that begin so."""
    from emulator.scenario.config import embedded_scenarios

    return _beginning(embedded_scenarios(), incomplete)


def policies(incomplete: str) -> list[str]:
    """Return the presets and mutants that begin so."""
    from emulator.policy import MUTANTS, PRESETS

    return _beginning([*PRESETS, *(f"mutant:{name}" for name in MUTANTS)], incomplete)


def mutants(incomplete: str) -> list[str]:
    """Return the mutants that begin so."""
    return [name for name in policies(incomplete) if name.startswith("mutant:")]


def tests(incomplete: str) -> list[str]:
    """Return the shipped litmus tests that begin so."""
    from emulator.litmus.loader import shipped_texts

    return _beginning(shipped_texts(), incomplete)


def topics(incomplete: str) -> list[str]:
    """Return the topics of the guide that begin so."""
    from emulator.guide import TOPICS

    return _beginning(TOPICS, incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
