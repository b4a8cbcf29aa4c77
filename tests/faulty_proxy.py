"""A proxy on 127.0.0.1 before a server, that fails as it is told to: by the request's method, so many times."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAILURES = ("500", "503", "reset", "stall", "lost answer", "cut short")
STALL_SECONDS = 4.0
FOREVER = 10**6


@dataclass
class Faults:
    """What fails yet; and every request that came, by its method."""

    kind: str = ""
    method: str = ""
    left: int = 0
    skipped: int = 0
    seen: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    """What was asked for, query and all, in the order of `seen`."""
    delay_seconds: float = 0.0
    """What every request waits before it is passed on, as on the way to a store far away."""
    lock: Any = field(default_factory=threading.Lock)

    def plan(self, kind: str, method: str, *, times: int = 1, after: int = 0) -> None:
        """Let `times` requests of a method fail, after so many that pass."""
        with self.lock:
            self.kind, self.method, self.left, self.skipped = kind, method, times, after
            self.seen.clear()
            self.paths.clear()

    def next_of(self, method: str, path: str) -> str:
        with self.lock:
            self.seen.append(method)
            self.paths.append(path)
            if method != self.method or not self.left:
                return ""
            if self.skipped:
                self.skipped -= 1
                return ""
            self.left -= 1
            return self.kind


@contextlib.contextmanager
def proxy_before(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """Run a proxy; gives its endpoint and what it is told by."""
    faults = Faults()
    handler = type("Handler", (_Handler,), {"target": urlsplit(endpoint).netloc, "faults": faults})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # else connections that are opened at once wait a second


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 2**16
    disable_nagle_algorithm = True  # else a small answer waits 40 ms for the acknowledgement of its own headers
    target = ""
    faults = Faults()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failure = self.faults.next_of(self.command, self.path)
        time.sleep(self.faults.delay_seconds)
        if failure == "stall":
            time.sleep(STALL_SECONDS)
        if failure in {"stall", "reset"}:
            self.close_connection = True
            return
        if failure in {"500", "503"}:
            self._answer(int(failure), {}, b"")
            return
        status, headers, content = self._ask(body)
        if failure == "lost answer":
            self.close_connection = True
            return
        self._answer(status, headers, content, cut_short=failure == "cut short")

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass  # noqa: N815 - http.server's names

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.target, timeout=30)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body or None, headers)  # Host too: it is signed
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut_short: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name not in {"content-length", "transfer-encoding", "connection"}:
                self.send_header(name, value)
        length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut_short else content)
        self.close_connection = self.close_connection or cut_short
