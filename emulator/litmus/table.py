"""Verdicts of a suite as text and as a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from emulator.litmus.model import INCONCLUSIVE, SAFE, LitmusTest
from emulator.litmus.policies import expected_of, is_consistent, is_cost_only, violations_of_base
from emulator.litmus.verdict import BOUNDED, SEARCHED, VIOLATIONS, Outcome, differs, proofs, under
from emulator.policy import PRESETS
from emulator.policy.mutants import PREFIX
from emulator.report.cases import Case
from emulator.report.console import letter

DOCUMENT_VERSION = 1

_STYLES = {SAFE: "green", INCONCLUSIVE: "yellow", VIOLATIONS: "red"}


class Results:
    """Outcomes of tests under policies.

    explored: the limits of executions and seconds, if the outcomes are by proof.  interrupted: some outcomes
    have fewer executions than planned, so a danger or violation that is missing there proves nothing.
    kernel: the source tree that has the TDP MMU, and its version.
    """

    def __init__(
        self, tests: Sequence[LitmusTest], seed: int, explored: tuple[int, float] | None = None
    ) -> None:
        self.tests = list(tests)
        self.seed = seed
        self.explored = explored
        self.interrupted = False
        self.kernel: dict[str, str] | None = None
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        # The violations of each policy's base, because finding a base may read the policy's files.
        self._of_base: dict[tuple[str, str], frozenset[str]] = {}

    def add(self, outcome: Outcome) -> None:
        known = self.outcomes.setdefault((outcome.test, outcome.policy), outcome)
        if known is not outcome:
            known.add(outcome)

    def cut_short(self, executions: int) -> int:
        """Return the number of outcomes that a signal has cut short.  executions: of a whole outcome."""
        if not self.interrupted:
            return 0
        explored = self.explored is not None
        return sum(
            one.cut if explored else one.executions < executions and not one.failure
            for one in self.outcomes.values()
        )

    @property
    def policies(self) -> list[str]:
        """Return the policies: presets in the order of their list, then the others in order of outcomes."""
        seen = dict.fromkeys(policy for _, policy in self.outcomes)
        return [*(name for name in PRESETS if name in seen), *(name for name in seen if name not in PRESETS)]

    def of_policy(self, policy: str) -> list[tuple[LitmusTest, Outcome]]:
        found = []
        for test in self.tests:
            outcome = self.outcomes.get((test.name, policy))
            if outcome is not None:
                found.append((test, outcome))
        return found

    def differing(self) -> list[tuple[LitmusTest, Outcome, str]]:
        found = []
        for policy in self.policies:
            for test, outcome in self.of_policy(policy):
                text = differs(outcome, test, expected_of(test, policy))
                cut_short = self.interrupted and not outcome.kinds and not outcome.failure
                if text is not None and not cut_short:
                    found.append((test, outcome, text))
        return found

    def unforeseen(self) -> list[tuple[LitmusTest, Outcome]]:
        """Return violations that no test expects, under changed presets and users' policies."""
        return [
            (test, outcome)
            for policy in self.policies
            if not policy.startswith(PREFIX)
            for test, outcome in self.of_policy(policy)
            if self.own_kinds(test, outcome) and not expected_of(test, policy)
        ]

    def of_bases(self) -> list[tuple[LitmusTest, Outcome]]:
        """Return violations under other policies than presets that each one's base shows as well."""
        return [
            (test, outcome)
            for policy in self.policies
            for test, outcome in self.of_policy(policy)
            if outcome.kinds and not self.own_kinds(test, outcome)
        ]

    def own_kinds(self, test: LitmusTest, outcome: Outcome) -> set[str]:
        """Return the kinds of violation that the policy's base does not show as well."""
        if not outcome.kinds:
            return set()
        pair = test.name, outcome.policy
        if pair not in self._of_base:
            self._of_base[pair] = violations_of_base(test, outcome.policy)
        return outcome.kinds.keys() - self._of_base[pair]

    def verdicts(self) -> Iterator[tuple[str, str, str]]:
        """Yield each verdict, and the test and the policy that it is about."""
        for policy in self.policies:
            for test, outcome in self.of_policy(policy):
                yield outcome.verdict(test), test.name, policy

    def idle_delays(self) -> list[tuple[str, str]]:
        """Return the tests' delays at points to which their threads never came, under no policy."""
        found = []
        for test in self.tests if self.explored is None else ():
            outcomes = [outcome for (name, _), outcome in self.outcomes.items() if name == test.name]
            if not any(outcome.executions for outcome in outcomes):
                continue
            passed = set().union(*(outcome.delays_passed for outcome in outcomes))
            found += [(test.name, text) for i, text in enumerate(test.stress.delays) if i not in passed]
        return found

    def cases(self) -> list[Case]:
        """Return the verdicts as cases of a report for CI systems.

        A violation that the test expects is a case that passed.
        """
        wrong = {(test.name, outcome.policy): text for test, outcome, text in self.differing()}
        for test, outcome in self.unforeseen():
            wrong.setdefault((test.name, outcome.policy), f"{VIOLATIONS}: {', '.join(sorted(outcome.kinds))}")
        return [
            _case(outcome, outcome.verdict(test), wrong.get((test.name, policy)))
            for policy in self.policies
            for test, outcome in self.of_policy(policy)
        ]

    @property
    def executions(self) -> int:
        return sum(outcome.executions for outcome in self.outcomes.values())

    def document(self) -> dict[str, Any]:
        return {
            "flushlab_litmus": DOCUMENT_VERSION,
            "seed": self.seed,
            "executions": self.executions,
            "idle_delays": [{"test": name, "delay": text} for name, text in self.idle_delays()],
            **({"interrupted": True} if self.interrupted else {}),
            **({"kernel": self.kernel} if self.kernel else {}),
            "outcomes": [
                outcome.document(test, expected_of(test, policy))
                for policy in self.policies
                for test, outcome in self.of_policy(policy)
            ],
        }


