"""The scrape endpoint: prometheus-client's HTTP server, on loopback unless told otherwise."""

from __future__ import annotations

import ipaddress
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server
from prometheus_client.registry import Collector

LOOPBACK = "127.0.0.1"


def parse_address(text: str) -> tuple[str, int]:
    """ "9464", "0.0.0.0:9464" or "[::1]:9464" -> (host, port).

    Raises ValueError with what is expected.
    """
    host, separator, port = text.rpartition(":")
    if not separator:
        host = LOOPBACK
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535 or not host:
        raise ValueError("[HOST:]PORT with a port from 0 (any free one) to 65535")
    return host, int(port)


class Endpoint:
    """Serves /metrics while the context lasts.

    Raises OSError from `__enter__` when the address cannot be had.
    """

    def __init__(self, collector: Collector, host: str, port: int) -> None:
        # Private: neither Python's own metrics nor those of another library belong here.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        self._host = host
        self._port = port

    def __enter__(self) -> Self:
        # _created series would double the number of series and say nothing here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._server, self._thread = start_http_server(self._port, self._host, self._registry)
        self._port = int(self._server.server_address[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if _is_ipv6(self._host) else self._host
        return f"http://{host}:{self._port}/metrics"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
