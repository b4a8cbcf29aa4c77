"""One process's connection to a bucket: obstore's calls with limits, and its failures as errors that say what to do.

The only module that imports obstore, when the first request is made.
"""

from __future__ import annotations

__all__ = [
    "AlreadyStandsError",
    "BucketClient",
    "Client",
    "Listed",
    "RefusedRangeError",
    "UnansweredError",
    "UnsupportedError",
]

import errno
import functools
import ipaddress
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from kdcache.errors import MissingExtraError, StoreError
from kdcache.store.bucket_address import BucketAddress, RequestLimits
from kdcache.store.keys import is_hidden
from kdcache.store.limits import TooLargeError

_MAX_RETRIES = 100
"""Time bounds the tries, not their number."""
_LONGEST_WAIT_SECONDS = 15.0
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_STATUS = re.compile(r"status code: (?P<status>\d{3})")
_CODE = re.compile(r"<Code>(?P<code>\w{1,64})</Code>")
_CAUSE = re.compile(r"TimedOut|ConnectionRefused|ConnectionReset|IncompleteMessage|dns error|CredentialsNotLoaded")
_SETTING = re.compile(
    r"unable to \w+ service account|no such file|relative URL without a base|invalid port|certificate",
    re.IGNORECASE,
)
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN), or the machine's or pod's own role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's own service account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or the machine's own identity",
}

Answer = TypeVar("Answer")


class AlreadyStandsError(Exception):
    """A create-only request found something there."""


class UnansweredError(StoreError):
    """A request was not answered, or with a failure of the server: it may have been carried out or not."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.EHOSTUNREACH


class UnsupportedError(StoreError):
    """The server says that it knows no such request."""


class RefusedRangeError(StoreError):
    """The server refuses a range: the object ends before it."""


_NOT_IMPLEMENTED = 501
_KINDS: dict[int, type[StoreError]] = {
    400: RefusedRangeError, 416: RefusedRangeError, _NOT_IMPLEMENTED: UnsupportedError,
}  # fmt: skip
"""What a server's answer means where obstore has no error of its own for it."""

_PASSING = frozenset({408, 409, 425, 429})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown"})
"""Refusals that may not be the last word: too slow, in conflict with another request, too many."""


class Listed(NamedTuple):
    """An object as a listing tells of it.

    Attributes
    ----------
    path
        Below the store's prefix.
    num_bytes
        Its size.
    stored_seconds
        When it was stored, by the server's clock.
    """

    path: str
    num_bytes: int
    stored_seconds: float


