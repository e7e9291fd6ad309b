"""KVM notices an INVEPT or an INVVPID that fails, and says which one."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulator.cli.main import main
from emulator.kvm.vmx.vmx_ops import (
    ept_sync_context,
    invvpid_individual_addr,
    invvpid_single_context,
    invvpid_single_non_global,
)
from native import lib
from native.types import Vpid
from tests.emulator.kvm.rig import Rig
from tests.emulator.policy.patch.edits import edited, written


def test_invept(rig: Rig) -> None:
    kvm, cpu = rig.vm(), rig.machine.cpus[0]
    ept_sync_context(cpu, kvm, 0x1000 | 3 << 3 | 6, lib.REASON_OTHER)
    with pytest.raises(AssertionError, match=r"^WARN_ONCE: invept failed: ext=0x1 eptp=0x1006$"):
        ept_sync_context(cpu, kvm, 0x1006, lib.REASON_OTHER)


def test_invvpid(rig: Rig) -> None:
    kvm, cpu = rig.vm(), rig.machine.cpus[0]
    invvpid_single_context(cpu, kvm, Vpid(1), lib.REASON_OTHER)
    invvpid_single_non_global(cpu, kvm, Vpid(1), lib.REASON_OTHER)
    invvpid_individual_addr(cpu, kvm, Vpid(1), 0x5000, lib.REASON_OTHER)
    with pytest.raises(AssertionError, match=r"^WARN_ONCE: invvpid failed: ext=0x1 vpid=0 gva=0x0$"):
        invvpid_single_context(cpu, kvm, Vpid(0), lib.REASON_OTHER)
    with pytest.raises(AssertionError, match=r"^WARN_ONCE: invvpid failed: ext=0x3 vpid=0 gva=0x0$"):
        invvpid_single_non_global(cpu, kvm, Vpid(0), lib.REASON_OTHER)
    with pytest.raises(AssertionError, match=r"^WARN_ONCE: invvpid failed: ext=0x0 vpid=1 gva=0x8000000"):
        invvpid_individual_addr(cpu, kvm, Vpid(1), 1 << 47, lib.REASON_OTHER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (("VMX_EPTP_MT_WB | levels | ad", "VMX_EPTP_MT_WB | ad"), "invept failed: ext=0x1 eptp=0x1046"),
        (
            (
                "    invvpid_single_context(cpu, kvm, vpid, reason)\n",
                "    invvpid_single_context(cpu, kvm, 0, reason)\n",
            ),
            "invvpid failed: ext=0x1 vpid=0 gva=0x0",
        ),
    ],
)
def test_a_patch_that_builds_a_bad_operand_is_told(
    edit: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Explored and on real threads; nothing is proved of it."""
    patch = written(tmp_path, edited(edit))
    for command in (["explore"], ["litmus", "--iterations", "2"]):
        assert main([command[0], "root-recycled", *command[1:], "--policy", patch]) == 1
        assert f"AssertionError: WARN_ONCE: {said}" in " ".join(capsys.readouterr().out.split())
