"""Claims: publishing without replacing, on servers that cannot refuse to replace.

A writer puts a *claim* of its own, a small object under a name of its own, below a folder that belongs to the key, and
then lists that folder. Only a writer that finds itself alone there goes on: of two writers the later to list sees the
other's claim. It looks once more whether the object stands, stores it, reads it back, and takes its claim away.
Writers that see one another take their claims away and try again after a random wait.

This needs a server whose listings show at once what was stored. A claim of a writer that is gone holds others up until
it is known to be dead (a process of this machine), or is older than any request can last, by the server's clock.
"""

from __future__ import annotations

__all__ = ["publish_claimed"]

import contextlib
import os
import random
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kdcache.errors import StoreError
from kdcache.store.bucket_address import RequestLimits
from kdcache.store.bucket_client import Client, UnansweredError
from kdcache.store.writers import is_alive, this_machine

_FOLDER = ".claims"
_NAME = re.compile(r"(?P<machine>[0-9a-f]{8})-(?P<pid>[1-9][0-9]*)-[0-9a-f]{16}")
_LONGEST_WAIT_SECONDS = 2.0


def publish_claimed(client: Client, key: str, data: bytes, limits: RequestLimits) -> bool:
    """Store an object unless one stands under `key`; True when these bytes stand.

    Parameters
    ----------
    client : Client
    key : str
    data : bytes
    limits : RequestLimits

    Raises
    ------
    StoreError
        Another writer's claim stood too long; nothing was stored.
    UnansweredError
        A request was not answered. The claim stays for as long as the request may last, where it was that to store
        the object; else it is taken away, if the server lets that through.
    """
    deadline = time.monotonic() + 2 * limits.lease_seconds
    wait_seconds = limits.first_wait_seconds / 4
    while client.size(key) is None:
        with _claim(client, key, limits) as claim:
            if claim.is_alone:
                return _stored(client, key, data, claim)
        if time.monotonic() > deadline:
            raise StoreError(
                f"{key} is claimed by another writer for longer than any request lasts, and was not stored. See the "
                f"objects below {_FOLDER}/{key} in the bucket; when no other build runs, delete them, and run again"
            )
        time.sleep(wait_seconds * random.uniform(0.5, 1.5))  # noqa: S311 - only to part two writers
        wait_seconds = min(2 * wait_seconds, _LONGEST_WAIT_SECONDS)
    return False


@dataclass
class _Claim:
    """A claim that stands: whether it is the only one, and whether a request to store may be carried out yet."""

    is_alone: bool = False
    is_storing: bool = False


def _stored(client: Client, key: str, data: bytes, claim: _Claim) -> bool:
    if client.size(key) is not None:  # since it was last looked for, and before the claim stood
        return False
    try:
        client.put(key, data, create_only=False)
    except UnansweredError:
        claim.is_storing = True
        raise
    try:
        return client.read(key) == data
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _claim(client: Client, key: str, limits: RequestLimits) -> Iterator[_Claim]:
    """Put a claim, tell whether it is the only one, and take it away.

    It stays where the object may be stored yet: others must wait for as long as that can last. One whose own request
    was lost, and that comes to stand behind its deletion, is broken when it is stale, like those of the dead.
    """
    folder = f"{_FOLDER}/{key}"
    path = f"{folder}/{this_machine()}-{os.getpid()}-{secrets.token_hex(8)}"
    claim = _Claim()
    try:
        client.put(path, b"", create_only=False)
        claim.is_alone = _is_alone(client, folder, path, limits.lease_seconds)
        yield claim
    finally:
        if not claim.is_storing:
            _take_away(client, path)


def _is_alone(client: Client, folder: str, path: str, lease_seconds: float) -> bool:
    claims = {listed.path: listed.stored_seconds for listed in client.list(folder)}
    if path not in claims:
        return False
    others = [other for other in claims if other != path]
    stale = [other for other in others if _is_stale(other, claims[path] - claims[other], lease_seconds)]
    for other in stale:
        _take_away(client, other)
    return len(stale) == len(others)


def _is_stale(path: str, age_seconds: float, lease_seconds: float) -> bool:
    name = _NAME.fullmatch(path.rsplit("/", 1)[1])
    if name is not None and name["machine"] == this_machine() and not is_alive(int(name["pid"])):
        return True
    return age_seconds > lease_seconds


def _take_away(client: Client, path: str) -> None:
    with contextlib.suppress(StoreError):  # it grows stale
        client.delete(path)
