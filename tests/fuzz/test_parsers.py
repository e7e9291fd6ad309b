"""Each parser loads its input, or refuses it in one line: bounded in time and length, with the name of
the file or the option.  FLUSHLAB_FUZZ=10 gives ten times as many inputs, other ones each time.
"""

from __future__ import annotations

import io
import json
import tomllib
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator.cli.main import main
from emulator.cli.options import duration_of
from emulator.cli.run import load_policy
from emulator.drift.record import load_record
from emulator.errors import BadInput
from emulator.explain.diagram import diagram
from emulator.explain.document import load_cases
from emulator.explain.explanation import explain
from emulator.explore.results import replay
from emulator.litmus.loader import load_test, shipped_texts
from emulator.policy import MUTANTS, POINTS, PRESETS, check_policy
from emulator.policy.patch import read_patch
from emulator.scenario import limits
from emulator.scenario.config import embedded_scenarios, load_scenario
from emulator.scenario.costs import load_costs
from emulator.traces.container import HEADER_SIZE, PREFIX, build_image, parse_image, seal
from emulator.traces.convert import read_recording
from metrics import parse_address
from tests.damaged import damage
from tests.emulator.policy.patch.edits import BREAKS_ALL, NO_FLUSH, new_file
from tests.fuzz.inputs import FACTOR, edited, examples, judge, raw, toml_with_something_wrong

pytestmark = pytest.mark.timeout(int(120 * max(1, FACTOR)))

SCENARIOS = list(embedded_scenarios().values())
LITMUS = list(shipped_texts().values())
COSTS = [resources.files("emulator").joinpath("costs.toml").read_text()]
RECORDING = (Path(__file__).parent.parent / "emulator/traces/sample.lackey").read_text()
SMALL = read_recording(io.BytesIO(RECORDING.encode()), "own.lackey", "own")
TRACE = build_image(SMALL.records, SMALL.metadata)
RECORD = {
    "modelled": "7.3.0",
    "versions": ["7.2.0", "7.3.0"],
    "functions": {"kvm_f": [{"fingerprint": "0123456789abcdef", "file": "a.c", "versions": ["7.3.0"]}]},
}
ANSWERS = [f"{point.name}={name}" for point in POINTS for name in point.names()]
SPELLINGS = [
    *PRESETS,
    *(f"mutant:{name}" for name in MUTANTS),
    *ANSWERS,
    "root-tlb-gen+migration_vpid=none",
    "own.py+migration=none",
    "linux-5.18+own.patch,migration=none",
]
PATCHES = [
    BREAKS_ALL,
    f"From: me\n\nFlushlab-Base: linux-5.18\n---\n{NO_FLUSH}-- \n2.43.0\n",
    new_file("x/y.py", ""),
]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "own.toml"


def whole_scenario(path: Path) -> None:
    scenario = load_scenario(str(path))
    limits.check(scenario)
    for pcpus in (1, 7, 4096):
        with suppress(BadInput):
            scenario.scaled(pcpus)


TOML: dict[str, tuple[list[str], Callable[[Path], object], int]] = {
    "scenario": (SCENARIOS, whole_scenario, 1000),
    "litmus": (LITMUS, lambda path: load_test(str(path)), 1000),
    "costs": (COSTS, load_costs, 250),
}


@pytest.mark.slow
@pytest.mark.parametrize("parser", TOML)
def test_toml_documents(parser: str, own: Path) -> None:
    texts, load, number = TOML[parser]

    @examples(number)
    @given(toml_with_something_wrong([tomllib.loads(text) for text in texts]))
    def each(text: str) -> None:
        own.write_text(text)
        judge(parser, lambda: load(own), str(own))

    each()


@pytest.mark.slow
@pytest.mark.parametrize("parser", TOML)
def test_toml_bytes(parser: str, own: Path) -> None:
    texts, load, number = TOML[parser]

    @examples(number)
    @given(raw(texts))
    def each(data: bytes) -> None:
        own.write_bytes(data)
        judge(parser, lambda: load(own), str(own))

    each()


@pytest.mark.slow
@examples(600)
@given(raw([RECORDING]))
def test_recordings_of_lackey(data: bytes) -> None:
    judge("lackey", lambda: read_recording(io.BytesIO(data), "own.lackey", "own"), "own.lackey")


@pytest.mark.slow
@examples(200)
@given(st.text(max_size=70), st.text(max_size=1100))
def test_names_and_descriptions(name: str, description: str) -> None:
    source = io.BytesIO(RECORDING.encode())
    judge(
        "trace options",
        lambda: read_recording(source, "own.lackey", name, description=description),
        "--name",
        "--description",
    )