class Client(Protocol):
    """What is asked of a bucket; paths are below its prefix."""

    @property
    def reading(self) -> Any:
        """The obstore store, for who reads by other means."""

    def size(self, path: str) -> int | None:
        """Ask for an object's size in bytes; None when none stands there."""

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object; TooLargeError where it has more bytes than that."""

    def read_sized(self, path: str, start: int, length: int) -> tuple[bytes, int]:
        """Read a range, not empty, and tell the size of the whole object."""

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]], *, max_gap_bytes: int) -> Sequence[Any]:
        """Read ranges, (start, length) in bytes, none empty; those near to one another in one request."""

    def put(self, path: str, data: bytes, *, create_only: bool) -> None:
        """Store an object in one request."""

    def delete(self, path: str) -> None:
        """Remove an object, whether one stands there or not."""

    def list(self, folder: str) -> Sequence[Listed]:
        """List the objects below a folder ("" for all)."""

    def is_empty(self) -> bool:
        """Tell whether nothing stands below the prefix, hidden objects aside."""


class BucketClient:
    """Requests to one bucket, below a prefix; safe between threads, of one process.

    Parameters
    ----------
    address : BucketAddress
    limits : RequestLimits

    Raises
    ------
    MissingExtraError
        obstore is not installed.
    StoreError
        The environment's settings do not do.
    """

    _first_pid: ClassVar[int | None] = None

    def __init__(self, address: BucketAddress, limits: RequestLimits) -> None:
        self._obstore = _import_obstore()
        if BucketClient._first_pid is None:
            BucketClient._first_pid = os.getpid()
        self._address = address
        self._connections = threading.BoundedSemaphore(limits.num_connections)
        try:
            self._reading = _open(self._obstore, address, limits, stall_seconds=limits.stall_seconds)
            self._writing = _open(self._obstore, address, limits, stall_seconds=limits.request_seconds)
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise StoreError(
                f"{address} cannot be opened with the settings in the environment ({_setting(error)}). Nothing "
                "was read or written. See docs/howto/object-stores.md; credentials come from "
                f"{_CREDENTIALS[address.scheme]}"
            ) from None

    @classmethod
    def is_cut_off(cls) -> bool:
        """Tell whether this process was forked from one that used obstore, whose threads are not in it."""
        return cls._first_pid not in {None, os.getpid()}

    @property
    def reading(self) -> Any:
        """The obstore store, for who reads by other means."""
        return self._reading

    def size(self, path: str) -> int | None:
        """Ask for an object's size in bytes; None when none stands there."""
        try:
            return int(self._ask("HEAD", path, lambda: self._obstore.head(self._reading, path))["size"])
        except FileNotFoundError:
            return None

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole object; TooLargeError, before its bytes are taken, where it has more than that."""

        def request() -> Any:
            answer = self._obstore.get(self._reading, path)
            num_bytes = int(answer.meta["size"])
            if max_bytes is not None and num_bytes > max_bytes:
                raise TooLargeError(num_bytes)
            return answer.bytes()

        return bytes(self._ask("GET", path, request).to_bytes())

    def read_sized(self, path: str, start: int, length: int) -> tuple[bytes, int]:
        """Read a range, not empty, and tell the size of the whole object, which comes with the answer."""

        def request() -> tuple[bytes, int]:
            answer = self._obstore.get(self._reading, path, options={"range": (start, start + length)})
            return bytes(answer.bytes().to_bytes()), int(answer.meta["size"])

        return self._ask("GET", path, request)

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]], *, max_gap_bytes: int) -> Sequence[Any]:
        """Read ranges, (start, length) in bytes, none empty; those near to one another in one request."""
        starts, lengths = [start for start, _ in ranges], [length for _, length in ranges]
        options = {"starts": starts, "lengths": lengths, "coalesce": max_gap_bytes}
        found = self._ask("GET", path, lambda: self._obstore.get_ranges(self._reading, path, **options))
        return tuple(found)

    def put(self, path: str, data: bytes, *, create_only: bool) -> None:
        """Store an object in one request, which a server carries out whole or not at all.

        Raises
        ------
        AlreadyStandsError
            It was to be created, and something stands there.
        UnansweredError
            It may stand or not.
        """
        mode = "create" if create_only else "overwrite"
        self._ask("PUT", path, lambda: self._obstore.put(self._writing, path, data, mode=mode, use_multipart=False))

    def delete(self, path: str) -> None:
        """Remove an object, whether one stands there or not."""
        try:
            self._ask("DELETE", path, lambda: self._obstore.delete(self._writing, path))
        except FileNotFoundError:  # some servers say so
            return

    def list(self, folder: str) -> Sequence[Listed]:
        """List the objects below a folder ("" for all), in no order."""
        return self._ask("LIST", folder, lambda: [each for page in self._pages(folder) for each in page])

    def is_empty(self) -> bool:
        """Tell whether nothing stands below the prefix, hidden objects aside; asks page by page, to the first one."""
        return self._ask("LIST", "", lambda: all(is_hidden(each.path) for page in self._pages("") for each in page))

    def _pages(self, folder: str) -> Iterator[Sequence[Listed]]:
        for page in self._obstore.list(self._reading, folder or None):
            yield [Listed(str(found["path"]), int(found["size"]), found["last_modified"].timestamp()) for found in page]

    def _ask(self, verb: str, path: str, request: Callable[[], Answer]) -> Answer:
        exceptions = self._obstore.exceptions
        where = f"{self._address}/{path}" if path else str(self._address)
        # Errors stand alone: what obstore says has the server's whole answer in it, down to key ids and signatures.
        try:
            with self._connections:
                return request()
        except FileNotFoundError as error:
            if _names_no_bucket(error):
                raise self._no_bucket() from None
            raise FileNotFoundError(errno.ENOENT, "no such object", where) from None
        except exceptions.AlreadyExistsError:
            raise AlreadyStandsError(where) from None
        except exceptions.BaseError as error:
            raise self._error(verb, where, error) from None

    def _error(self, verb: str, where: str, error: Exception) -> StoreError:
        if _names_no_bucket(error):
            return self._no_bucket()
        status = _status(error)
        exceptions = self._obstore.exceptions
        refusals = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        if isinstance(error, refusals) or status in {401, 403}:
            return StoreError(
                f"{verb} {where} was refused ({_summary(error)}): the credentials are missing, wrong or without this "
                f"right. Nothing was changed by it. Give them by {_CREDENTIALS[self._address.scheme]}, allow reading, "
                "listing and, to build, writing and deleting below this address, and run the same command again"
            )
        is_final = 400 <= status < 500 and status not in _PASSING and _code(error) not in _PASSING_CODES
        kind = _KINDS.get(status, StoreError) if is_final or status == _NOT_IMPLEMENTED else UnansweredError
        return kind(
            f"{verb} {where} failed ({_summary(error)}), after all tries that the time allows. What is published "
            "stands whole, also where it is unknown whether a request to store was carried out. Check that the store "
            "can be reached (its endpoint, the network), and try again: a build goes on from what stands, a training "
            "from its last state"
        )

    def _no_bucket(self) -> StoreError:
        return StoreError(
            f"{self._address}: there is no bucket {self._address.bucket!r}. Nothing was read or written. Make the "
            "bucket with your provider's tools, or correct the address, the region or the endpoint"
        )


def _import_obstore() -> Any:
    try:
        import obstore  # noqa: PLC0415 - an extra, and only for such addresses
        import obstore.exceptions  # noqa: PLC0415
        import obstore.store  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "addresses of object stores (s3://, gs://, az://) need obstore, which is not installed. Nothing was read "
            "or written. Run: pip install 'kdcache[object-stores]'"
        ) from error
    return obstore


def _open(obstore: Any, address: BucketAddress, limits: RequestLimits, *, stall_seconds: float) -> Any:
    kinds = {"s3": obstore.store.S3Store, "gs": obstore.store.GCSStore, "az": obstore.store.AzureStore}
    client_options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=limits.connect_seconds),
        "read_timeout": timedelta(seconds=stall_seconds),
        "timeout": timedelta(seconds=limits.request_seconds),
    }
    config: dict[str, Any] = {}
    if address.scheme == "s3":
        config["disable_bulk_delete"] = True  # single deletions do everywhere
        endpoint = next((os.environ[name] for name in _S3_ENDPOINTS if os.environ.get(name)), None)
        if endpoint is not None:
            config["endpoint"] = endpoint
            if _may_be_plain(endpoint):
                client_options["allow_http"] = True
    return kinds[address.scheme](
        address.bucket,
        prefix=address.prefix or None,
        config=config,
        client_options=client_options,
        retry_config={
            "max_retries": _MAX_RETRIES,
            "retry_timeout": timedelta(seconds=limits.retry_seconds),
            "backoff": {
                "init_backoff": timedelta(seconds=limits.first_wait_seconds),
                "max_backoff": timedelta(seconds=_LONGEST_WAIT_SECONDS),
                "base": 2,
            },
        },
    )


def _may_be_plain(endpoint: str) -> bool:
    """Allow http:// to this machine itself; elsewhere only where AWS_ALLOW_HTTP says so.

    Raises
    ------
    StoreError
        A plain endpoint lies elsewhere, and nothing allows it.
    """
    parts = urlsplit(endpoint)
    if parts.scheme != "http":
        return False
    if _is_loopback(parts.hostname or "") or os.environ.get("AWS_ALLOW_HTTP", "").lower() in {"1", "true"}:
        return True
    raise StoreError(
        f"the endpoint http://{parts.hostname} would send requests unencrypted to another machine; nothing was sent. "
        "Give an https:// endpoint, or allow this one by AWS_ALLOW_HTTP=true"
    )


@functools.lru_cache(maxsize=64)
def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _status(error: Exception) -> int:
    found = _STATUS.search(str(error))
    return 0 if found is None else int(found["status"])


def _names_no_bucket(error: Exception) -> bool:
    return _code(error) in _NO_BUCKET


def _code(error: Exception) -> str:
    found = _CODE.search(str(error))
    return "" if found is None else found["code"]


def _setting(error: Exception) -> str:
    """Name the kind of error, and what it says of an endpoint; settings, which may be secret, are not repeated."""
    causes = dict.fromkeys(found.lower() for found in _SETTING.findall(str(error)))
    return ", ".join([type(error).__name__, *causes])


def _summary(error: Exception) -> str:
    """Say what failed in a few words: the rest may hold parts of credentials."""
    text = str(error)
    status, code = _status(error), _code(error)
    causes = dict.fromkeys(_CAUSE.findall(text))
    words = [f"status {status}" if status else "", code, *causes]
    return ", ".join(word for word in words if word) or "no answer"
