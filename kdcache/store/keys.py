"""Keys: the relative paths under which objects stand."""

from __future__ import annotations

__all__ = ["check_key", "is_hidden", "is_key"]

import functools

from kdcache.errors import OptionError


@functools.lru_cache(maxsize=4096)
def check_key(key: str) -> None:
    """Refuse a key that could leave the store's address, or hide there, with an OptionError.

    The caller is at fault, not the store: a StoreError would have been taken for one that does not answer.
    """
    if not is_key(key):
        raise OptionError(
            f"{key!r} is no key of a store: a key is a relative path of names that do not start with a dot, "
            "such as plans/0.json"
        )


def is_key(key: str) -> bool:
    """Tell whether a text is a relative path of names that do not start with a dot."""
    parts = key.split("/")
    return not any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts)


def is_hidden(path: str) -> bool:
    """Tell whether a path has a name that starts with a dot: no key is such, and no listing gives it."""
    return any(part.startswith(".") for part in path.split("/"))
