"""An HTTP server for a few scrapers, which slow clients cannot exhaust.

Each connection has a thread, and there are at most `CONNECTIONS` of them.  When all are taken, a new one
takes the place of the oldest connection that has not completed its request, or else of the oldest one.  So a
client that sends its request at once is answered, however many clients hold connections open.  No connection
outlives `SECONDS`.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CONNECTIONS: Final = 32
SECONDS: Final = 10.0
PATH: Final = "/metrics"
# As Prometheus' own: the server answers; a machine runs, so that there is something to scrape.
HEALTHY: Final = "/-/healthy"
READY: Final = "/-/ready"

# Seconds for which a connection keeps its place in any case: time to read a request that has been sent.
_GRACE: Final = 0.05
# Seconds for which a new connection waits for a place at most.
_PATIENCE: Final = 1.0


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    since: float
    answering: bool = False
    ended: bool = False


class Server(ThreadingMixIn, WSGIServer):
    """Serves an application on one address; raises OSError if it cannot listen on it."""

    daemon_threads = True
    # New connections wait in this queue.  If it is full, the kernel lets them try again after a second.
    request_queue_size = 1024

    def __init__(self, family: socket.AddressFamily, address: tuple[Any, ...], app: WSGIApplication) -> None:
        self.address_family = family
        self._places = threading.BoundedSemaphore(CONNECTIONS)
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        super().__init__(address, _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        # Skip HTTPServer's DNS query for the host's name, which may take long.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the connection to a thread of its own as soon as there is a place for it."""
        if not self._take_place():
            self.shutdown_request(request)
            return
        with self._lock:
            self._connections[id(request)] = _Connection(request, time.monotonic())
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started just now
            self._forget(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def answers(self, request: Any) -> None:
        """Note that the request has come completely."""
        with self._lock:
            self._connections[id(request)].answering = True

    def service_actions(self) -> None:
        """End connections older than SECONDS; called at each poll and after each new connection."""
        self._end(lambda connection: time.monotonic() - connection.since > SECONDS)

    def server_close(self) -> None:
        super().server_close()
        self._end(lambda _: True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the client has gone, or was made to
            super().handle_error(request, client_address)

    def _take_place(self) -> bool:
        deadline = time.monotonic() + _PATIENCE
        while not self._places.acquire(blocking=False):
            self._make_room()
            if self._places.acquire(timeout=_GRACE / 5):
                break
            if time.monotonic() > deadline:
                return False
        return True

    def _make_room(self) -> None:
        settled = time.monotonic() - _GRACE
        with self._lock:
            old = [c for c in self._connections.values() if c.since < settled and not c.ended]
        if old:
            leaving = min(old, key=lambda connection: (connection.answering, connection.since))
            self._end(lambda connection: connection is leaving)

    def _end(self, chosen: Callable[[_Connection], bool]) -> None:
        with self._lock:
            for connection in self._connections.values():
                if not connection.ended and chosen(connection):
                    connection.ended = True
                    _shut(connection.socket)

    def _forget(self, request: Any) -> None:
        with self._lock:
            del self._connections[id(request)]
        self._places.release()


def _shut(connection: socket.socket) -> None:
    """Make reads and writes of the connection's thread return."""
    # The client may have gone, and the thread may have closed it: a closed socket names no descriptor.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    server: Server

    def parse_request(self) -> bool:
        if not BaseHTTPRequestHandler.parse_request(self):
            return False
        self.server.answers(self.request)
        return True

    def log_message(self, *_: object) -> None:
        """Log nothing."""


_Head = tuple[str, list[tuple[str, str]]]  # a status and headers


def application(metrics: WSGIApplication, ready: Callable[[], bool]) -> WSGIApplication:
    """Pass GET and HEAD of /metrics to `metrics`; answer all other requests with the error in them."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        head: list[_Head] = []
        written: list[bytes] = []

        def note(
            status: str, headers: list[tuple[str, str]], _: object = None, /
        ) -> Callable[[bytes], object]:
            head.append((status, headers))
            return written.append

        path = environ["PATH_INFO"]
        if path not in (PATH, HEALTHY, READY):
            body = _plain(head, "404 Not Found", f"metrics are at {PATH}")
        elif method not in ("GET", "HEAD"):
            body = _plain(head, "405 Method Not Allowed", "use GET", ("Allow", "GET, HEAD"))
        elif path == HEALTHY or (path == READY and ready()):
            body = _plain(head, "200 OK", "a machine runs" if path == READY else "the server answers")
        elif path == READY:
            body = _plain(head, "503 Service Unavailable", "no machine runs")
        else:
            body = b"".join([*metrics({**environ, "REQUEST_METHOD": "GET"}, note), *written])
        status, headers = head[0]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return () if method == "HEAD" else (body,)

    return answer


def _plain(head: list[_Head], status: str, text: str, *headers: tuple[str, str]) -> bytes:
    head.append((status, [("Content-Type", "text/plain; charset=utf-8"), *headers]))
    return f"{status}: {text}\n".encode()
