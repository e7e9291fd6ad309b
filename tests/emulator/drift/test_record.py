"""The record of fingerprints: the shipped one, and those that users make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emulator.drift.record import load_record, record_tree, shipped_record
from emulator.drift.tree import read_tree
from emulator.errors import BadInput
from tests.emulator.drift.made_up import LINUX, LINUX_OLD, copied

NAMES = ["kvm_mmu_load", "kvm_mmu_unload", "kvm_set_cr3", "kvm_vcpu_kick", "no_such_function"]


def test_a_new_record_follows_its_first_tree(tmp_path: Path) -> None:
    old, new = read_tree(LINUX_OLD), read_tree(LINUX)
    file = tmp_path / "own.json"
    record_tree(file, new, NAMES)
    record = record_tree(file, old, NAMES)
    assert record == load_record(file)
    assert (record.modelled, record.versions) == ("7.4.0-rc2", ["7.3.0", "7.4.0-rc2"])
    assert set(record.functions) == set(NAMES) - {"no_such_function"}
    # One body in two files; one function in one version only; one that changed.
    files = [one.file for one in record.functions["kvm_set_cr3"]]
    assert files == ["arch/x86/kvm/x86.c", "arch/x86/kvm/regs.c"]
    assert record.fingerprints("kvm_set_cr3", "7.3.0") == record.fingerprints("kvm_set_cr3", "7.4.0-rc2")
    assert record.fingerprints("kvm_mmu_unload", "7.4.0-rc2") == frozenset()
    assert record.fingerprints("kvm_mmu_load", "7.3.0") != record.fingerprints("kvm_mmu_load", "7.4.0-rc2")
    assert record.versions_with("kvm_vcpu_kick", new.fingerprints("kvm_vcpu_kick")) == record.versions
    assert record.versions_with("kvm_mmu_load", old.fingerprints("kvm_mmu_load")) == ["7.3.0"]


def test_recording_again_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    for tree in (LINUX_OLD, LINUX):
        record_tree(file, read_tree(tree), NAMES)
    before = file.read_bytes()
    for tree in (LINUX, LINUX_OLD, LINUX):
        record_tree(file, read_tree(tree), NAMES)
    assert file.read_bytes() == before


def test_a_version_is_replaced_and_what_is_not_cited_any_more_leaves(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    tree = copied(LINUX_OLD, tmp_path / "tree")
    first = record_tree(file, read_tree(tree), NAMES)
    source = tree / "arch/x86/kvm/mmu/mmu.c"
    source.write_text(source.read_text().replace("return r;", "return -r;"))
    second = record_tree(file, read_tree(tree), NAMES[:2])
    assert set(second.functions) == set(NAMES[:2])
    assert len(second.functions["kvm_mmu_load"]) == 1
    assert second.functions["kvm_mmu_load"] != first.functions["kvm_mmu_load"]
    assert second.functions["kvm_mmu_unload"] == first.functions["kvm_mmu_unload"]


def test_odd_names_of_files_are_recorded(tmp_path: Path) -> None:
    tree = copied(LINUX_OLD, tmp_path / "tree")
    folder = tree / "arch/x86/kvm" / ("deep/" * 60)
    folder.mkdir(parents=True)
    (folder / "\udcff.c").write_text("void kvm_mmu_zap_all(void) { }\n")
    file = tmp_path / "own.json"
    for _ in range(2):
        record_tree(file, read_tree(tree), ["kvm_mmu_zap_all"])
    (one,) = load_record(file).functions["kvm_mmu_zap_all"]
    assert one.file.startswith("arch/x86/kvm/deep/deep/")


def test_versions_are_in_the_order_of_releases(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    for number, version in enumerate(["6.12.3", "6.9.0", "7.0.0", "6.12.10"]):
        record_tree(file, read_tree(copied(LINUX_OLD, tmp_path / str(number), version)), NAMES)
    record_tree(file, read_tree(copied(LINUX_OLD, tmp_path / "final", "7.4.0")), NAMES)
    record_tree(file, read_tree(LINUX), NAMES)
    later = copied(LINUX, tmp_path / "later")
    (later / "Makefile").write_text((LINUX / "Makefile").read_text().replace("-rc2", "-rc10"))
    record_tree(file, read_tree(later), NAMES)
    record = load_record(file)
    releases = ["6.9.0", "6.12.3", "6.12.10", "7.0.0", "7.4.0-rc2", "7.4.0-rc10", "7.4.0"]
    assert record.versions == releases
    assert record.modelled == "6.12.3"
    assert record.version_named("6.12") == "6.12.10"
    assert record.version_named("6.12.3") == "6.12.3"
    assert record.version_named("7.4.0-rc2") == "7.4.0-rc2"
    assert record.version_named("7") == "7.4.0"
    with pytest.raises(BadInput, match=r"--since: found '6\.1'; expected one of 6\.9\.0"):
        record.version_named("6.1")


def test_the_shipped_record_has_hashes_and_no_source() -> None:
    record = shipped_record()
    assert record.modelled in record.versions
    assert record.modelled.startswith("7.3.")
    assert record.versions == sorted(record.versions, key=lambda one: [int(part) for part in one.split(".")])
    assert len(record.functions) > 150
    for name, entries in record.functions.items():
        assert name.replace("_", "").isalnum()
        for one in entries:
            assert set(one.versions) <= set(record.versions)
            assert one.file.endswith((".c", ".h"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document.pop("modelled"), "modelled: found nothing"),
        (
            lambda document: document.update(modelled="1.2.3"),
            "modelled: found '1.2.3'; expected one of 7.3.0",
        ),
        (lambda document: document.update(versions=[]), "versions: found []; expected at least 1 entries"),
        (lambda document: document.update(own=1), "own: found an unknown key; expected one of functions"),
        (
            lambda document: document["functions"]["kvm_set_cr3"][0].update(fingerprint="x"),
            "functions.kvm_set_cr3[0].fingerprint: found 'x'",
        ),
    ],
)
def test_what_is_wrong_in_a_record_is_said_in_one_line(tmp_path: Path, change: object, said: str) -> None:
    file = tmp_path / "own.json"
    record_tree(file, read_tree(LINUX_OLD), NAMES)
    document = json.loads(file.read_text())
    assert callable(change)
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(BadInput) as caught:
        load_record(file)
    assert str(caught.value).startswith(f"{file}: {said}")


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"functions": 3}'])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    file = tmp_path / "own.json"
    file.write_text(text)
    with pytest.raises(BadInput, match=r"own\.json: "):
        load_record(file)
    with pytest.raises(BadInput, match=r"own\.json: "):
        record_tree(file, read_tree(LINUX), NAMES)
    assert file.read_text() == text
