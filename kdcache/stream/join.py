"""Joined batches: the batches of any loader, with soft targets beside what they hold, joined by the ids in them."""

from __future__ import annotations

__all__ = ["JoinedBatches", "StatefulJoinedBatches", "join_batches"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from kdcache.cache import SoftTargetCache
from kdcache.errors import NoStateError, OptionError
from kdcache.soft_targets import SoftTargets
from kdcache.stream.batch_checks import BatchChecks
from kdcache.stream.batch_forms import Key, Put, entry_of, moved_like, values_of, with_soft_targets
from kdcache.stream.look_ahead import AnnouncingBatchSampler, LookAhead, announcing_copy, ids_by_position
from kdcache.stream.rows_by_id import FoundRows, RowsById, RowsByPosition
from kdcache.stream.transfer import DeviceTransfer

_STATE_METHODS = ("state_dict", "load_state_dict")


class JoinedBatches:
    """The batches of a loader, each with soft targets. Made by `SoftTargetCache.join`.

    **By content.** The ids in a batch, and nothing else, say which rows it gets: whatever shuffles, filters, shards or
    reorders before, in whatever process. The cache is read in the process that iterates, never in the loader's workers.

    **What is refused**, at the first batch: ids that the cache does not know, ids of another type, an id that stands
    twice in a batch, labels that differ from the cache's (in every batch) and, with `input_key`, inputs that are not
    those the teachers saw (all of each iteration's first batch, one of every further batch). Without `input_key`, an
    id that names another input than it did is not seen, nor one that names two inputs in different batches. The number
    of classes of the student is not known here: the loss compares it.

    **Look-ahead.** Where the loader is exactly a `torch.utils.data.DataLoader` over a map-style dataset with a batch
    sampler, and the id at each position is known, soft targets are read on a thread from the moment the sampler hands
    the positions out; with workers that is ``num_workers * prefetch_factor`` batches ahead, and never more are held.
    It is a hint: a batch whose ids are others, or in another order, is read when it arrives. The loader itself is left
    as it is (a shallow copy of it is iterated, with workers of its own, which persist where they are asked to).

    Attributes that are not its own are the loader's, such as ``dataset`` or ``sampler``.

    Parameters
    ----------
    cache : SoftTargetCache
    loader : iterable of batches
        A DataLoader, a StatefulDataLoader, a generator: anything. An iterator serves one pass.
    key : str, int or callable, default "example_id"
        Where the ids stand: a mapping's key, a position in a tuple or list, the name of a field, or a function of the
        batch. Ids are an int64 tensor or array [example], or a list or tuple of str or int.
    name : str, default "soft_targets"
        Under which soft targets are put into mappings and fields. Tuples and lists get them as a last item, named
        tuples as a last field of this name; dataclasses need a field of this name that holds None. A mapping stays of
        its kind, a BatchEncoding too. What stands there already is never overwritten.
    put : callable (batch, soft_targets) -> batch, optional
        Does that instead, for any kind of batch.
    input_key : str, int or callable, optional
        Where the inputs stand as they were before any augmentation: a tensor or array [example, ...], a mapping of
        such, or a sequence of one input an example. They are held against the cache's input digests.
    label_key : str, int, callable, "auto" or None, default "auto"
        Where the labels stand that are held against the cache's: one integer an example. "auto" takes an entry or a
        field "label" or "labels" if it is that, so that the labels of sequences are left alone; in plain tuples and
        lists none is known by name. None compares none.
    example_ids : sequence of int or str, optional
        The id at every position of the loader's dataset, for the look-ahead. By default the dataset's attribute
        `example_ids`, where it has one.
    view_index : int, default 0
        The view whose soft targets are read.
    teachers : sequence of str, optional
        Read only these.
    device : str, optional
        Where batches are copied, soft targets included; these stay coded. Tensors in mappings, sequences and
        dataclasses move; other objects do not.
    allow_repeats : bool, default False
        Take batches in which an id stands more than once.
    max_resident_bytes : int, default 2 GiB
        A cache whose coded rows take no more is held in memory; of a larger one the chunks of each batch are read.

    Raises
    ------
    OptionError
        An option cannot serve this loader or this cache.
    ShapeError
        There is no such view.
    UnknownTeacherError
        A teacher is not in the cache.

    Examples
    --------
    >>> import tempfile, torch, kdcache
    >>> pictures = torch.randn(10, 4)
    >>> examples = kdcache.TransferSet.from_arrays(pictures, example_ids=[f"picture-{index}" for index in range(10)])
    >>> cache = kdcache.build_cache(tempfile.mkdtemp() + "/cache", examples, {"a": torch.nn.Linear(4, 2)})
    >>> dataset = [{"example_id": f"picture-{index}", "input": picture} for index, picture in enumerate(pictures)]
    >>> loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    >>> [len(batch["soft_targets"]) for batch in cache.join(loader, key="example_id")]
    [4, 4, 2]
    """

    def __init__(
        self,
        cache: SoftTargetCache,
        loader: Iterable[Any],
        *,
        key: Key,
        name: str,
        put: Put | None,
        input_key: Key | None,
        label_key: Key | None,
        example_ids: Sequence[int] | Sequence[str] | np.ndarray | None,
        view_index: int,
        teachers: Sequence[str] | None,
        device: str | None,
        allow_repeats: bool,
        max_resident_bytes: int,
    ) -> None:
        self.loader = loader
        self._key, self._name, self._put = key, name, put
        ids = ids_by_position(loader, example_ids)
        self._rows = RowsById(
            cache, view_index=view_index, teachers=teachers, allow_repeats=allow_repeats,
            max_resident_bytes=max_resident_bytes,
        )  # fmt: skip
        self._by_position = None if ids is None else RowsByPosition(self._rows, ids)
        self._checks = BatchChecks(self._rows, input_key=input_key, label_key=label_key)
        self._transfer = DeviceTransfer(device)
        self._iterated: Iterable[Any] = loader
        self._sampler: AnnouncingBatchSampler | None = None
        if self._by_position is not None:
            self._iterated, self._sampler = announcing_copy(loader)  # type: ignore[arg-type]  # it is a DataLoader
        self._is_used_up = False

    def __repr__(self) -> str:
        ahead = ", looks ahead" if self.looks_ahead else ""
        return f"JoinedBatches({type(self.loader).__qualname__} with {self._rows.cache!r}{ahead})"

    def __len__(self) -> int:
        """Count the loader's batches; its own error where it cannot."""
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "loader" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _STATE_METHODS:
            raise NoStateError(
                f"the joined loader is a {_kind_in_words(self.loader)}, which keeps no state: there is no {name} to "
                "save a position within an epoch or to go on from one. Join a torchdata.stateful_dataloader."
                "StatefulDataLoader, which takes the same arguments as torch's DataLoader, or use a "
                "kdcache.SoftTargetLoader"
            )
        return getattr(self.loader, name)

    @property
    def looks_ahead(self) -> bool:
        """Whether soft targets are read from the moment the sampler hands out what comes next."""
        return self._sampler is not None

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, its batch sampler and its sampler the epoch: those of them that want to know."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        samplers = (getattr(self.loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        told: set[int] = set()
        for part in (self.loader, batch_sampler, *samplers):
            if callable(getattr(part, "set_epoch", None)) and id(part) not in told:
                told.add(id(part))
                part.set_epoch(epoch)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Any]:
        """Give the loader's batches with soft targets; nothing is read on from the loader before it is asked for."""
        if self._is_used_up:
            raise OptionError(
                f"the joined loader is a {_kind_in_words(self.loader)}, an iterator that has been used up: a further "
                "pass would be empty. Join it anew for every epoch, or join a loader that can be iterated again"
            )
        number = 0
        with self._look_ahead() as ahead:
            for batch in self._begun(ahead):
                number += 1
                yield self._joined(batch, number, ahead)
        self._is_used_up = self.loader is self._iterated and isinstance(self.loader, Iterator)

    def _look_ahead(self) -> LookAhead[_ReadRows] | nullcontext[None]:
        if self._by_position is None:
            return nullcontext()
        find = self._by_position.find
        return LookAhead(self._by_position.ids, lambda positions: self._read(find(positions)))

    def _begun(self, ahead: LookAhead[_ReadRows] | None) -> Iterator[Any]:
        if self._sampler is None:
            return iter(self._iterated)
        self._sampler.listener = ahead
        try:
            return iter(self._iterated)  # a loader with workers begins its sampler twice here, and drops the first
        finally:
            self._sampler.listener = None

    def _read(self, found: FoundRows) -> _ReadRows:
        return _ReadRows(found, *self._transfer.send((self._rows.read(found),)))

    def _joined(self, batch: Any, number: int, ahead: LookAhead[_ReadRows] | None) -> Any:
        where = f"batch {number} of the loader joined with cache {self._rows.cache.address}"
        ids = self._rows.ids(entry_of(batch, self._key, option="key"), where=where)
        rows = None if ahead is None else ahead.take(ids)
        found = self._rows.find(ids, where=where) if rows is None else rows.found
        self._checks.check(batch, found, is_first=number == 1, where=where)
        rows = self._read(found) if rows is None else rows
        (soft_targets,) = self._transfer.received(rows.sent, rows.copied)
        return self._put_onto(self._moved(batch), soft_targets)

    def _moved(self, batch: Any) -> Any:
        if self._transfer.device is None:
            return batch
        (values,) = self._transfer.received(*self._transfer.send((values_of(batch),)))
        return moved_like(batch, values)

    def _put_onto(self, batch: Any, soft_targets: SoftTargets) -> Any:
        if self._put is not None:
            return self._put(batch, soft_targets)
        return with_soft_targets(batch, soft_targets, name=self._name)


class StatefulJoinedBatches(JoinedBatches):
    """`JoinedBatches` of a loader that keeps a state, such as torchdata's StatefulDataLoader.

    The state is the loader's. One that is taken after a batch is the position behind that batch: nothing is read on
    from the loader.
    """

    def state_dict(self) -> dict[str, Any]:
        """Give the loader's state."""
        state: dict[str, Any] = self.loader.state_dict()  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the loader go on where `state_dict` was taken."""
        self.loader.load_state_dict(state)  # type: ignore[attr-defined]


def join_batches(cache: SoftTargetCache, loader: Iterable[Any], **options: Any) -> JoinedBatches:
    """Join a loader with a cache; what `SoftTargetCache.join` does, with its options."""
    keeps_state = all(callable(getattr(loader, method, None)) for method in _STATE_METHODS)
    return (StatefulJoinedBatches if keeps_state else JoinedBatches)(cache, loader, **options)


class _ReadRows(NamedTuple):
    """Soft targets on their way to the device, and the rows they are."""

    found: FoundRows
    sent: tuple[Any, ...]
    copied: torch.cuda.Event | None


def _kind_in_words(loader: object) -> str:
    return f"{type(loader).__module__}.{type(loader).__qualname__}"
