"""The claim of a repair: of two repairs of one cache at a time, the second is refused.

A repair puts a claim of its own, a small file under a name of its own, into a folder for them, and then lists that
folder. Only one that finds itself alone goes on: of two repairs the later to list sees the other's claim, and takes its
own away. Two that see one another try again after a random wait, so that one of them may win.

A claim is written anew every minute while its repair is at work, and before each change the repair looks whether it
still stands. That of a killed repair is taken away by the next: at once where its process was of this machine, and else
when nobody has written it anew for half an hour. Its writer's clock says when that was. Where two machines' clocks are
further apart than that, a repair at work looks dead to the other machine, and stops before its next change.
"""

from __future__ import annotations

__all__ = ["RepairClaim", "claim_repair"]

import contextlib
import json
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kdcache.errors import StoreError
from kdcache.store.objects import Objects
from kdcache.store.writers import is_alive, this_machine
from kdcache.verify.extras import REPAIR_CLAIMS

LEASE_SECONDS = 1800.0
"""Age at which a claim that nobody wrote anew is of a dead repair, on whatever machine."""
RENEWAL_SECONDS = 60.0
_TRIES = 4
_WAIT_SECONDS = 0.2
_NAME = re.compile(rf"{REPAIR_CLAIMS}/(?P<machine>[0-9a-f]{{8}})-(?P<pid>[1-9][0-9]*)-[0-9a-f]{{16}}")
_held: set[str] = set()
"""Claims of repairs that are at work in this process."""


@dataclass(frozen=True, eq=False)
class RepairClaim:
    """A claim that stands.

    Parameters
    ----------
    objects : Objects
        Those of the cache.
    key : str
        Where it stands.
    """

    objects: Objects
    key: str

    def check(self) -> None:
        """Make sure, before a change, that no other repair took this one for dead.

        Raises
        ------
        StoreError
            The claim is gone.
        """
        if self.objects.size(self.key) is None:
            raise StoreError(
                f"{self.objects.address}: the claim of this repair, {self.key}, was taken away: another repair took "
                "this one for dead, or somebody deleted it. What was mended stays, and nothing more was changed. Run "
                "the repair again when no other is at work"
            )

    def write(self) -> None:
        """Write the claim, with the time."""
        self.objects.replace(self.key, json.dumps({"written_unix_s": time.time()}).encode())


@contextlib.contextmanager
def claim_repair(objects: Objects) -> Iterator[RepairClaim]:
    """Claim a cache for a repair, for as long as the context lasts.

    Raises
    ------
    StoreError
        Another repair is at work, or the claim cannot be written. Nothing was changed.
    """
    claim = RepairClaim(objects, f"{REPAIR_CLAIMS}/{this_machine()}-{os.getpid()}-{secrets.token_hex(8)}")
    for turn in range(_TRIES):
        _held.add(claim.key)
        try:
            claim.write()
            others = _others(claim)
            if not others:
                with _renewed(claim):
                    yield claim
                return
        finally:
            _take_away(claim)
        if turn < _TRIES - 1:
            time.sleep(_WAIT_SECONDS * 2**turn * random.uniform(0.5, 1.5))  # noqa: S311 - only to part two repairs
    raise StoreError(
        f"{objects.address} is being repaired already, as {', '.join(others)} says. Nothing was changed. Run this "
        "again when the other repair has ended. If there is none, it was killed on another machine: delete that file, "
        f"or run this again {LEASE_SECONDS / 60:.0f} minutes later"
    )


def _take_away(claim: RepairClaim) -> None:
    _held.discard(claim.key)
    with contextlib.suppress(StoreError):  # the next repair takes it away
        claim.objects.delete(claim.key)


def _others(claim: RepairClaim) -> list[str]:
    """Give the claims of other repairs that may be at work, and take those of dead ones away."""
    names = {key: _NAME.fullmatch(key) for key in claim.objects.list(REPAIR_CLAIMS) if key != claim.key}
    others = {key: name for key, name in names.items() if name is not None}  # other files are not ours to take away
    stale = [key for key, name in others.items() if _is_dead(key, name) or _is_old(claim.objects, key)]
    for key in stale:
        claim.objects.delete(key)
    return [key for key in others if key not in stale]


def _is_dead(key: str, name: re.Match[str]) -> bool:
    """Tell whether a claim is of this machine, and of no repair that is at work on it."""
    if name["machine"] != this_machine():
        return False
    pid = int(name["pid"])
    return key not in _held if pid == os.getpid() else not is_alive(pid)


def _is_old(objects: Objects, key: str) -> bool:
    try:
        written_unix_s = float(json.loads(objects.read(key))["written_unix_s"])
    except FileNotFoundError:  # its repair has ended
        return True
    except (ValueError, TypeError, KeyError):  # damaged, since claims appear whole; one at work is written anew
        return True
    return not abs(time.time() - written_unix_s) <= LEASE_SECONDS  # neither is no number


@contextlib.contextmanager
def _renewed(claim: RepairClaim) -> Iterator[None]:
    """Write the claim anew now and then, on a thread: a verification or a fit may last longer than a claim."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):  # a store that does not answer; the next change asks again
                if claim.objects.size(claim.key) is not None:
                    claim.write()

    thread = threading.Thread(target=renew, name="kdcache-repair-claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
