"""What a batch holds beside its ids, against what the cache keeps of those examples: labels and input digests."""

from __future__ import annotations

__all__ = ["BatchChecks"]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdcache.cache import SoftTargetCache
from kdcache.errors import InputMismatchError, OptionError
from kdcache.stream.batch_forms import Key, entry_of
from kdcache.stream.rows_by_id import FoundRows, RowsById
from kdcache.transfer_set.digests import input_digest

_LABEL_NAMES = ("label", "labels")


class BatchChecks:
    """Holds labels of every batch, all inputs of the first and one of every further batch against the cache.

    Parameters
    ----------
    rows : RowsById
    input_key : str, int or callable, optional
        Where the inputs stand as they were before any augmentation: a tensor or array [example, ...], a mapping of
        such, or a sequence of inputs, one an example.
    label_key : str, int, callable or None
        Where integer labels [example] stand. "auto" takes an entry or a field "label" or "labels" that is one integer
        an example, where the cache has labels; None compares none.

    Raises
    ------
    OptionError
        What is to be compared is not kept by the cache.
    """

    def __init__(self, rows: RowsById, *, input_key: Key | None, label_key: Key | None) -> None:
        self._rows = rows
        self._input_key = input_key
        self._label_key = label_key
        _refuse_unkept(rows.cache, input_key, label_key)

    def check(self, batch: Any, found: FoundRows, *, is_first: bool, where: str) -> None:
        """Refuse a batch whose labels or inputs are not the cache's.

        Raises
        ------
        InputMismatchError
            A label or an input is another one.
        OptionError
            What stands under a key is no label, or no input, an example.
        """
        self._check_labels(batch, found, where)
        if self._input_key is not None and len(found.ids):
            every = np.arange(len(found.ids))
            self._check_inputs(
                batch, found, every if is_first else every[[int(found.first_row[0]) % len(every)]], where
            )

    def _check_labels(self, batch: Any, found: FoundRows, where: str) -> None:
        labels = self._labels(batch, len(found.ids), where)
        kept = None if labels is None else self._rows.cache.labels
        if labels is None or kept is None:
            return
        expected = kept[self._rows.example_indices(found)]
        differ = np.flatnonzero(labels != expected)
        if len(differ):
            first = int(differ[0])
            raise InputMismatchError(
                f"{where}: {len(differ)} of {len(labels)} labels differ from those cache {self._rows.cache.address} "
                f"was built with: example {found.ids.item(first)!r} has {labels[first]} in the batch and "
                f"{expected[first]} in the cache. Its ids may name other examples than they did; give the dataset the "
                "cache was built from. To train on other labels on purpose, give label_key=None"
            )

    def _labels(self, batch: Any, num_examples: int, where: str) -> np.ndarray | None:
        if self._label_key is None:
            return None
        if self._label_key == "auto":
            values = [value for value in (_named(batch, name) for name in _LABEL_NAMES) if value is not None]
            return _integers(values[0], num_examples) if values else None
        labels = _integers(entry_of(batch, self._label_key, option="label_key"), num_examples)
        if labels is None:
            raise OptionError(
                f"{where}: the entry label_key={self._label_key!r} is not one integer label for each of its "
                f"{num_examples} examples, so it cannot be compared with the cache's. Labels of sequences are compared "
                "with nothing: give label_key=None"
            )
        return labels

    def _check_inputs(self, batch: Any, found: FoundRows, places: np.ndarray, where: str) -> None:
        kept = self._rows.cache.input_digests_of(self._rows.example_indices(found)[places])
        if kept is None or self._input_key is None:
            return
        inputs = entry_of(batch, self._input_key, option="input_key")
        for place, digest in zip(places.tolist(), kept, strict=True):
            if input_digest(_input_at(inputs, place, len(found.ids), where)) != digest.tobytes():
                raise InputMismatchError(
                    f"{where}: the input of example {found.ids.item(place)!r} is not the one that the teachers of "
                    f"cache {self._rows.cache.address} saw: its digest differs. Its soft targets would be wrong. Give "
                    "the inputs as they were before any augmentation, of the same type, under the same ids; "
                    "input_key=None compares none"
                )


def _named(batch: Any, name: str) -> Any:
    """Give an entry of a mapping or a field of a named tuple or object; None where there is none of this name."""
    if isinstance(batch, Mapping):
        return batch.get(name)
    return None if isinstance(batch, torch.Tensor) else getattr(batch, name, None)


def _refuse_unkept(cache: SoftTargetCache, input_key: Key | None, label_key: Key | None) -> None:
    if input_key is not None and cache.input_digests_of(np.zeros(1, np.int64)) is None:
        raise OptionError(
            f"input_key={input_key!r} was given, but cache {cache.address} keeps no input digests: it was built from a "
            "TransferSet(digest_inputs=False). Leave input_key out; changed inputs are then not noticed"
        )
    if label_key not in {None, "auto"} and cache.labels is None:
        raise OptionError(
            f"label_key={label_key!r} was given, but cache {cache.address} keeps no labels to compare with. Leave "
            "it out"
        )


def _integers(values: Any, num_examples: int) -> np.ndarray | None:
    """Give labels as integers [example], or None where they are something else."""
    if isinstance(values, torch.Tensor):
        is_integer = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        labels = values.detach().cpu().numpy() if is_integer and values.ndim == 1 else None
    elif isinstance(values, np.ndarray | list | tuple) and all(np.ndim(value) == 0 for value in values):
        labels = np.asarray(values)
    else:
        labels = None
    return labels if labels is not None and labels.shape == (num_examples,) and labels.dtype.kind in "iu" else None


def _input_at(inputs: Any, place: int, num_examples: int, where: str) -> Any:
    """Give one example's input out of a batch of them."""
    if isinstance(inputs, Mapping):
        return {key: _input_at(value, place, num_examples, where) for key, value in inputs.items()}
    is_sequence = isinstance(inputs, torch.Tensor | np.ndarray | Sequence) and not isinstance(inputs, str | bytes)
    if not is_sequence or len(inputs) != num_examples:
        found = f"{len(inputs)} inputs" if is_sequence else f"a {type(inputs).__name__}"
        raise OptionError(
            f"{where}: what input_key names holds {found} for {num_examples} examples; it must be a tensor [example, "
            "...], a mapping of such, or a sequence of one input an example. input_key=callable(batch) can make that"
        )
    return inputs[place]
