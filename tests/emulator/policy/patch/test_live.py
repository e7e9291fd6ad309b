"""Patched code is KVM's while its policy runs, everywhere in the process, and nowhere afterwards."""

from __future__ import annotations

import ast
import gc
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import emulator
import metrics
from emulator.cli.main import main
from emulator.policy import Policy, spelled_policy
from emulator.policy.imports import is_patchable
from emulator.policy.patch.code import load_shipped
from tests.emulator.policy.patch.edits import BREAKS_ALL, NO_FLUSH, edited, new_file, written

pytestmark = pytest.mark.slow

TEST = "return-zap"
HERE = Path(__file__).parents[4]


def verdicts(
    command: str, jobs: int, policies: list[str], capsys: pytest.CaptureFixture[str]
) -> dict[tuple[str, str], list[str]]:
    """The verdict of each test and policy."""
    arguments = [f"--policy={policy}" for policy in policies]
    more = ["--iterations", "10", "--seed", "1"] if command == "litmus" else []
    main([command, TEST, "--jobs", str(jobs), "--json", *more, *arguments])
    document = json.loads(capsys.readouterr().out)
    found = document["explored" if command == "explore" else "outcomes"]
    return {(one["test"], one["policy"]): sorted(set(one["violations"])) for one in found}


@pytest.mark.parametrize(("command", "jobs"), [("explore", 1), ("explore", 2), ("litmus", 1), ("litmus", 2)])
def test_other_policies_have_the_verdicts_that_they_have_alone(
    command: str, jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the policies is a patch that breaks everything, another one a patch with one bug.

    Each of them follows each other one at once.
    """
    bad, worse = written(tmp_path, NO_FLUSH), written(tmp_path, BREAKS_ALL, "worse.patch")
    good = "linux-7.3"
    alone: dict[tuple[str, str], list[str]] = {}
    for policy in (worse, good, bad):
        alone |= verdicts(command, jobs, [policy], capsys)
    assert not alone[TEST, "linux-7.3"]
    assert alone[TEST, bad]
    assert alone[TEST, worse]
    for order in ([worse, good, bad], [bad, good, worse], [good, worse, bad], [bad, worse, good]):
        assert verdicts(command, jobs, order, capsys) == alone


def test_a_search_by_many_processes_is_the_search_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process of the pool applies the patch for itself."""
    path = written(tmp_path, edited(("    cpu.stat(vcpu.kvm.id, lib.STAT_FLUSH_CURRENT)\n", "    ...\n")))
    documents = []
    for jobs in ("1", "2"):
        options = ["--executions", "120", "--jobs", jobs, "--json"]
        assert main(["explore", "fault-races-unmap", "--policy", path, *options]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1]
    assert documents[0]["explored"][0]["executions"] == 120


@pytest.mark.parametrize("first", [True, False])
def test_compare(first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worse = written(tmp_path, BREAKS_ALL, "worse.patch")
    order = [worse, "linux-7.3"] if first else ["linux-7.3", worse]
    arguments = [f"--policy={policy}" for policy in order]
    main(["compare", "migration-storm", "--duration", "1s", "--seed", "3", "--json", *arguments])
    document = json.loads(capsys.readouterr().out)
    found = {one["name"]: one["verdict"] for one in document["policies"]}
    assert found == {"worse.patch": "violations", "linux-7.3": "clean"}


def test_a_recorded_execution_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, NO_FLUSH)
    found = tmp_path / "found"
    assert main(["explore", "return-zap", "--policy", path, "--output", str(found)]) == 1
    (record,) = found.iterdir()
    Path(path).unlink()
    assert main(["explore", "--replay", str(record)]) == 1
    capsys.readouterr()
    assert main(["explain", str(record)]) == 0
    assert "ELIDED" in capsys.readouterr().out


def test_nothing_on_disk_changes(tmp_path: Path) -> None:
    directory = Path(next(iter(importlib.import_module("emulator.kvm").__path__)))
    before = {file: file.read_bytes() for file in directory.rglob("*.py")}
    with spelled_policy(written(tmp_path, BREAKS_ALL + new_file("new.py", "x = 1\n"))).confined():
        assert importlib.import_module("emulator.kvm.new").x == 1
    assert {file: file.read_bytes() for file in directory.rglob("*.py")} == before
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("emulator.kvm.new")


# --- composition --------------------------------------------------------------------------------------------

FIRST = '    if answer == "all-contexts":\n        request_tlb_flush('
SECOND = f"    if answer == 'none' and vcpu:\n        return\n{FIRST}"
ON_TOP = edited((FIRST, SECOND))


def test_spellings(tmp_path: Path) -> None:
    path = written(tmp_path, NO_FLUSH)
    based = written(tmp_path, f"From: me\n\nFlushlab-Base: linux-5.18\n---\n{NO_FLUSH}", "based.patch")

    def answers(text: str) -> tuple[str, dict[str, str]]:
        policy = spelled_policy(text)
        again = spelled_policy(policy.spelled(), policy.name)
        assert again == policy
        default = Policy().answers()
        return policy.name, {p: a for p, a in policy.answers().items() if a != default[p]}

    linux_5_18 = answers("linux-5.18")[1]
    assert answers(path) == ("idea.patch", {})
    assert answers(f"linux-5.18+{path}") == ("linux-5.18+idea.patch", linux_5_18)
    assert answers(based) == ("based.patch", linux_5_18)
    assert answers(f"linux-7.3+{based}") == ("linux-7.3+based.patch", {})
    assert answers(f"{path},zap=flush-per-table") == (
        "idea.patch+zap=flush-per-table",
        {"zap": "flush-per-table"},
    )
    wanted = "mutant:P1+idea.patch+zap=flush-per-table+zap_scope=leafs-and-tables"
    assert answers(f"mutant:P1+{path}+zap_scope=leafs-and-tables,zap=flush-per-table")[0] == wanted
    assert spelled_policy(f"mutant:P1+{path}").mutants() == spelled_policy("mutant:P1").mutants()
    assert spelled_policy(f"mutant:B6+{path}").mutants() == ("iterator-skips-spte",)


def test_patches_in_a_row(tmp_path: Path) -> None:
    """A series is applied in its order: the second patch needs the first one's lines in its context."""
    (tmp_path / "a+b=c").mkdir()
    first = written(tmp_path / "a+b=c", NO_FLUSH, "2-first.patch")
    second = written(
        tmp_path / "a+b=c", ON_TOP.replace("kvm.policy.migration(cpu, vcpu)", '"none"'), "1.diff"
    )
    series = tmp_path / "a+b=c" / "series"
    both = spelled_policy(f"{first}+{second}")
    assert both.name == "2-first.patch+1.diff"
    with both.confined():
        pass
    with pytest.raises(Exception, match="hunk 1 of"):
        spelled_policy(f"{second}+{first}")
    with pytest.raises(Exception, match="hunk 1 of"):
        spelled_policy(f"{tmp_path}/a+b=c/")
    series.write_text("# in order\n2-first.patch\n\n1.diff -p1\n")
    for text in (f"{tmp_path}/a+b=c/", str(series), f"linux-7.3+{series}"):
        policy = spelled_policy(text)
        assert policy.patch is not None
        assert both.patch is not None
        assert policy.patch.sources == both.patch.sources


# --- references ---------------------------------------------------------------------------------------------


def load_everything() -> None:
    for package in (emulator, metrics):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def own_objects(modules: dict[str, ModuleType]) -> dict[int, str]:
    """The objects that only these modules of emulator.kvm should have, by identity."""
    found = {}
    for module in modules.values():
        found[id(module)] = module.__name__
        for name, value in vars(module).items():
            kind = value if isinstance(value, FunctionType | type) else type(value)
            if not name.startswith("__") and is_patchable(kind.__module__):
                found[id(value)] = f"{module.__name__}.{name}"
            if isinstance(value, type) and is_patchable(value.__module__):
                members = ((n, v) for n, v in vars(value).items() if isinstance(v, FunctionType))
                found |= {
                    id(v): f"{value.__qualname__}.{n}" for n, v in members if is_patchable(v.__module__)
                }
    return found


def reached(objects: dict[int, str], modules: dict[str, ModuleType]) -> Iterator[str]:
    """Which of the objects can be reached from modules outside of emulator.kvm, and by which way."""
    others = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in ("emulator", "metrics") and not is_patchable(name)
    ]
    seen = {id(vars(module)) for module in modules.values()}
    pending: list[tuple[object, tuple[str, ...]]] = [(module, (module.__name__,)) for module in others]
    while pending:
        obj, way = pending.pop()
        if id(obj) in seen:
            continue
        seen.add(id(obj))
        if id(obj) in objects:
            yield " > ".join((*way, objects[id(obj)]))
            continue
        if isinstance(obj, ModuleType) and obj.__name__.partition(".")[0] not in ("emulator", "metrics"):
            continue
        if isinstance(obj, ModuleType) and obj.__name__.startswith("emulator.kernel_tree"):
            continue  # it is used with shipped code alone: --kernel refuses patches
        name = obj.__qualname__ if type(obj) in (FunctionType, type) else type(obj).__name__  # type: ignore
        pending += [(one, (*way, name)) for one in gc.get_referents(obj)]


