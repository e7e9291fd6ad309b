"""The guide's pages: complete, generated where they say so, and every example ends as stated."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.errors import BadInput
from emulator.guide import TOPICS, page, title
from emulator.guide.reference import ARGUMENTS, STATES, attributes_of, questions
from emulator.policy import POINTS, instructions
from emulator.policy.acting import MOMENTS
from emulator.policy.state import State

_BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_MORE = " (continued)"
_COMMAND = re.compile(r"^\$ (?P<command>(?:flushlab|python) .*?)(?:\s+# exit (?P<status>\d))?$")


@dataclass(frozen=True, slots=True)
class Step:
    """A file that a page writes or continues, or a command that it runs with the exit status that it should
    have."""

    name: str
    text: str
    status: int = 0
    appends: bool = False


def steps(topic: str) -> Iterator[Step]:
    for block in _BLOCK.finditer(page(topic)):
        language, _, name = block["info"].partition(" ")
        if name.endswith(_MORE):
            yield Step(name.removesuffix(_MORE), block["text"], appends=True)
        elif name:
            yield Step(name, block["text"])
        elif language == "sh":
            for line in block["text"].splitlines():
                match = _COMMAND.match(line)
                assert match, f"{topic}: {line!r} is no command such as '$ flushlab run    # exit 1'"
                yield Step("", match["command"], int(match["status"] or 0))


def words(command: str) -> list[str]:
    """Return a command's words; a storm of some seconds takes two, because its status does not need more."""
    return shlex.split(re.sub(r"--duration [3-9]s", "--duration 2s", command))


@pytest.mark.stress
@pytest.mark.timeout(300)
@pytest.mark.parametrize("topic", [topic for topic in TOPICS if list(steps(topic))])
def test_examples_do_what_the_page_says(topic: str, tmp_path: Path) -> None:
    # Two made-up kernel trees, linux and linux-old.
    shutil.copytree(Path(__file__).parents[1] / "drift/trees", tmp_path, dirs_exist_ok=True)
    for step in steps(topic):
        if step.name:
            with (tmp_path / step.name).open("a" if step.appends else "w") as file:
                file.write(step.text)
            continue
        program, *arguments = words(step.text)
        command = [sys.executable, *(("-m", "emulator") if program == "flushlab" else ()), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == step.status, f"{step.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_the_copy_of_the_code_that_a_patch_begins_with(tmp_path: Path) -> None:
    """The commands of the page make it, and a change of it becomes a policy."""
    block = re.search(r"^ {4}mkdir emulator\n(?: {4}.*\n)+", page("patches"), re.MULTILINE)
    assert block
    script = block[0].replace("python3", sys.executable)
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True, timeout=60)
    roots = tmp_path / "emulator/kvm/mmu/roots.py"
    roots.write_text(roots.read_text().replace("kvm.policy.root_load(cpu, vcpu, root.sp)", '"none"'))
    git = ["git", "diff", "--", "emulator/kvm"]
    diff = subprocess.run(git, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "idea.patch").write_bytes(diff.stdout)
    assert main(["explore", "root-recycled", "--policy", str(tmp_path / "idea.patch")]) == 1


def test_every_page_is_a_topic() -> None:
    pages = {
        entry.name for entry in resources.files("emulator.guide").iterdir() if entry.name.endswith(".md")
    }
    assert pages == {f"{topic}.md" for topic in TOPICS}


@pytest.mark.parametrize("topic", TOPICS)
def test_pages_are_whole(topic: str) -> None:
    text = page(topic)
    assert text.startswith(f"# {title(topic)}\n")
    assert "<!-- generated" not in text


def test_readme_is_read_in_two_minutes_and_leads_to_every_page() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
    assert len(text.split()) <= 900
    assert set(re.findall(r"\]\(emulator/guide/(\w+)\.md\)", text)) == set(TOPICS)


@pytest.mark.slow
def test_each_decision_point_is_asked_somewhere() -> None:
    assert set(questions()) == {point.name for point in POINTS}
    assert all(places for places in questions().values())


def test_policies_page_has_each_point_and_each_alternative() -> None:
    text = page("policies")
    for point in POINTS:
        assert f"### `{point.name}(" in text
        for name in point.names():
            assert f"* `{name}`" in text


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_each_attribute_of_an_argument_is_described(argument: str) -> None:
    """A name alone sends the reader into the source."""
    described = f"* `{argument}`, a `{ARGUMENTS[argument].__name__}`: "
    (line,) = (line for line in page("policies").splitlines() if line.startswith(described))
    unknown = [name for name in attributes_of(ARGUMENTS[argument]) if not re.search(rf"\b{name}\b", line)]
    assert unknown == []


@pytest.mark.parametrize(
    ("argument", "attributes"),
    [
        ("cpu", {"id", "machine"}),
        ("cpu.machine", {"cpus", "pcpus"}),
        ("vcpu", {"id", "kvm", "mmu", "loaded"}),
        ("kvm", {"vcpus", "policy", "mmu_lock"}),
        ("root", {"hfn", "role"}),
        ("slot", {"base_gfn", "npages", "dirty_bitmap"}),
        ("vcpu.mmu", {"root", "prev_roots"}),
        ("vcpu.mmu.root", {"sp"}),
        ("vcpu.arch", {"cr0", "cr3", "smm"}),
        ("vcpu.loaded_vmcs", {"cpu"}),
        ("root.role", {"level", "smm"}),
    ],
)
def test_attributes_of_arguments(argument: str, attributes: set[str]) -> None:
    assert attributes <= set(attributes_of(ARGUMENTS[argument]))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guide"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[2] for line in listed.splitlines()] == list(TOPICS)
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert main(["guide", "policies"]) == 0
    assert capsys.readouterr().out == page("policies") + "\n"


def test_unknown_topic(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match=r"no topic 'polices'; expected one of .*did you mean policies"):
        page("polices")
    assert main(["guide", "polices"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_on_policies_has_and_uses_all_that_a_policy_can_do() -> None:
    text = page("policies")
    example = next(step.text for step in steps("policies") if step.name == "all.py")
    for moment, parameters in MOMENTS.items():
        # A root's type stands behind its name.
        shown = ", ".join(f"{name}: KvmMmuPage" if name == "root" else name for name in parameters)
        assert f"`{moment}({shown})`: " in text
        assert f"    def {moment}({', '.join(parameters)}):" in example
    assert set(STATES) == set(State.__subclasses__())
    for kind in STATES:
        assert f"* `{kind.__name__}`: " in text
        assert f"({kind.__name__})" in example
    for name in instructions.__all__:
        if inspect.isfunction(getattr(instructions, name)):
            assert f"* `{name}(" in text
            assert f"do.{name}(" in example
    acting = [point.name for point in POINTS if point.acts]
    assert all(f"`{point}`" in text for point in acting)