def _case(outcome: Outcome, verdict: str, wrong: str | None) -> Case:
    detail = "\n".join(report.text for report in outcome.reports)
    if wrong is not None:
        return Case(outcome.test, outcome.policy, "failed", wrong, detail)
    said = f"{verdict}, {outcome.executions:,} executions"
    return Case(outcome.test, outcome.policy, "skipped" if verdict == INCONCLUSIVE else "passed", said)


def print_results(results: Results, console: Console) -> None:
    shown = [name for name in results.policies if name in PRESETS]
    others = [name for name in results.policies if name not in PRESETS]
    if shown:
        _print_matrix(results, shown, console)
    if others:
        console.print()
        _print_policies(results, others, console)
    console.print()
    for line in dict.fromkeys(line for one in results.outcomes.values() for line in one.unwatched):
        console.print(Text(f"nothing is proved: {line}, which explore cannot watch"))
    for line in dict.fromkeys(line for one in results.outcomes.values() for line in one.unordered):
        console.print(Text(f"nothing is proved: no ordering point orders {line}"))
    _print_differences(results, console)


def _print_matrix(results: Results, policies: list[str], console: Console) -> None:
    """Print tests by presets: a dot is safe, ? inconclusive, a number the violating executions in percent."""
    table = Table(box=None, pad_edge=False)
    table.add_column("test", no_wrap=True)
    for i, _ in enumerate(policies):
        table.add_column(letter(i), justify="right", no_wrap=True)
    for test in results.tests:
        cells = []
        for policy in policies:
            outcome = results.outcomes.get((test.name, policy))
            cells.append(Text("") if outcome is None else _cell(outcome, test))
        table.add_row(test.name, *cells)
    console.print(table)
    console.print()
    for i, policy in enumerate(policies):
        console.print(Text(f"{letter(i)}  {policy}: {_sum(results, policy)}"))
    legend = ". safe   ? inconclusive   50% of the executions violated   ! not as expected"
    if any(outcome.proof for outcome in results.outcomes.values()):
        legend = ". proved   ≤1 up to one preemption   … not all   ? inconclusive   X counterexample"
        legend += "   ! not as expected"
    console.print(Text(legend, style="dim"))


def _cell(outcome: Outcome, test: LitmusTest) -> Text:
    verdict = outcome.verdict(test)
    share = 100 * outcome.violating / max(1, outcome.executions)
    found = "X" if outcome.proof else f"{max(1, round(share))}%"
    signs = {SAFE: ".", BOUNDED: f"≤{outcome.bound}", SEARCHED: "…", INCONCLUSIVE: "?", VIOLATIONS: found}
    text = signs.get(verdict, "x")
    mark = "!" if differs(outcome, test, expected_of(test, outcome.policy)) else ""
    return Text(text + mark, style=_STYLES.get(verdict, "bold red"))