def references(path: str) -> None:
    """Assert that no module outside of emulator.kvm keeps a reference: to the shipped code while patched code
    is live, or to patched code afterwards."""
    load_everything()
    for command in ("explore", "litmus"):
        main([command, "return-zap", "--policy", path, "--policy", "linux-7.3", "--jobs", "1"])
    shipped = dict(load_shipped())
    objects = own_objects(shipped)
    assert len(objects) > 200
    assert sum(1 for _ in reached(objects, shipped)) > 20
    with spelled_policy(path).confined():
        patched = dict(load_shipped())
        assert patched["emulator.kvm.structs"] is not shipped["emulator.kvm.structs"]
        kept = list(reached(objects, shipped))
        assert kept == [], kept
        mine = own_objects(patched)
        assert not mine.keys() & objects.keys()
        assert sum(1 for _ in reached(mine, patched)) > 20
    assert load_shipped() == shipped
    assert list(reached(mine, patched)) == []


def test_no_module_keeps_a_reference(tmp_path: Path) -> None:
    """By imported names, tables, class attributes, defaults, closures, caches.

    In a process of its own, because other tests' classes and fixtures lead to KVM's code as well.
    """
    path = written(tmp_path, NO_FLUSH)
    program = f"from {__name__} import references; references({path!r})"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_a_module_that_is_loaded_meanwhile_gets_the_shipped_code_back(tmp_path: Path) -> None:
    policy = spelled_policy(written(tmp_path, NO_FLUSH))
    name = "emulator.guide.reference"
    kept = sys.modules.pop(name, None)
    try:
        with policy.confined():
            late = importlib.import_module(name)
            patched = late.structs
        assert late.structs is load_shipped()["emulator.kvm.structs"] is not patched
        assert late.ARGUMENTS["kvm"] is late.structs.Kvm
    finally:
        if kept is not None:
            sys.modules[name] = kept


