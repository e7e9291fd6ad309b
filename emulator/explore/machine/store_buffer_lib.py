"""The native library with plain stores that wait in store buffers; store_buffers.py lists plain stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from emulator.explore.engine.scheduler import Execution
from emulator.explore.machine.adversary import AdversarialLib
from emulator.explore.machine.control import Control
from emulator.explore.machine.described import FENCED, LOCAL, calls_of
from emulator.explore.machine.footprints import FOOTPRINTS, rights
from emulator.explore.machine.lib import ControlledLib
from emulator.explore.machine.store_buffers import BufferedControl, Key, Store
from emulator.kvm.kvm_host import KVM_REQUEST_MASK, VCPU_MODES
from native import ffi, lib
from native.types import CpuId, VcpuId, VmId

if TYPE_CHECKING:
    from native._native import U64, MachinePtr


Native = Callable[..., Any]

# The value of a waiting store that is computed when it becomes visible.
_UNKNOWN: Final = -1


def _address(words: U64) -> int:
    address: Any = ffi.cast("uintptr_t", words)
    return int(address)


class BufferedLib(ControlledLib):
    """The native library with plain stores that wait in store buffers."""

    control: BufferedControl

    def __init__(self, control: Control) -> None:
        assert isinstance(control, BufferedControl)
        super().__init__(control)
        writers = [name for name, one in FOOTPRINTS.items() if one.writer]
        for name in (*writers, *(FENCED - LOCAL)):
            self._replace(name, self._fenced)
        for name in FENCED & LOCAL:
            self._replace(name, self._fenced, "announced")
        for name in calls_of("anything"):
            self._replace(name, self._fenced)
        for name in ("vcpu_mode", "vcpu_cpu"):
            self._replace(name, self._loads, name)
        for name in ("mmu_invalidate_seq", "mmu_invalidate_retry_gfn", "mmu_invalidate_retry_range"):
            self._replace(name, self._settles, "mmu_invalidate")
        for name, one in FOOTPRINTS.items():
            if ("ept",) in one.reads and not one.writer:
                self._replace(name, self._settles, "spte")
        self._replace("kvm_requests", self._settles, "request")
        self._replace("kvm_test_request", self._settles, "request")
        self._replace("atomic64_read", self._forwarded, "atomic64")
        self._replace("test_bit", self._forwarded, "bitmap")
        for name in ("mmu_invalidate_begin", "mmu_invalidate_range_add", "mmu_invalidate_end"):
            self._replace(name, self._invalidates, name)
        self._replace("kvm_check_request", self._checks)
        self._replace("kvm_make_request", self._requests)
        self._replace("atomic64_inc_return", self._increments)
        plain = ("vcpu_set_mode", "vcpu_set_cpu", "bitmap_clear", "atomic64_set", "tdp_mmu_set_spte")
        for name in (*plain, "local_irq_enable"):
            self.__dict__[name] = getattr(self, f"_{name}")
        self.__dict__["mmu_write_unlock"] = self._mmu_write_unlock
        self.__dict__["srcu_read_unlock"] = self._srcu_read_unlock

    def _replace(self, name: str, wrap: Callable[..., Native], *more: str) -> None:
        self.__dict__[name] = wrap(getattr(self, name), *more)

    def _cpu(self, execution: Execution) -> CpuId:
        return self.control.cpu_of(execution.current)

    # --- fences and loads -----------------------------------------------------------------------------------

    def _fenced(self, call: Native, announced: str = "") -> Native:
        """Wrap a call that waits for an empty queue.  `announced`: by the point right before it."""
        control = self.control

        def fenced(*args: Any) -> Any:
            execution = control.execution
            if execution is not None:
                cpu = self._cpu(execution)
                if cpu in control.stores.dirty:
                    writes = execution.current.writes if announced else 0
                    control.stores.fence(execution, cpu)
                    execution.touch(0, writes)
            return call(*args)

        return fenced

    def _settles(self, call: Native, name: str) -> Native:
        """Wrap a load that waits for the CPU's own store to that object, if there is one."""
        control = self.control

        def load(*args: Any) -> Any:
            execution = control.execution
            if execution is not None:
                cpu = self._cpu(execution)
                if cpu in control.stores.dirty:
                    execution.touch(control.stores.mask(cpu), 0)
                    if any(store.key[0] == name for store in control.stores.queues[cpu]):
                        control.stores.fence(execution, cpu)
            return call(*args)

        return load

    def _forwarded(self, call: Native, name: str) -> Native:
        """Wrap a load of a word: the CPU loads its own waiting store to it, while a waiting store to another
        word may become visible behind the load."""
        control = self.control

        def load(words: U64, *bit: int) -> Any:
            execution = control.execution
            found = call(words, *bit)
            if execution is not None:
                cpu = self._cpu(execution)
                own = control.stores.pending(execution, cpu, (name, _address(words)))
                if own is not None and own.value == _UNKNOWN:
                    control.stores.fence(execution, cpu)
                    return call(words, *bit)
                if own is not None:
                    return own.value
            return found

        return load

    def _loads(self, call: Native, name: str) -> Native:
        control = self.control

        def load(m: MachinePtr, vcpu: VcpuId) -> Any:
            execution = control.execution
            own = None
            found = call(m, vcpu)
            if execution is not None:
                # Look within the load's own step: the store may have become visible until then.
                own = control.stores.pending(execution, self._cpu(execution), (name, vcpu))
            return found if own is None else own.value

        return load

    def _checks(self, call: Native) -> Native:
        """Wrap kvm_check_request(): a load, and clear_bit() if the request is set."""
        control = self.control
        test = self.__dict__["kvm_test_request"]

        def check(m: MachinePtr, vcpu: VcpuId, request: int) -> Any:
            if control.execution is not None and not test(m, vcpu, request):
                return 0
            return call(m, vcpu, request)

        return check

    # --- stores ---------------------------------------------------------------------------------------------

    def _store(
        self, key: Key, value: int, what: str, writes: int, apply: Callable[[], object], reads: int = 0
    ) -> None:
        execution = self.control.execution
        if execution is None:
            apply()
            return
        self.control.stores.store(
            execution, self._cpu(execution), Store(key, value, what, writes, apply, execution.current, reads)
        )

    def _vcpu_set_mode(self, m: MachinePtr, vcpu: VcpuId, mode: int) -> None:
        what = f"v{vcpu}'s mode = {VCPU_MODES[mode]}"
        self._store(
            ("vcpu_mode", vcpu),
            mode,
            what,
            self.control.bit("mode", vcpu),
            lambda: lib.vcpu_set_mode(m, vcpu, mode),
        )

    def _vcpu_set_cpu(self, m: MachinePtr, vcpu: VcpuId, cpu: int) -> None:
        what = f"v{vcpu}'s cpu = {cpu}"
        bit = self.control.bit("vcpu->cpu", vcpu)
        self._store(("vcpu_cpu", vcpu), cpu, what, bit, lambda: lib.vcpu_set_cpu(m, vcpu, cpu))

    def _bitmap_clear(self, words: U64, n: int) -> None:
        """Clear a mask of pCPUs; the point right before names it."""
        execution = self.control.execution
        writes = execution.current.writes if execution is not None else 0
        key, what = ("bitmap", _address(words)), "a mask of pCPUs is cleared"
        self._store(key, 0, what, writes, lambda: lib.bitmap_clear(words, n))

    def _atomic64_set(self, counter: U64, value: int) -> None:
        """Store a word; the point right before names it."""
        execution = self.control.execution
        writes = execution.current.writes if execution is not None else 0
        key, what = ("atomic64", _address(counter)), f"a word of the policy's = {value}"
        self._store(key, value, what, writes, lambda: lib.atomic64_set(counter, value))

    def _tdp_mmu_set_spte(self, *args: Any) -> int:
        """Store an SPTE with WRITE_ONCE(): its owner has frozen it, or mmu_lock is held for write."""
        control, what = self.control, f"an SPTE of gfn {args[6]:#x}"
        reads = control.custody_of_tables((args[3],)) | rights(control, args[7], args[5])
        self._store(("spte",), 0, what, control.bit("ept"), lambda: lib.tdp_mmu_set_spte(*args), reads)
        return 0  # the old SPTE, which no caller uses

    def _invalidates(self, call: Native, name: str) -> Native:
        native = getattr(lib, name)

        def invalidate(m: MachinePtr, vm: VmId, *args: int) -> None:
            bits = self.control.bit("mmu_invalidate_seq", vm) | self.control.bit(
                "mmu_invalidate_in_progress", vm
            )
            self._store(("mmu_invalidate",), 0, f"{name}()", bits, lambda: native(m, vm, *args))

        return invalidate

    def _requests(self, call: Native) -> Native:
        def make(m: MachinePtr, vcpu: VcpuId, request: int) -> None:
            control = self.control
            execution = control.execution
            if execution is None or not control.is_plain(self._cpu(execution)):
                call(m, vcpu, request)
                return
            bits = control.bit("request", vcpu, request & KVM_REQUEST_MASK) | control.bit("requests", vcpu)
            what = f"a request to v{vcpu}"
            self._store(("request",), 0, what, bits, lambda: lib.kvm_make_request(m, vcpu, request))

        return make

    def _increments(self, call: Native) -> Native:
        """Wrap an increment; the point right before announces its access."""

        def increment(counter: U64) -> int:
            control = self.control
            execution = control.execution
            if execution is None or not control.is_plain(self._cpu(execution)):
                return int(call(counter))
            writes = execution.current.writes
            what = "a root's generation moves on"
            key = ("atomic64", _address(counter))
            self._store(key, _UNKNOWN, what, writes, lambda: lib.atomic64_inc_return(counter))
            return int(lib.atomic64_read(counter)) + 1

        return increment

    # --- releases come behind earlier stores ----------------------------------------------------------------

    def _mmu_write_unlock(self, m: MachinePtr, cpu: CpuId, vm: VmId) -> None:
        control = self.control
        if control.execution is None or cpu not in control.stores.dirty:
            ControlledLib.mmu_write_unlock(self, m, cpu, vm)
            return

        def release() -> None:
            control.mmu_lock(vm).writer = False
            lib.mmu_write_unlock(m, cpu, vm)

        self._store(("mmu_lock",), 0, "mmu_lock is released", control.bit("mmu_lock", vm), release)

    def _srcu_read_unlock(self, m: MachinePtr, cpu: CpuId, vm: VmId, index: int) -> None:
        control = self.control
        execution = control.execution
        if execution is None or cpu not in control.stores.dirty:
            ControlledLib.srcu_read_unlock(self, m, cpu, vm, index)
            return
        who = execution.current.index

        def leave() -> None:
            control.srcu_of(vm).leave(who)
            lib.srcu_read_unlock(m, cpu, vm, index)

        self._store(("srcu",), 0, "srcu_read_unlock()", control.bit("srcu left", vm, who), leave)

    def _local_irq_enable(self, m: MachinePtr, cpu: CpuId) -> int:
        """Enable interrupts.  If one arrives, fence first, so that its handler's stores follow all earlier
        ones."""
        execution = self.control.execution
        if execution is not None and lib.cpu_attention(m, cpu) & lib.ATTENTION_IPI:
            self.control.stores.fence(execution, cpu)
        return ControlledLib.local_irq_enable(self, m, cpu)


class BufferedAdversarialLib(AdversarialLib, BufferedLib):
    """The native library with store buffers and with the adversary's candidates."""