@pytest.mark.slow
@examples(300)
@given(st.data())
def test_traces(data: st.DataObject) -> None:
    _, _, _, size, _ = PREFIX.unpack_from(TRACE)
    metadata, payload = TRACE[HEADER_SIZE : HEADER_SIZE + size], TRACE[HEADER_SIZE + size :]
    what = data.draw(st.sampled_from(["metadata", "payload", "document", "image"]))
    if what == "document":
        document = damage(json.loads(metadata), data)
        metadata = json.dumps(document).encode("utf-8", "surrogatepass")
    at = data.draw(st.integers(0, len(payload) - 1))
    patch = data.draw(st.binary(max_size=8))
    if what == "payload":
        payload = payload[:at] + patch + payload[at + len(patch) :]
    if what == "metadata":
        at %= len(metadata)
        metadata = metadata[:at] + patch + metadata[at + len(patch) :]
    image = seal(metadata, payload)
    if what == "image":
        image = data.draw(st.sampled_from([image[:at], patch + image, image + patch, patch]))
    judge("fltrace", lambda: parse_image(image, "own.fltrace"), "own.fltrace")


@pytest.fixture(scope="module")
def counterexample(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("explored")
    options = ["--policy", "migration=none", "--jobs", "1", "--output", str(directory)]
    assert main(["explore", "return-zap", *options]) == 1
    (path,) = directory.glob("*.json")
    return json.loads(path.read_text())


def every_reading(path: Path) -> None:
    """The files of `explain` and of `explore --replay`."""
    refused = None
    for read in (replay.load, lambda path: [diagram(explain(case)) for case in load_cases(path)]):
        try:
            read(path)
        except BadInput as error:
            refused = error
    if refused is not None:
        raise refused


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_counterexamples(counterexample: Any, own: Path, data: st.DataObject) -> None:
    path = own.with_suffix(".json")
    path.write_text(json.dumps(damage(counterexample, data)))
    judge("JSON", lambda: every_reading(path), str(path))


@pytest.mark.slow
@examples(600)
@given(st.one_of(raw(PATCHES), edited(PATCHES).map(lambda text: text.encode(errors="replace"))))
def test_patches(own: Path, data: bytes) -> None:
    path = own.with_suffix(".patch")
    path.write_bytes(data)

    def load() -> None:
        patch = read_patch(str(path))
        assert patch.base != ""
        assert patch.code.changed

    judge("patch", load, str(path), f"{path.name}: ")


@pytest.mark.slow
@examples(500)
@given(st.data())
def test_json_bytes(counterexample: Any, own: Path, data: st.DataObject) -> None:
    path = own.with_suffix(".json")
    path.write_bytes(
        data.draw(raw([json.dumps(counterexample), "[" * 5000, "9" * 5000, '{"steps": [], "schedule": []}']))
    )
    judge("JSON", lambda: every_reading(path), str(path))


@pytest.mark.slow
@examples(250)
@given(st.data())
def test_records_of_fingerprints(own: Path, data: st.DataObject) -> None:
    path = own.with_suffix(".json")
    text = json.dumps(RECORD)
    path.write_bytes(data.draw(st.one_of(st.just(json.dumps(damage(RECORD, data)).encode()), raw([text]))))
    judge("record", lambda: load_record(path), str(path))


def options() -> dict[str, tuple[list[str], Callable[[str], object], str]]:
    def address(text: str) -> None:
        try:
            parse_address(text)
        except ValueError as error:
            raise BadInput("--metrics", "found this", str(error)) from error

    return {
        "policy": (SPELLINGS, lambda text: check_policy(text, "--policy"), "--policy"),
        "set": (SPELLINGS, lambda text: load_policy("linux-7.3", (text,)), "--set"),
        "duration": (["500ms", "30s", "1.5h", "2"], duration_of, "--duration"),
        "metrics": (["9464", "[::1]:9464", "0.0.0.0:1", "localhost:0"], address, "--metrics"),
    }


@pytest.mark.parametrize("option", options())
def test_options_are_sound_before_they_are_edited(option: str) -> None:
    """Otherwise each edited one would be refused for the same reason."""
    texts, load, _ = options()[option]
    sound = ANSWERS if option == "set" else texts
    assert set(sound) <= set(texts)
    for text in sound:
        load(text)


@pytest.mark.slow
@pytest.mark.parametrize("option", options())
def test_options(option: str) -> None:
    texts, load, name = options()[option]

    @examples(500)
    @given(st.one_of(edited(texts), st.text(max_size=80)))
    def each(text: str) -> None:
        judge(f"--{option}", lambda: load(text), name)

    each()
