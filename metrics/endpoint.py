"""The scrape endpoint: prometheus-client's text, on loopback if no host is given."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, make_wsgi_app
from prometheus_client.registry import Collector

from metrics.collector import BuildInfo
from metrics.server import PATH, Server, application

LOOPBACK: Final = "127.0.0.1"

# Seconds between two checks for the end of the endpoint, and for connections that are too old.
_POLL: Final = 0.1
_MOST_DIGITS: Final = 5  # of a port
_LONGEST_NAME: Final = 253  # of a host (RFC 1035, 2.3.4, without the length bytes)


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) for "9464", "0.0.0.0:9464" or "[::1]:9464".

    Raises ValueError with the expectation as its text.
    """
    host, separator, port = text.rpartition(":")
    if not separator:
        host = LOOPBACK
    elif host.startswith("[") or ":" in host:
        host = _ipv6(host)
    else:
        _check_name(host)
    if not (port.isascii() and port.isdigit() and len(port) <= _MOST_DIGITS) or int(port) > 65535:
        raise ValueError("[HOST:]PORT with a port from 0 (any free one) to 65535")
    return host, int(port)


def _ipv6(text: str) -> str:
    """Return the address between brackets.  Without brackets, the port's colon could be one of the
    address."""
    if text.startswith("[") and text.endswith("]") and _is_ipv6(text[1:-1]):
        return text[1:-1]
    raise ValueError("[HOST:]PORT with an IPv6 address in brackets, such as [::1]:9464")


def _check_name(host: str) -> None:
    try:
        if not host.isprintable() or " " in host or not 0 < len(host.encode("idna")) <= _LONGEST_NAME:
            raise ValueError
    except ValueError:  # UnicodeError is one
        expected = f"[HOST:]PORT with a host name of at most {_LONGEST_NAME} letters, 63 between dots"
        raise ValueError(expected) from None


class Endpoint:
    """Serves /metrics, /-/healthy and /-/ready while the context lasts.

    `ready` tells whether a machine runs.  `build` are the labels of flushlab_build_info; with them, the
    metrics of the process are served, too.  Raises OSError from `__enter__` if it cannot listen on the
    address.
    """

    def __init__(
        self,
        collector: Collector,
        host: str,
        port: int,
        *,
        ready: Callable[[], bool] = lambda: True,
        build: Mapping[str, str] | None = None,
    ) -> None:
        # Use a private registry, without the metrics of Python and other libraries.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        if build is not None:
            ProcessCollector(registry=self._registry)
            self._registry.register(BuildInfo(build))
        self._ready = ready
        self._host = host
        self._port = port

    def __enter__(self) -> Self:
        # _created series would double the number of series and hold no information here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        found = socket.getaddrinfo(
            self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        family, _, _, _, address = found[0]
        self._server = Server(family, address, application(make_wsgi_app(self._registry), self._ready))
        self._port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL,), name="metrics", daemon=True
        )
        self._thread.start()
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
        return f"http://{host}:{self._port}{PATH}"


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False
