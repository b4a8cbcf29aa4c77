"""At once: requests to a store far away that do not wait for one another, in bounded number and memory."""

from __future__ import annotations

__all__ = ["THREADS", "at_once"]

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 16
"""As many as a process has connections to a bucket."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def at_once(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    bytes_of: Callable[[Item], int] = lambda _: 0,
    max_bytes: int = 0,
) -> Generator[Result, None, None]:
    """Yield what `work` gives for each item, in their order, while it is at the next ones in threads.

    Parameters
    ----------
    items : sequence
    work : callable (item) -> result
        Its error is raised where the item's turn comes; the rest is left. Who stops does not wait for what has begun,
        but a process ends only when that has.
    bytes_of : callable (item) -> int, optional
        What an item's result takes.
    max_bytes : int
        What results that wait for their turn may take together; a single one may take more.
    """
    if len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="kdcache-fetch")
    waiting: deque[tuple[Future[Result], int]] = deque()
    num_bytes = 0
    try:
        for item in items:
            item_bytes = bytes_of(item)
            while waiting and (len(waiting) >= THREADS or num_bytes + item_bytes > max_bytes > 0):
                future, freed = waiting.popleft()
                num_bytes -= freed
                yield future.result()
            waiting.append((pool.submit(work, item), item_bytes))
            num_bytes += item_bytes
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # who interrupts would wait for requests that nobody wants
