"""Relay: requests of a forked process, carried out by a process of its own.

obstore's threads do not live on in a forked process, where its calls would wait for ever. A process that was forked
after obstore was used, such as a worker of torch's DataLoader, therefore starts another one afresh, which makes its
requests and ends with it.
"""

from __future__ import annotations

__all__ = ["Relay", "serve"]

import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from kdcache.errors import StoreError
from kdcache.store.bucket_address import BucketAddress, RequestLimits
from kdcache.store.bucket_client import BucketClient

_PROGRAM = "import sys; from kdcache.store.relay import serve; serve(int(sys.argv[1]))"

_END_SECONDS = 5.0


class Relay:
    """The calls of a `BucketClient`, made by another process; one at a time.

    Parameters
    ----------
    address : BucketAddress
    limits : RequestLimits
    """

    def __init__(self, address: BucketAddress, limits: RequestLimits) -> None:
        self._address = address
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and a program that stands above
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        weakref.finalize(self, _end, self._connection, self._process)
        self._connection.send((sys.path, address, limits))

    @property
    def reading(self) -> Any:
        """Refuse: there is no store in this process.

        Raises
        ------
        StoreError
            Always.
        """
        raise StoreError(
            f"{self._address} cannot be opened with zarr-python in a process that was forked after the cache was used; "
            "nothing was read. Open it in the main process, or start this one by spawn or forkserver"
        )

    def size(self, path: str) -> int | None:
        """As the client's."""
        return self._call("size", path)  # type: ignore[no-any-return]

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """As the client's."""
        return self._call("read", path, max_bytes=max_bytes)  # type: ignore[no-any-return]

    def read_sized(self, path: str, start: int, length: int) -> tuple[bytes, int]:
        """As the client's."""
        return self._call("read_sized", path, start, length)  # type: ignore[no-any-return]

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]], *, max_gap_bytes: int) -> Sequence[Any]:
        """As the client's."""
        return self._call("read_ranges", path, ranges, max_gap_bytes=max_gap_bytes)  # type: ignore[no-any-return]

    def put(self, path: str, data: bytes, *, create_only: bool) -> None:
        """As the client's."""
        self._call("put", path, data, create_only=create_only)

    def delete(self, path: str) -> None:
        """As the client's."""
        self._call("delete", path)

    def list(self, folder: str) -> Any:
        """As the client's."""
        return self._call("list", folder)

    def is_empty(self) -> bool:
        """As the client's."""
        return self._call("is_empty")  # type: ignore[no-any-return]

    def _call(self, name: str, *arguments: Any, **options: Any) -> Any:
        try:
            with self._lock:
                answer, error = self._exchanged(name, arguments, options)
        except (EOFError, OSError) as lost:
            raise StoreError(
                f"{self._address}: the process that makes the requests of this forked one has ended (exit code "
                f"{self._process.poll()}). What was published before stands whole. Read the cache in the main process, "
                "or start this one by spawn or forkserver"
            ) from lost
        if error is not None:
            raise error
        return answer

    def _exchanged(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        try:
            self._connection.send((name, arguments, options))
            return self._connection.recv()
        except BaseException:  # an interrupt: the next request must not be given this one's answer
            self._connection.close()
            raise


def _end(connection: Connection[Any, Any], process: subprocess.Popen[bytes]) -> None:
    connection.close()  # tells it to end
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def serve(descriptor: int) -> None:
    """Carry out the calls that come through a socket, until its other end is closed."""
    connection: Connection[Any, Any] = Connection(descriptor)
    sys.path[:], address, limits = connection.recv()
    client: BucketClient | None = None
    while True:
        try:
            name, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            client = client or BucketClient(address, limits)
            answer, error = getattr(client, name)(*arguments, **options), None
        except Exception as raised:  # noqa: BLE001 - raised anew where the call was made
            answer, error = None, raised
        connection.send((_plain(answer), error))


def _plain(answer: Any) -> Any:
    """Give what can be sent: obstore's own bytes cannot."""
    if isinstance(answer, tuple):
        return tuple(part if isinstance(part, bytes | int) else part.to_bytes() for part in answer)
    return answer
