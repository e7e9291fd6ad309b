"""Tells systemd when the service is ready and when it stops (sd_notify(3), Type=notify)."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from native._native import MachinePtr


class ServiceManager:
    """An observer of the machine that notifies the service manager, if there is one.

    NOTIFY_SOCKET names its socket: a path, or with a leading @ an abstract name.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")

    def machine_up(self, machine: MachinePtr, *, pcpus: int, vms: int) -> None:
        self._send(f"READY=1\nSTATUS={vms} VMs on {pcpus} pCPUs")

    def machine_down(self) -> None:
        self._send("STOPPING=1")

    def _send(self, text: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            try:
                notify.sendto(text.encode(), address)
            except OSError:
                return  # the manager has gone: the service goes on without it
