"""The contracts of pyproject.toml hold, and an import that breaks one is found."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checked folders, of which nothing is imported."""
    directory = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", directory)
    for package in ("emulator", "native", "metrics"):
        for source in (ROOT / package).rglob("*.py"):
            copy = directory / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text())
    return directory


@pytest.mark.slow
def test_contracts_hold(checkout: Path) -> None:
    done = lint_imports(checkout)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("emulator/kvm/mmu/mmu.py", "metrics"),
        ("native/brief.py", "emulator.errors"),
        ("emulator/kvm/virt/requests.py", "emulator.actors.pcpu"),
        ("emulator/kvm/structs.py", "emulator.policy"),
        ("emulator/kvm/mmu/tdp_roots.py", "emulator.kvm.mmu.tdp_mmu"),
        ("emulator/kvm/mmu/tdp_dirty.py", "emulator.kvm.mmu.page_fault"),
        ("emulator/kvm/mmu/mmu.py", "emulator.kvm.virt.mmu_notifier"),
        ("emulator/kvm/x86.py", "emulator.kvm.vmx.vmx"),
        ("emulator/kvm/mmu/roots.py", "emulator.kvm.vmx.vmcs"),
        ("emulator/kvm/virt/vm.py", "emulator.kvm.mmu.tdp_mmu"),
        ("emulator/litmus/runner.py", "emulator.explore.results.suite"),
        ("emulator/explore/engine/scheduler.py", "emulator.explore.strategies.dpor"),
        ("emulator/explore/strategies/search.py", "emulator.litmus.evidence"),
    ],
)
def test_an_import_upwards_is_found(checkout: Path, module: str, imported: str) -> None:
    source = checkout / module
    before = source.read_text()
    try:
        # A late import is one, too.
        source.write_text(f"{before}\n\ndef late() -> None:\n    import {imported}\n")
        done = lint_imports(checkout)
    finally:
        source.write_text(before)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
    assert imported.partition(".")[0] in done.stdout


def test_each_module_of_kvm_has_its_place_in_the_order() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one.get("containers") == ["emulator.kvm"])
    listed = sorted(module for layer in contract["layers"] for module in layer.split(" | "))
    package = ROOT / "emulator/kvm"
    modules = (path.relative_to(package).with_suffix("") for path in package.rglob("*.py"))
    assert listed == sorted(".".join(module.parts) for module in modules if module.name != "__init__")


@pytest.mark.slow
def test_common_code_names_no_function_of_a_vendor() -> None:
    package = ROOT / "emulator/kvm"
    common = [path for path in package.rglob("*.py") if path.parent.name != "vmx"]
    names = [
        (path.name, name)
        for path in common
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None))
        if isinstance(name, str) and name.startswith(("vmx_", "svm_"))
    ]
    assert len(common) > 25
    assert not names