def test_a_constant_changes_wherever_it_was_imported(tmp_path: Path) -> None:
    importer = vars(importlib.import_module("emulator.litmus.kvm_ops"))
    before = importer["KVM_MEM_LOG_DIRTY_PAGES"]
    line = "KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0\n"
    policy = spelled_policy(written(tmp_path, edited((line, line.replace("<< 0", "<< 9")))))
    with policy.confined():
        assert importer["KVM_MEM_LOG_DIRTY_PAGES"] == 1 << 9
    assert before == importer["KVM_MEM_LOG_DIRTY_PAGES"] == 1


def evaluated_when_loaded(node: ast.AST) -> Iterator[ast.Name]:
    """Names in expressions that a module evaluates when it is loaded; annotations are not evaluated."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            given = [*child.decorator_list, *child.args.defaults, *filter(None, child.args.kw_defaults)]
            yield from (name for one in given for name in evaluated_when_loaded(one))
        elif isinstance(child, ast.AnnAssign):
            yield from evaluated_when_loaded(ast.Expr(child.value) if child.value else ast.Pass())
        elif isinstance(child, ast.Name):
            yield child
        elif not isinstance(child, ast.Lambda):
            yield from evaluated_when_loaded(child)


def test_no_module_computes_with_kvms_names_when_it_is_loaded() -> None:
    """Its result would be the shipped code's, and stay so under a patch.  Tables of classes are rebound."""
    tables = set()
    for package in (emulator, metrics):
        for file in Path(package.__path__[0]).rglob("*.py"):
            if "emulator/kvm" in str(file) or "emulator/policy/proposals" in str(file):
                continue
            if "emulator/kernel_tree" in str(file):
                continue  # stands beside the shipped presets alone
            tree = ast.parse(file.read_text())
            imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and is_patchable(n.module or "")]
            names = {alias.asname or alias.name for node in imports for alias in node.names}
            tables |= {(file.name, name.id) for name in evaluated_when_loaded(tree) if name.id in names}
    # The registries describe the shipped decisions and moments: a patch can add none for policies.
    classes = {(file, "structs") for file in ("watchable.py", "watching.py", "reference.py")}
    classes |= {(file, "mmu_structs") for file in ("watchable.py", "watching.py", "reference.py")}
    classes |= {(file, "LoadedVmcs") for file in ("watchable.py", "watching.py", "reference.py")}
    classes |= {
        ("watchable.py", "shadow_structs"),
        ("watching.py", "shadow_structs"),
        ("watching.py", "NestedVmx"),
        ("watching.py", "Vmcs12"),
        ("watchable.py", "Heard"),
        ("acting.py", "Heard"),
        ("acting.py", "Notifications"),
    }
    points = [f"points_{kind}.py" for kind in ("common", "hyperv", "nested", "shadow", "tdp")]
    assert tables == classes | {(file, "Decisions") for file in points}
