"""`flushlab drift` on made-up trees: its output as text, as JSON and as a diff, and its exit status."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from emulator.cli.main import main
from emulator.drift.compare import Status
from tests.emulator.drift.made_up import LINUX, LINUX_OLD, copied

Captured = pytest.CaptureFixture[str]


def document(capsys: Captured, *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["drift", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def own_record(tmp_path: Path, capsys: Captured) -> Path:
    """A record of the older tree, which is then the modelled version, and of the newer one."""
    file = tmp_path / "own.json"
    assert main(["drift", str(LINUX_OLD), "--record", str(file)]) == 0
    assert main(["drift", str(LINUX), "--record", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: 8 functions of Linux 7.3.0; versions: 7.3.0",
        f"{file}: 7 functions of Linux 7.4.0-rc2; versions: 7.3.0, 7.4.0-rc2",
    ]
    return file


EXPECTED = {
    "kvm_mmu_load": "changed",
    "kvm_mmu_unload": "gone",
    "kvm_mmu_zap_all_fast": "gone",
    "handle_cr": "added",
    "kvm_set_cr3": "same",
    "kvm_flush_remote_tlbs": "same",
    "kvm_make_all_cpus_request": "same",
    "kvm_vcpu_kick": "same",
    "vcpu_enter_guest": "same",
}


def test_the_modelled_version_has_not_changed(own_record: Path, capsys: Captured) -> None:
    assert main(["drift", str(LINUX_OLD), "--fingerprints", str(own_record)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Linux 7.3.0, compared with Linux 7.3.0, which the model follows",
        "",
        "cited functions: 8; 8 same, 0 changed, 0 gone, 0 added, 0 not recorded",
    ]


@pytest.mark.parametrize("by", ["record", "tree"])
def test_each_function_has_a_status(by: str, own_record: Path, capsys: Captured) -> None:
    base = ["--fingerprints", str(own_record)] if by == "record" else ["--against", str(LINUX_OLD)]
    status, found = document(capsys, str(LINUX), *base)
    assert status == 1
    assert (found["version"], found["compared_with"]) == ("7.4.0-rc2", "7.3.0")
    functions = {one["name"]: one for one in found["functions"]}
    assert {name: one["status"] for name, one in functions.items()} == EXPECTED
    assert found["counts"] == {"same": 5, "changed": 1, "gone": 2, "added": 1, "not recorded": 0}
    assert functions["kvm_mmu_zap_all_fast"]["renamed"] == ["kvm_mmu_zap_everything"]
    assert functions["kvm_mmu_unload"]["renamed"] == functions["kvm_mmu_unload"]["similar"] == []
    assert [one["file"] for one in functions["kvm_set_cr3"]["places"]] == ["arch/x86/kvm/regs.c"]
    assert any(
        one["file"] == "emulator/kvm/mmu/roots.py" and one["how"] == "mirrored"
        for one in functions["kvm_mmu_load"]["citations"]
    )
    same_as = ["7.4.0-rc2"] if by == "record" else []
    assert functions["kvm_mmu_load"]["same_as"] == functions["handle_cr"]["same_as"] == same_as


def test_the_other_way_round(own_record: Path, capsys: Captured) -> None:
    status, found = document(capsys, str(LINUX_OLD), "--fingerprints", str(own_record), "--since", "7.4")
    assert status == 1
    swap = {"gone": "added", "added": "gone"}
    statuses = {one["name"]: one["status"] for one in found["functions"]}
    assert statuses == {name: swap.get(one, one) for name, one in EXPECTED.items()}


def test_text_is_grouped_by_our_files_and_fits_80_columns(own_record: Path, capsys: Captured) -> None:
    assert main(["drift", str(LINUX), "--fingerprints", str(own_record)]) == 1
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = out.splitlines()
    at = lines.index("emulator/kvm/mmu/roots.py")
    assert lines[at + 1].split(None, 1)[1].startswith("kvm_mmu_load: changed; as in 7.4.0-rc2;")
    assert "kvm_mmu_zap_all_fast: gone; its body is kvm_mmu_zap_everything() now" in " ".join(out.split())
    assert "handle_cr: not in 7.3.0; as in 7.4.0-rc2; arch/x86/kvm/regs.c:7" in " ".join(out.split())
    assert "kvm_set_cr3" not in out
    assert main(["drift", str(LINUX), "--fingerprints", str(own_record), "--all"]) == 1
    assert "kvm_set_cr3: same; arch/x86/kvm/regs.c:1" in capsys.readouterr().out


def test_an_unknown_body_is_in_no_recorded_version(
    tmp_path: Path, own_record: Path, capsys: Captured
) -> None:
    tree = copied(LINUX, tmp_path / "patched")
    source = tree / "arch/x86/kvm/mmu/mmu.c"
    source.write_text(source.read_text().replace("!made_up_tracked", "made_up_tracked"))
    main(["drift", str(tree), "--fingerprints", str(own_record), "--function", "kvm_mmu_load"])
    assert "kvm_mmu_load: changed; as in no recorded version;" in " ".join(capsys.readouterr().out.split())


def test_a_function_that_was_never_recorded_is_told(own_record: Path, capsys: Captured) -> None:
    own = json.loads(own_record.read_text())
    del own["functions"]["kvm_set_cr3"]
    own_record.write_text(json.dumps(own))
    status, found = document(capsys, str(LINUX_OLD), "--fingerprints", str(own_record))
    assert status == 1
    assert {one["name"] for one in found["functions"] if one["status"] == "not recorded"} == {"kvm_set_cr3"}


def test_a_diff_of_what_changed(capsys: Captured) -> None:
    words = [str(LINUX), "--against", str(LINUX_OLD), "--diff"]
    assert main(["drift", *words]) == 1
    out = capsys.readouterr().out
    assert "--- a/arch/x86/kvm/mmu/mmu.c\tLinux 7.3.0, line 10\n" in out
    assert "+++ b/arch/x86/kvm/mmu/mmu.c\tLinux 7.4.0-rc2, line 8\n" in out
    assert "\n-\tmade_up_flush(vcpu);\n" in out
    assert "\n+\tif (!made_up_tracked(vcpu))\n" in out
    assert out.count("\n--- ") == 1
    _, found = document(capsys, *words)
    diffs = {one["name"]: one["diff"] for one in found["functions"] if "diff" in one}
    assert list(diffs) == ["kvm_mmu_load"]
    assert diffs["kvm_mmu_load"] in out


def test_control_characters_of_a_tree_do_not_reach_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    tree = copied(LINUX, tmp_path / "tree")
    source = tree / "arch/x86/kvm/mmu/mmu.c"
    source.write_bytes(source.read_bytes().replace(b"return r;", b'return "\x1b[31m\xff";'))
    assert main(["drift", str(tree), "--against", str(LINUX_OLD), "--diff"]) == 1
    out = capsys.readouterr().out
    assert 'return "\\x1b[31m\\udcff";' in out
    assert all(c.isprintable() or c in "\n\t" for c in out)


def test_only_the_functions_that_were_asked_for(capsys: Captured) -> None:
    words = ["--against", str(LINUX_OLD), "--function", "kvm_set_cr3", "--function", "kvm_vcpu_kick"]
    status, found = document(capsys, str(LINUX), *words)
    assert (status, [one["status"] for one in found["functions"]]) == (0, ["same", "same"])


def test_the_shipped_record_is_the_default(capsys: Captured) -> None:
    status, found = document(capsys, str(LINUX_OLD))
    assert status == 1
    assert found["compared_with"].startswith("7.3.")
    assert {one["status"] for one in found["functions"] if one["places"]} == {"changed"}
    assert list(found["counts"]) == [str(status) for status in Status]
    assert found["counts"]["gone"] > 150


def test_what_is_found_nowhere_is_told(own_record: Path, capsys: Captured) -> None:
    """Functions that the made-up trees lack; but none with an origin, and no name of our own."""
    _, found = document(capsys, str(LINUX), "--fingerprints", str(own_record))
    nowhere = found["found_nowhere"]
    assert {"kvm_tdp_mmu_map", "tdp_mmu_zap_leafs"} <= set(nowhere)
    assert not {"local_irq_disable", "tdp_mmu_zap_root_work"} & set(nowhere)
    assert not {"kvm_mmu_load", "kvm_mmu_unload", "handle_cr", "tdp_mmu_zap_step"} & set(nowhere)
    assert all(any(one["how"] != "named" for one in places) for places in nowhere.values())
    native = [place for places in nowhere.values() for place in places if place["file"].startswith("native/")]
    assert native
    for name, places in nowhere.items():
        if not any(one["file"].endswith(".py") for one in places):
            assert all(one["how"] != "named" for one in places), name
    main(["drift", str(LINUX), "--fingerprints", str(own_record), "--all"])
    out = capsys.readouterr().out
    assert "        tdp_mmu_zap_leafs: emulator/kvm/" in out
    assert "        local_irq_disable: include/linux/irqflags.h\n" in out
    assert "        tdp_mmu_zap_root_work: 5.18 to 6.5\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_an_origin_is_looked_up(own_record: Path, tmp_path: Path, capsys: Captured) -> None:
    """A tree that has the file, and not the function in it, contradicts the citation."""
    tree = tmp_path / "linux"
    shutil.copytree(LINUX, tree)
    header = tree / "include/linux/irqflags.h"
    for text, found in (("#define local_irq_disable() x", False), ("#define local_irq_disables() x", True)):
        header.write_text(text)
        _, one = document(capsys, str(tree), "--fingerprints", str(own_record))
        assert ("local_irq_disable" in one["found_nowhere"]) == found


# --- unusable input -----------------------------------------------------------------------------------------


def refused(capsys: Captured, *words: str) -> str:
    """The one line that is said."""
    status = main(["drift", *words])
    out, errors = capsys.readouterr()
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    return errors


def test_a_directory_that_is_no_tree(tmp_path: Path, capsys: Captured) -> None:
    expected = "expected the top directory of a Linux source tree"
    assert f"{tmp_path}/Makefile: No such file or directory; {expected}" in refused(capsys, str(tmp_path))
    assert expected in refused(capsys, str(tmp_path / "missing"))
    (tmp_path / "Makefile").write_text("all:\n\tcc\n")
    assert f"no Linux version in its first lines, but 'all:\\n\\tcc\\n'; {expected}" in refused(
        capsys, str(tmp_path)
    )
    (tmp_path / "Makefile").write_text("VERSION = 7\nPATCHLEVEL = 3\n")
    assert "no Linux version" in refused(capsys, str(tmp_path))


def test_an_archive(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "linux.tar.xz").write_bytes(b"\xfd7zXZ")
    assert "a file; expected the top directory of a Linux source tree, unpacked" in refused(
        capsys, str(tmp_path / "linux.tar.xz")
    )


@pytest.mark.parametrize("part", ["arch/x86/kvm", "virt/kvm", "include/linux", "arch/x86/include/asm"])
def test_a_tree_without_one_of_the_parts(part: str, tmp_path: Path, capsys: Captured) -> None:
    tree = copied(LINUX, tmp_path / "tree")
    shutil.rmtree(tree / part)
    assert f"{tree}/{part}: No such file or directory" in refused(capsys, str(tree))


def test_a_tree_without_functions(tmp_path: Path, capsys: Captured) -> None:
    tree = copied(LINUX, tmp_path / "tree")
    for source in tree.rglob("*.[ch]"):
        source.write_text("int a;\n")
    assert "no C function in arch/x86/kvm and virt/kvm" in refused(capsys, str(tree))


def test_what_is_no_file_in_a_tree_is_left_alone(tmp_path: Path, capsys: Captured) -> None:
    tree = copied(LINUX, tmp_path / "tree")
    os.mkfifo(tree / "virt/kvm/pipe.c")
    (tree / "virt/kvm/folder.c").mkdir()
    (tree / "virt/kvm/loop.c").symlink_to("loop.c")
    status, _ = document(capsys, str(tree), "--against", str(LINUX), "--function", "kvm_mmu_load")
    assert status == 0
    (tree / "Makefile").unlink()
    os.mkfifo(tree / "Makefile")
    assert f"{tree}/Makefile: no regular file" in refused(capsys, str(tree))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--diff"], "--diff: found no --against; expected a second tree"),
        (["--since", "3.10"], "--since: found '3.10'; expected one of 5.10."),
        (
            ["--function", "kvm_mmu_lod"],
            "--function: found 'kvm_mmu_lod'; expected a kernel function that the model",
        ),
        (["--function", "kvm_mmu_lod"], "(did you mean kvm_mmu_load?)"),
        (["--against", str(LINUX_OLD), "--since", "6.12"], "--since: found --against, which needs no record"),
        (["--against", str(LINUX_OLD), "--fingerprints", "x"], "--fingerprints: found --against"),
        (["--against", "missing"], "missing/Makefile: No such file or directory"),
        (["--fingerprints", "missing.json"], "missing.json: No such file or directory"),
        (["--record", "own.json", "--json"], "--json: found --record, which compares nothing"),
        (["--record", "own.json", "--against", "x"], "--against: found --record, which compares nothing"),
        (["--record", "."], "--record .: it is a directory"),
        (["--record", "missing/own.json"], "--record missing/own.json: No such file or directory"),
        (
            ["--function", "tdp_mmu_zap_leafs", "--against", str(LINUX)],
            "found 'tdp_mmu_zap_leafs'; expected a function of",
        ),
    ],
)
def test_options_that_do_not_fit(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, str(LINUX), *words)
    assert list(tmp_path.iterdir()) == []
