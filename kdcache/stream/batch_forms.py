"""Batches of other people's loaders: where an entry stands in one, and how soft targets are put beside it.

Mappings, tuples, lists, named tuples and dataclasses are known; anything else is read and written by callables.
"""

from __future__ import annotations

__all__ = ["Key", "Put", "entry_of", "moved_like", "values_of", "with_soft_targets"]

import copy
import dataclasses
import functools
from collections import namedtuple
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from kdcache.errors import OptionError
from kdcache.soft_targets import SoftTargets

Key = str | int | Callable[[Any], Any]
"""Where an entry stands: a key, a position, a field's name, or a function of the batch that gives it."""
Put = Callable[[Any, SoftTargets], Any]
"""Makes a batch with soft targets of one without."""


def entry_of(batch: Any, key: Key, *, option: str) -> Any:
    """Give an entry of a batch.

    Parameters
    ----------
    batch : mapping, tuple, list, dataclass or any object
    key : str, int or callable
        A mapping's key, the position in a tuple or list, the name of a field or attribute, or a function of the batch.
    option : str
        What the key is called where it was given, for the message.

    Raises
    ------
    OptionError
        The batch has no such entry.
    """
    if callable(key):
        return key(batch)
    if isinstance(batch, Mapping):
        if key in batch:
            return batch[key]
        raise _no_entry(batch, key, option, f"the keys {list(batch)}")
    if isinstance(key, str) and hasattr(batch, key):
        return getattr(batch, key)
    if isinstance(batch, tuple | list):
        if isinstance(key, int) and -len(batch) <= key < len(batch):
            return batch[key]
        raise _no_entry(batch, key, option, f"{len(batch)} entries: give a position, such as {option}={len(batch) - 1}")
    raise _no_entry(batch, key, option, f"no such attribute: give {option}=callable(batch)")


def values_of(batch: Any) -> Any:
    """Give what a batch holds as a plain mapping or sequence, whose values can be moved; other objects as they are."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if _is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
    return batch


def moved_like(batch: Any, values: Any) -> Any:
    """Give a batch of the same kind with other values, those of `values_of` after their move."""
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)
        moved.update(values)
        return moved
    return dataclasses.replace(batch, **values) if _is_dataclass(batch) else values


def with_soft_targets(batch: Any, soft_targets: SoftTargets, *, name: str) -> Any:
    """Give a new batch that has soft targets beside what it had; the batch given stays as it is.

    A mapping gets an entry of the name (a copy of its own kind where it can be written to, else a dict), a tuple or
    list one more item at its end, a named tuple one more field. Dataclasses, and named tuples that have a field of the
    name, get it set where it holds None.

    Raises
    ------
    OptionError
        The batch holds something under the name already, or is of a kind that is not known.
    """
    if isinstance(batch, Mapping):
        return _in_mapping(batch, soft_targets, name)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return _in_named_tuple(batch, soft_targets, name)
    if isinstance(batch, tuple):
        return (*batch, soft_targets)
    if isinstance(batch, list):
        return [*batch, soft_targets]
    if _is_dataclass(batch) and name in {field.name for field in dataclasses.fields(batch)}:
        _refuse_taken(batch, getattr(batch, name), name)
        return dataclasses.replace(batch, **{name: soft_targets})
    kind = type(batch).__qualname__
    asked = f"give {kind} a field `{name}: SoftTargets | None = None`, or " if _is_dataclass(batch) else "give "
    raise OptionError(
        f"the loader's batches are {kind} objects, which have no place for soft targets; {asked}"
        "put=callable(batch, soft_targets), which returns the batch to train on (and key=callable(batch) for the ids). "
        "Nothing was read"
    )


def _in_mapping(batch: Mapping[Any, Any], soft_targets: SoftTargets, name: str) -> Any:
    if name in batch:
        _refuse_taken(batch, batch[name], name, is_there=True)
    if not isinstance(batch, MutableMapping):
        return {**batch, name: soft_targets}
    joined = copy.copy(batch)
    joined[name] = soft_targets
    return joined


def _in_named_tuple(batch: Any, soft_targets: SoftTargets, name: str) -> Any:
    if name in batch._fields:
        _refuse_taken(batch, getattr(batch, name), name)
        return batch._replace(**{name: soft_targets})
    return _longer_kind(type(batch).__name__, (*batch._fields, name))(*batch, soft_targets)


@functools.cache
def _longer_kind(kind: str, fields: tuple[str, ...]) -> Any:
    """Make a kind of named tuple, once, so that batches are of one kind."""
    return namedtuple(kind, fields)  # noqa: PYI024 - its fields are known when it runs


def _refuse_taken(batch: Any, value: Any, name: str, *, is_there: bool = False) -> None:
    if is_there or value is not None:
        raise OptionError(
            f"the loader's batches ({type(batch).__qualname__}) have an entry {name!r} already, a "
            f"{type(value).__name__}; it was not overwritten. Give the soft targets another name, "
            f"join(..., name={name + '_of_teachers'!r}), or take that entry out of the batches"
        )


def _is_dataclass(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _no_entry(batch: Any, key: Any, option: str, found: str) -> OptionError:
    return OptionError(
        f"the loader's batches have no entry {option}={key!r}: a batch is a {type(batch).__qualname__} with {found}. "
        f"Ids, labels and inputs are read from the batch itself: let the dataset give them, or say where they are with "
        f"{option}="
    )