def _sum(results: Results, policy: str) -> str:
    outcomes = results.of_policy(policy)
    kinds: dict[str, int] = {}
    for _, outcome in outcomes:
        for kind, n in outcome.kinds.items():
            kinds[kind] = kinds.get(kind, 0) + n
    executions = sum(outcome.executions for _, outcome in outcomes)
    averted = sum(outcome.evidence.get("averted", 0) for _, outcome in outcomes)
    caught = sum(bool(outcome.kinds) for _, outcome in outcomes)
    text = f"{len(outcomes)} tests, {executions:,} executions"
    proved = sum(outcome.proof == SAFE and not outcome.kinds for _, outcome in outcomes)
    by_proof = any(outcome.proof for _, outcome in outcomes)
    text += f", {proved} proved" if by_proof else f", {averted:,} uses averted"
    if not caught:
        return f"{text}, no violation"
    return f"{text}, caught by {caught}: " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))


def _print_policies(results: Results, policies: list[str], console: Console) -> None:
    """Print mutants, settings and users' policies, with the tests that catch them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    table.add_column("tests", justify="right")
    table.add_column("executions", justify="right")
    table.add_column("caught by")
    for policy in policies:
        outcomes = results.of_policy(policy)
        caught = [
            f"{test.name}{_share(outcome)} ({', '.join(sorted(outcome.kinds))})"
            for test, outcome in outcomes
            if results.own_kinds(test, outcome)
        ]
        caught += [f"{test.name} (failed)" for test, outcome in outcomes if outcome.failure]
        nothing = Text("nothing" + _why(policy))
        executions = sum(outcome.executions for _, outcome in outcomes)
        found = Text("; ".join(caught), style="red") if caught else nothing
        table.add_row(policy, str(len(outcomes)), f"{executions:,}", found)
    console.print(table)


def _share(outcome: Outcome) -> str:
    if outcome.proof:
        return ""
    return f" {max(1, round(100 * outcome.violating / max(1, outcome.executions)))}%"


def _why(policy: str) -> str:
    if is_consistent(policy):
        return ", as it should be: flushlab explore --store-buffers catches it"
    return ", as it should be" if is_cost_only(policy) else ""


def _print_differences(results: Results, console: Console) -> None:
    differing, unforeseen = results.differing(), results.unforeseen()
    if results.explored is not None:
        console.print(Text(proofs(results.verdicts())))
    if unforeseen:
        console.print(
            Text(f"{len(unforeseen)} tests found violations where nothing is expected:", style="bold")
        )
    for test, outcome in unforeseen:
        found = ", ".join(f"{n:,} {kind}" for kind, n in sorted(outcome.kinds.items()))
        console.print(Text(f"  {test.name} under {outcome.policy}: {found}"))
        console.print(Text(f"    {rerun(results, test, outcome)}", style="dim"))
    for name, policies, kinds in _by_test(results.of_bases()):
        base = "its base" if len(policies) == 1 else "their bases"
        console.print(Text(f"  {name}{under(policies)}: {', '.join(sorted(kinds))}, as under {base}"))
    if differing:
        console.print(Text(f"{len(differing)} verdicts are not as expected:", style="bold"))
    for test, outcome, text in differing:
        console.print(Text(f"  {test.name} under {outcome.policy}: {text}"))
        if outcome.first is not None or results.explored is not None:
            console.print(Text(f"    {rerun(results, test, outcome)}", style="dim"))
    for name, text in results.idle_delays():
        console.print(Text(f"  {name}: no execution came to the point of the delay {text!r}"))
    if not differing:
        reached = "interrupted; those reached are" if results.interrupted else "all verdicts"
        verdicts = "" if unforeseen else f"{reached} as expected, "
        console.print(Text(f"{verdicts}{results.executions:,} executions"))


def _by_test(found: Sequence[tuple[LitmusTest, Outcome]]) -> Iterator[tuple[str, list[str], set[str]]]:
    """Yield each test's name, with the policies and the kinds of its outcomes."""
    for name in dict.fromkeys(test.name for test, _ in found):
        outcomes = [outcome for test, outcome in found if test.name == name]
        yield name, [one.policy for one in outcomes], set().union(*(one.kinds for one in outcomes))


def rerun(results: Results, test: LitmusTest, outcome: Outcome) -> str:
    """Return the command that repeats the outcome."""
    name = str(test.path) if test.path else test.name
    kernel = f" --kernel {results.kernel['tree']}" if results.kernel else ""
    command = f"flushlab litmus {name}{kernel} --policy {outcome.policy}"
    if results.explored is not None:
        executions, seconds = results.explored
        return f"{command} --explore --seed {results.seed} --iterations {executions} --seconds {seconds:g}"
    seed = outcome.first if outcome.first is not None else 0
    return f"{command} --seed {seed} --iterations 20"
