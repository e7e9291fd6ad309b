"""Each document is as its JSON Schema says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from emulator.cli.drift_run import document_of
from emulator.cli.main import main
from emulator.kernel_tree.build import Built
from emulator.kernel_tree.execute import Executed
from emulator.schemas import SCHEMAS, schema
from tests.emulator.drift.made_up import LINUX, LINUX_OLD
from tests.emulator.replay.recording import whole
from tests.emulator.sweep.canned_runs import canned

Printed = Callable[[list[str]], dict[str, Any]]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Return a function that runs a command and returns its document."""

    def run(line: list[str]) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*line, "--json"]) in (0, 1)
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


@pytest.mark.stress
def test_a_run(printed: Printed) -> None:
    for policy in ("linux-7.3", "migration=none"):
        document = printed(["run", "--duration", "100ms", "--seed", "1", "--policy", policy])
        SCHEMAS["run"].model_validate(document, strict=True)


@pytest.mark.slow
def test_litmus_tests(printed: Printed) -> None:
    line = ["litmus", "return-zap", "--iterations", "20", "--jobs", "1", "--seed", "1"]
    for policy in ("linux-7.3", "migration=none"):
        document = printed([*line, "--policy", policy])
        SCHEMAS["litmus"].model_validate(document, strict=True)
        assert bool(document["outcomes"][0]["reports"]) is (policy == "migration=none")


@pytest.mark.slow
def test_a_sweep(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulator.sweep.work.in_processes", canned)
    line = ["compare", "migration-storm", "--policy", "root-tlb-gen", "--vary", "vm.count=1,2"]
    for repeat in ("1", "4"):
        SCHEMAS["sweep"].model_validate(printed([*line, "--repeat", repeat]), strict=True)


@pytest.mark.stress
def test_a_comparison(printed: Printed) -> None:
    line = ["compare", "migration-storm", "--duration", "100ms", "--seed", "1", "--sensitivity"]
    document = printed([*line, "--policy", "root-tlb-gen", "--policy", "migration=none"])
    SCHEMAS["compare"].model_validate(document, strict=True)
    assert document["sensitivity"]["ranges"]
    assert all(policy["runs"] for policy in document["policies"])


@pytest.mark.slow
def test_explored_tests(printed: Printed) -> None:
    for policy in ("linux-7.3", "migration=none"):
        for more in ([], ["--strategy", "pct", "--executions", "20"], ["--stateful"]):
            document = printed(["explore", "return-zap", "--jobs", "1", "--policy", policy, *more])
            SCHEMAS["explore"].model_validate(document, strict=True)
            assert bool(document["explored"][0]["counterexample"]) is (policy == "migration=none")


@pytest.mark.slow
def test_imported_traces(printed: Printed, tmp_path: Path) -> None:
    trace = tmp_path / "kvm.trace"
    trace.write_text("".join(whole().text()))
    document = printed(["import", str(trace)])
    SCHEMAS["import"].model_validate(document, strict=True)
    assert document["causes"]
    assert document["vcpus"]


@pytest.mark.slow
def test_a_replay(printed: Printed, tmp_path: Path) -> None:
    trace, workload = tmp_path / "kvm.trace", tmp_path / "kvm.workload"
    trace.write_text("".join(whole().text()))
    assert main(["import", str(trace), "--workload", str(workload)]) == 0
    SCHEMAS["replay"].model_validate(printed(["replay", str(workload)]), strict=True)


@pytest.mark.slow
def test_an_audit(printed: Printed) -> None:
    document = printed(["explore", "return-zap", "--audit", "--executions", "5"])
    SCHEMAS["audit"].model_validate(document, strict=True)
    assert document["audited"]


@pytest.mark.slow
def test_executions_and_their_states(printed: Printed, tmp_path: Path) -> None:
    line = ["explore", "return-zap", "--policy", "migration=none"]
    document = printed([*line, "--trace", "--number", "1"])
    SCHEMAS["execution"].model_validate(document, strict=True)
    assert document["execution"] == 1
    assert main([*line, "--jobs", "1", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    SCHEMAS["execution"].model_validate(printed(["explore", "--replay", str(path)]), strict=True)
    state = printed(["explore", "--replay", str(path), "--stop-at", "5"])
    SCHEMAS["state"].model_validate(state, strict=True)
    assert state["tasks"]
    assert main(["explain", str(path), "--format", "json"]) == 0


@pytest.mark.slow
def test_an_execution_that_is_not_reached(printed: Printed) -> None:
    document = printed(["explore", "return-zap", "--trace", "--reach", "frozen"])
    SCHEMAS["unreached"].model_validate(document, strict=True)


@pytest.mark.slow
def test_an_explanation(printed: Printed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "return-zap", "--policy", "migration=none", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    capsys.readouterr()
    assert main(["explain", str(path), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    SCHEMAS["explain"].model_validate(document, strict=True)
    assert document["moments"]
    assert document["legend"]


@pytest.mark.slow
def test_a_drift(printed: Printed) -> None:
    document = printed(["drift", str(LINUX), "--against", str(LINUX_OLD), "--diff"])
    SCHEMAS["drift"].model_validate(document, strict=True)
    assert any(function.get("diff") for function in document["functions"])


def test_a_drift_of_executed_code() -> None:
    built = Built(Path("tdp.so"), "6.12.94", Path("linux"), "hash", 12, 3, ("stub",), cached=False)
    found = Executed(
        "linux-6.12", {"operations": 1}, [{"operation": "x"}], {"why": 2}, "signal 11", 0, ["op"]
    )
    for result in (found, Executed("linux-6.12")):
        document = json.dumps(document_of(built, result))
        SCHEMAS["drift-run"].model_validate_json(document, strict=True)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_forbids_other_keys_and_versions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", name]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == schema(name)
    assert found["additionalProperties"] is False
    version = next(iter(found["properties"]))
    assert found["properties"][version]["const"] == 1
    with pytest.raises(ValidationError, match="another_key"):
        SCHEMAS[name].model_validate({"another_key": 1})


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out.split() == list(SCHEMAS)
    assert main(["schema", "runs"]) == 2
    found = capsys.readouterr().err
    assert found.startswith(
        "flushlab: schema: no document 'runs'; expected one of audit, compare, drift, drift-run, execution,"
    )
