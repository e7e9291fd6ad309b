"""Boot, stop and death of whole machines."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from emulator.actors.base import MachineActor
from emulator.errors import BadInput
from emulator.job.emulation import Emulation, machine_config
from emulator.policy import preset
from emulator.scenario.config import Scenario, load_scenario
from emulator.scenario.sections import MachineSection, VmSection
from native import lib
from tests.support import VM0, wait_until

LINUX = preset("linux-7.3")


class Killed(BaseException):
    """An exception that no handler of the emulator expects."""


def small() -> Scenario:
    """The main job on 2 pCPUs and 1 VM."""
    scenario = load_scenario()
    vm = scenario.vm[0].model_copy(update={"count": 1, "memory": 16, "traces": ("cc1",)})
    return scenario.changed(vm=(vm,), machine=MachineSection(pcpus=2))


def entries(emulation: Emulation) -> int:
    return int(lib.vm_stat(emulation.m, VM0, lib.STAT_EXITS))


def kill(actor: MachineActor) -> None:
    assert actor.thread is not None
    assert actor.thread.ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(actor.thread.ident), ctypes.py_object(Killed)
    )
    # A sleeping pCPU executes no bytecode until it is woken.
    lib.cpu_notify(actor.cpu.m, actor.cpu.id, lib.ATTENTION_MESSAGE)


@pytest.mark.slow
def test_boots_runs_and_stops() -> None:
    with Emulation(small(), LINUX, seed=1) as emulation:
        emulation.start()
        wait_until(lambda: entries(emulation) > 100, "guests run")
        assert emulation.stop() == []
        assert not emulation.crew.deaths


@pytest.mark.slow
def test_context_stops_a_machine_whose_user_failed() -> None:
    threads = threading.active_count()
    emulation = Emulation(small(), LINUX)
    emulation.__enter__()
    emulation.start()
    emulation.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    wait_until(lambda: threading.active_count() == threads, "no thread is left")


@pytest.mark.slow
def test_never_started_machine_is_freed() -> None:
    with Emulation(small(), LINUX) as emulation:
        assert emulation.m


@pytest.mark.slow
@pytest.mark.parametrize("who", ["pcpu0", "kvm0", "host0", "scheduler"])
@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_killed_actor_ends_the_machine_with_a_report(who: str, delay: float) -> None:
    with Emulation(small(), LINUX, seed=2) as emulation:
        emulation.start()
        wait_until(lambda: entries(emulation) > 10, "guests run")
        time.sleep(delay)
        (victim,) = (actor for actor in emulation.crew.actors if actor.name == who)
        kill(victim)
        assert emulation.crew.stopped.wait(10)
        assert emulation.stop() == []
        death = emulation.crew.deaths[0]
        assert (death.who, death.cause.split(":")[0]) == (who, "Killed")
        assert "Traceback" in death.traceback


def test_config_fits_the_scenario() -> None:
    scenario = small()
    config = machine_config(scenario, seed=7, chaos=3, unbounded=True)
    assert config["l2_entries"] == 0
    assert (config["pcpus"], config["vms"], config["vcpus"], config["seed"]) == (2, 1, 2, 7)
    assert config["guest_frames"] > scenario.guest_pages


def test_unknown_trace_is_bad_input() -> None:
    scenario = small().changed(vm=(VmSection(traces=("nonsense",)),))
    with pytest.raises(BadInput, match="nonsense"):
        Emulation(scenario, LINUX)
