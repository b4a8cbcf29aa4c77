"""The batch of soft targets that a reader hands out: coded until it is asked."""

from __future__ import annotations

__all__ = ["SoftTargets"]

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kdcache.codecs.base import Decoder, check_codes, checked_temperature, row_blocks
from kdcache.errors import OptionError, ShapeError
from kdcache.row_selection import RowIndex, row_positions, select_rows
from kdcache.soft_targets.decoded import decoded_codes
from kdcache.soft_targets.means import (
    MEANS,
    Mean,
    check_choice,
    log_mean_probabilities,
    log_mean_weights,
    mean_logits,
    normalised_weights,
    softened_blocks,
    softened_elements,
)
from kdcache.soft_targets.selection import Weights, refuse_members, selected_teachers

_DECODED_ELEMENTS = 2**25  # 128 MiB of float32: enough rows for a product with a wide basis to be quick


@dataclass(frozen=True, eq=False, repr=False)
class SoftTargets:
    """A batch of soft targets, still coded: decoded when asked for, at any temperature.

    Whatever is asked for is decoded and softened in blocks of rows: beside the result, no more is held than 2^25
    decoded numbers (128 MiB) and what softening needs of a few rows, or of one row where that is more. A consumer that
    needs no whole result takes `row_blocks`. Within `torch.compile` the batch is one block.

    Parameters
    ----------
    codes : tuple of Tensor [row, column]
        The stored codes of each teacher, or of the one merged array.
    decoders : tuple of Decoder
        One for each of `codes`, all of the same number of classes.
    teacher_names : tuple of str
        In the ensemble's order: one for each of `codes`, or all members of a merged cache.
    merge : {None, "geometric"}, default None
        "geometric" where the cache keeps only the members' mean logits.
    available : Tensor [row] of bool, optional
        False in rows that the cache does not hold yet, which read as NaN. All rows are available where absent.
    num_rows : Tensor [example] of int64, optional
        Rows of each example, in order, where an example has several (positions of a sequence).

    Raises
    ------
    CodecError
        Codes have another dtype than their decoder reads.
    ShapeError
        The counts of codes, decoders, names, rows or classes contradict one another.

    Examples
    --------
    >>> from kdcache.codecs import codec_for
    >>> from kdcache.documents.codec_specs import Lossless
    >>> decoder = Decoder(codec_for(Lossless(), num_classes=2), {})
    >>> soft_targets = SoftTargets((torch.tensor([[2.0, 0.0], [0.0, 0.0]]),), (decoder,), ("a",))
    >>> len(soft_targets), soft_targets[:1].probabilities(temperature=2.0)
    (2, tensor([[0.7311, 0.2689]]))
    """

    codes: tuple[Shaped[Tensor, "row column"], ...]
    decoders: tuple[Decoder, ...]
    teacher_names: tuple[str, ...]
    merge: Literal["geometric"] | None = None
    available: Bool[Tensor, " row"] | None = None
    num_rows: Int[Tensor, " example"] | None = None

    def __post_init__(self) -> None:
        num_names = 1 if self.merge else len(self.teacher_names)
        if not self.codes or not len(self.codes) == len(self.decoders) == num_names:
            raise ShapeError(
                f"Each stored array needs a decoder and a teacher: got {len(self.codes)} arrays of codes, "
                f"{len(self.decoders)} decoders and the teachers {self.teacher_names} with merge={self.merge!r}."
            )
        for codes, decoder in zip(self.codes, self.decoders, strict=True):
            check_codes(codes, decoder.codec)
        rows = [codes.shape[0] for codes in self.codes]
        classes = [decoder.codec.num_classes for decoder in self.decoders]
        if len(set(rows)) > 1 or len(set(classes)) > 1:
            raise ShapeError(f"Teachers {self.teacher_names} differ: they have {rows} rows and {classes} classes.")
        if self.available is not None and self.available.shape != (rows[0],):
            raise ShapeError(f"`available` has the shape {tuple(self.available.shape)} for {rows[0]} rows.")

    def __len__(self) -> int:
        return self.codes[0].shape[0]

    def __repr__(self) -> str:
        held = f"merge={self.merge!r} of {self.teacher_names}" if self.merge else f"teachers={self.teacher_names}"
        codecs = tuple(dict.fromkeys(decoder.codec.spec.kind for decoder in self.decoders))
        return (
            f"SoftTargets(rows={len(self)}, {held}, classes={self.num_classes}, codecs={codecs}, "
            f"device={str(self.device)!r}, coded_bytes={sum(codes.nbytes for codes in self.codes)})"
        )

    def __getitem__(self, index: RowIndex) -> SoftTargets:
        return self.rows(index)

    def __iter__(self) -> Iterator[SoftTargets]:
        return (self.rows(row) for row in range(len(self)))

    @property
    def num_classes(self) -> int:
        """Classes of a row."""
        return self.decoders[0].codec.num_classes

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes[0].device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SoftTargets:
        """Move codes and decoders to a device; nothing is decoded. Gives itself where all lie there already.

        Parameters
        ----------
        device : torch.device or str
            The destination.
        non_blocking : bool, default False
            Let the copy of pinned memory overlap with computation.
        """
        if self._is_on(torch.device(device)):
            return self
        return SoftTargets(
            tuple(codes.to(device, non_blocking=non_blocking) for codes in self.codes),
            tuple(decoder.to(device) for decoder in self.decoders),
            self.teacher_names,
            self.merge,
            None if self.available is None else self.available.to(device, non_blocking=non_blocking),
            self.num_rows,
        )

    def pin_memory(self) -> SoftTargets:
        """Copy the codes into page-locked memory, from which `to` can copy without blocking."""
        return SoftTargets(
            tuple(codes.pin_memory() for codes in self.codes),
            self.decoders,
            self.teacher_names,
            self.merge,
            None if self.available is None else self.available.pin_memory(),
            self.num_rows,
        )

    def decoded(self) -> SoftTargets:
        """Decode once for several readers: the same rows and results, held as float32 logits of each teacher.

        Rows x teachers x classes x 4 bytes. Teachers of codec `TopK` stay coded: their logits are others at every
        temperature, or sampled. Those of float32 `Lossless` are held so already.
        """
        decoded = [decoded_codes(*held) for held in zip(self.codes, self.decoders, strict=True)]
        codes, decoders = zip(*decoded, strict=True)
        return SoftTargets(codes, decoders, self.teacher_names, self.merge, self.available, self.num_rows)

    def rows(self, index: RowIndex) -> SoftTargets:
        """Select rows by a number, a slice, row indices or a mask of bool; still coded.

        The selection forgets `num_rows`, because it may cut through an example.

        Parameters
        ----------
        index : int, slice, or sequence, ndarray or Tensor [index] of integers or [row] of bool
            A single number gives a batch of one row. Negative numbers count from the end. Moved to the codes' device;
            there, the range of indices that lie on an accelerator is left for the device to check.

        Raises
        ------
        ShapeError
            There is no such row, a mask has another length than the batch, or the index is no index of rows.
        """
        chosen = index if isinstance(index, slice) else row_positions(index, len(self)).to(self.device)
        return SoftTargets(
            tuple(select_rows(codes, chosen) for codes in self.codes),
            self.decoders,
            self.teacher_names,
            self.merge,
            None if self.available is None else select_rows(self.available, chosen),
        )

    def row_blocks(self, *, max_elements: int = _DECODED_ELEMENTS) -> Iterator[tuple[slice, SoftTargets]]:
        """Cut the batch into blocks of consecutive rows, still coded: for what needs no whole [row, class] array.

        Parameters
        ----------
        max_elements : int, default 2^25
            Rows x teachers x classes of a block at most; a block has one row at least. The default is 128 MiB decoded.
            With codec `Spectral`, blocks of fewer than about 64 rows decode slowly: each reads the whole basis.

        Yields
        ------
        slice
            The rows' places in this batch.
        SoftTargets
            These rows. They share the codes' memory, and forget `num_rows`.

        Raises
        ------
        OptionError
            `max_elements` is not a whole number of at least 1.

        Examples
        --------
        >>> from kdcache.codecs import codec_for
        >>> from kdcache.documents.codec_specs import Lossless
        >>> decoder = Decoder(codec_for(Lossless(), num_classes=2), {})
        >>> soft_targets = SoftTargets((torch.zeros(5, 2),), (decoder,), ("a",))
        >>> for rows, block in soft_targets.row_blocks(max_elements=4):
        ...     print(rows, float(block.probabilities(1.0).sum()))
        slice(0, 2, None) 2.0
        slice(2, 4, None) 2.0
        slice(4, 5, None) 1.0
        """
        if isinstance(max_elements, bool) or not isinstance(max_elements, SupportsIndex) or int(max_elements) < 1:
            raise OptionError(f"max_elements is {max_elements!r}; expected a whole number of at least 1")
        blocks = row_blocks(len(self), self.num_classes * len(self.codes), max_elements=max_elements)
        return ((rows, self.rows(rows)) for rows in blocks)

    @property
    def depends_on_temperature(self) -> bool:
        """Whether a teacher's codec decodes to other logits at every temperature, as `TopK` does."""
        return any(decoder.codec.depends_on_temperature for decoder in self.decoders)

    @property
    def is_normalised(self) -> bool:
        """Whether a teacher's codec gives log-weights in place of logits, as `TopK(tail="samples")` does."""
        return any(decoder.codec.is_normalised for decoder in self.decoders)

    def logits(self, *, temperature: float | Tensor = 1.0) -> Float[Tensor, "row teacher class"]:
        """Decode the logits.

        Parameters
        ----------
        temperature : float or 0-dim Tensor, default 1.0
            The one at which they will be softened. Codec `TopK` gives other logits at each; all others ignore it.

        Returns
        -------
        Tensor [row, teacher, class]
            float32; each row of each teacher is shifted by a number of its own, which softmax does not see. A merged
            cache has one teacher: the mean. Rows that are not available are NaN. Where `is_normalised`, they are
            temperature * log-weight, for which softmax is wrong.

        Raises
        ------
        TemperatureError
            The temperature is not a finite number above 0.
        """
        indices, divisor = tuple(range(len(self.codes))), checked_temperature(temperature)
        if len(indices) == 1 or self._is_one_block(indices):
            return self._decoded(indices, divisor)
        logits = torch.empty(len(self), len(indices), self.num_classes, dtype=torch.float32, device=self.device)
        for rows, block in self.row_blocks():
            for index in indices:
                logits[rows, index] = block._decoded((index,), divisor)[:, 0]  # noqa: SLF001 - its own kind
        return logits

    def probabilities(
        self,
        temperature: float | Tensor,
        *,
        mean: Mean = "geometric",
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
    ) -> Float[Tensor, "row class"]:
        """Give the soft targets at a temperature; the parameters are those of `log_probabilities`.

        Returns
        -------
        Tensor [row, class]
            float32; each row sums to 1, where `is_normalised` on average. Rows that are not available are NaN.
        """
        return self.log_probabilities(temperature, mean=mean, weights=weights, teachers=teachers).exp_()

    def log_probabilities(
        self,
        temperature: float | Tensor,
        *,
        mean: Mean = "geometric",
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
    ) -> Float[Tensor, "row class"]:
        """Give the natural logarithm of the soft targets at a temperature.

        Decodes once, at the temperature; for the tempered-arithmetic mean of several teachers at 1. The module's
        docstring defines the means.

        Parameters
        ----------
        temperature : float or 0-dim Tensor
            Finite, above 0.
        mean : {"geometric", "arithmetic", "tempered-arithmetic"}, default "geometric"
            How the teachers are averaged.
        weights : sequence of float, or mapping of teacher's name to float, optional
            A sequence follows the selected teachers; a mapping names each of them. Divided by their sum; equal where
            absent.
        teachers : sequence of str, optional
            Names of the teachers to use. All where absent.

        Returns
        -------
        Tensor [row, class]
            float32. Rows that are not available are NaN. Where `is_normalised`, the log-weights as they are; of several
            teachers, the logarithm of their weights' arithmetic mean.

        Raises
        ------
        OptionError
            `mean` is no known mean, or one that sampled soft targets of several teachers do not have; a weight is
            negative or not finite, or all are 0; a teacher is named twice, or `teachers` is a text.
        MergedCacheError
            The cache keeps only the geometric mean, and another mean, weights or teachers were asked for.
        ShapeError
            There is another number of weights than selected teachers.
        TemperatureError
            The temperature is not a finite number above 0.
        UnknownTeacherError
            A name in `teachers` or `weights` is not of this ensemble, or `weights` lacks a selected teacher.
        """
        divisor = checked_temperature(temperature)
        indices, ordered = self._selection(mean, weights, teachers)
        is_sampled = [self.decoders[index].codec.is_normalised for index in indices]
        if any(is_sampled):
            _check_mean_of_sampled(mean, len(indices))
            return self._reduced(
                indices,
                divisor,
                lambda members: log_mean_weights(members / divisor, is_normalised=is_sampled, weights=ordered),
            )
        softened_afterwards = mean == "tempered-arithmetic" and len(indices) > 1
        return self._reduced(
            indices,
            1.0 if softened_afterwards else divisor,
            lambda members: log_mean_probabilities(members, temperature=divisor, mean=mean, weights=ordered),
        )

    def mean_logits(
        self,
        *,
        temperature: float | Tensor = 1.0,
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
    ) -> Float[Tensor, "row class"]:
        """Give the mean of the teachers' logits, up to a shift of each row.

        Parameters are those of `logits` and `log_probabilities`.

        Raises
        ------
        OptionError
            As for `log_probabilities`; or a teacher's soft targets are sampled: they have no logits.
        MergedCacheError, ShapeError, TemperatureError, UnknownTeacherError
            As for `log_probabilities`.
        """
        divisor = checked_temperature(temperature)
        indices, ordered = self._selection("geometric", weights, teachers)
        if any(self.decoders[index].codec.is_normalised for index in indices):
            raise OptionError(
                "These soft targets are sampled (codec TopK, tail='samples'): a row holds weights of the few classes "
                "that were drawn, and no logits to average or to match. Use a divergence on soft targets, such as "
                "'forward-kl' at a high temperature, or build the cache with TopK(tail='class-means') or Codes()."
            )
        if len(indices) == 1:
            normalised_weights(ordered, 1)
            return self._decoded_alone(indices[0], divisor)
        return self._reduced(indices, divisor, lambda members: mean_logits(members, weights=ordered))

    def members(
        self,
        temperature: float | Tensor = 1.0,
        *,
        weights: Weights | None = None,
        teachers: Sequence[str] | None = None,
    ) -> tuple[Float[Tensor, "row teacher class"], list[float]]:
        """Decode the logits of selected teachers, as `logits` does, and give their weights, which sum to 1.

        For a consumer that takes a mean of its own, a few rows at a time. All rows are decoded at once.

        Raises
        ------
        MergedCacheError, OptionError, ShapeError, TemperatureError, UnknownTeacherError
            As for `log_probabilities`.
        """
        indices, ordered = self._selection("arithmetic", weights, teachers)
        return self._decoded(indices, checked_temperature(temperature)), normalised_weights(ordered, len(indices))

    def is_sampled(self, teachers: Sequence[str] | None = None) -> bool:
        """Tell whether one of these teachers, of all where absent, gives log-weights in place of logits."""
        indices, _ = self._selection("geometric", None, teachers)
        return any(self.decoders[index].codec.is_normalised for index in indices)

    def check_selection(self, *, mean: Mean, weights: Weights | None, teachers: Sequence[str] | None) -> None:
        """Refuse a mean, weights or teachers that this batch does not have.

        Raises
        ------
        MergedCacheError, OptionError, UnknownTeacherError
            As for `log_probabilities`.
        """
        self._selection(mean, weights, teachers)

    def _reduced(
        self, indices: tuple[int, ...], temperature: float, reduce: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "row class"]:
        """Decode the teachers and reduce their logits [row, teacher, class] to [row, class], a few rows at a time."""
        if self._is_one_block(indices):
            return reduce(self._decoded(indices, temperature))
        result = torch.empty(len(self), self.num_classes, dtype=torch.float32, device=self.device)
        for rows in row_blocks(len(self), self.num_classes * len(indices), max_elements=_DECODED_ELEMENTS):
            self.rows(rows)._reduce_into(result[rows], indices, temperature, reduce)  # noqa: SLF001 - its own kind
        return result

    def _reduce_into(
        self, result: Tensor, indices: tuple[int, ...], temperature: float, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        members = [self._decoded((index,), temperature) for index in indices]
        for rows in softened_blocks(len(self), self.num_classes * len(indices), self.device):
            result[rows] = reduce(_side_by_side([values[rows] for values in members]))

    def _decoded(self, indices: tuple[int, ...], temperature: float) -> Float[Tensor, "row teacher class"]:
        return _side_by_side([self._decoded_alone(index, temperature)[:, None] for index in indices])

    def _decoded_alone(self, index: int, temperature: float) -> Float[Tensor, "row class"]:
        logits = self.decoders[index].decode(self.codes[index], temperature=temperature)
        if self.available is None:
            return logits
        return logits.masked_fill_(self.available.logical_not()[:, None], float("nan"))

    def _is_on(self, device: torch.device) -> bool:
        tensors = self.codes if self.available is None else (*self.codes, self.available)
        return all(values.device == device for values in tensors) and all(
            decoder.to(device) is decoder for decoder in self.decoders
        )

    def _is_one_block(self, indices: tuple[int, ...]) -> bool:
        """Tell whether nothing is gained by going block by block; a compiler fuses the temporaries itself."""
        if torch.compiler.is_compiling():
            return True
        return len(self) * self.num_classes * len(indices) <= softened_elements(self.device)

    def _selection(
        self, mean: Mean, weights: Weights | None, teachers: Sequence[str] | None
    ) -> tuple[tuple[int, ...], Sequence[float] | None]:
        check_choice("mean", mean, MEANS)
        if self.merge:
            refuse_members(self.teacher_names, mean=mean, weights=weights, teachers=teachers)
            return (0,), None
        return selected_teachers(self.teacher_names, teachers, weights)


def _side_by_side(members: list[Tensor]) -> Tensor:
    return members[0] if len(members) == 1 else torch.cat(members, dim=1)


def _check_mean_of_sampled(mean: Mean, num_teachers: int) -> None:
    if num_teachers > 1 and mean != "arithmetic":
        raise OptionError(
            f"The {mean} mean of {num_teachers} teachers needs the probability of every class from each, and these "
            "soft targets are sampled (codec TopK, tail='samples'): most classes of a row have weight 0, which is "
            "right on average only. Use mean='arithmetic', which stays unbiased; or one of the `teachers`; or "
            "build the cache with merge='geometric', TopK(tail='class-means') or Codes()."
        )
