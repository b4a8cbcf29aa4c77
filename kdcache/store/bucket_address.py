"""Addresses of buckets, and the limits of the requests made there."""

from __future__ import annotations

__all__ = ["DEFAULT_LIMITS", "SCHEMES", "BucketAddress", "RequestLimits"]

from dataclasses import dataclass
from urllib.parse import urlsplit

from kdcache.errors import OptionError, StoreError

SCHEMES = {"s3": "Amazon S3, or a server that speaks its protocol", "gs": "Google Cloud Storage", "az": "Azure"}
"""The kinds of object store, by the scheme of their addresses."""


@dataclass(frozen=True, slots=True)
class BucketAddress:
    """Where a store's objects stand: below a prefix of a bucket.

    Parameters
    ----------
    scheme : str
        One of `SCHEMES`.
    bucket : str
        The bucket; the container on Azure.
    prefix : str
        What all keys begin with; "" for the bucket's root.
    """

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> BucketAddress:
        """Read an address such as ``s3://bucket/caches/digits``.

        Raises
        ------
        StoreError
            It names no bucket, or holds what an address must not, such as credentials; these are not repeated.
        """
        parts = urlsplit(text)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise StoreError(
                f"an address {parts.scheme}://... holds credentials or options; nothing was read or written. Give "
                f"{parts.scheme}://BUCKET/PREFIX, and credentials by the environment: see docs/howto/object-stores.md"
            )
        names = parts.path.strip("/").split("/") if parts.path.strip("/") else []
        if not parts.netloc or any(name in {"", ".", ".."} for name in names):
            raise StoreError(
                f"{text}: this address names no bucket, or no folder of one. Nothing was read or written. Give "
                f"{parts.scheme}://BUCKET/PREFIX"
            )
        return cls(parts.scheme, parts.netloc, "/".join(names))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """How long a store waits, how often it tries again, and how much it asks at once; all above zero.

    Parameters
    ----------
    connect_seconds : float
        For a connection.
    stall_seconds : float
        For the next bytes of an answer to a request that reads.
    request_seconds : float
        For one try of a request as a whole: the largest object must pass within it.
    retry_seconds : float
        From a request's start, in which it is tried again after a failure.
    first_wait_seconds : float
        Before the second try; doubled, and shaken, before each further one.
    num_connections : int
        Requests of one process at a time; a request for many ranges of an object may open up to ten connections.
    """

    connect_seconds: float = 10.0
    stall_seconds: float = 30.0
    request_seconds: float = 300.0
    retry_seconds: float = 120.0
    first_wait_seconds: float = 0.2
    num_connections: int = 16

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} is {getattr(self, name)}; expected a number above 0")

    @property
    def lease_seconds(self) -> float:
        """How long the claim of a writer counts whose fate is not known: it makes three requests while it holds one."""
        return 4 * (self.request_seconds + self.retry_seconds)


DEFAULT_LIMITS = RequestLimits()
