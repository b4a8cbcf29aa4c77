"""Soft targets: probabilities at a temperature, over one teacher or the mean of an ensemble.

Three means hide in "any temperature of an ensemble" (Hinton, Vinyals and Dean 2015, section 5.1, offers the first two),
and each has its name here:

- ``"geometric"``: softmax(sum_e w_e z_e / temperature), the normalised geometric mean of the members' soft targets.
- ``"arithmetic"``: sum_e w_e softmax(z_e / temperature), the arithmetic mean at the temperature asked for.
- ``"tempered-arithmetic"``: softmax(log(sum_e w_e softmax(z_e)) / temperature), the arithmetic mean at temperature 1,
  softened afterwards.

With one teacher the three are the same.

A cache of codec `TopK(tail="samples")` holds *log-weights* instead: log (p / probability of being kept) for the few
classes of a row that are kept, already over the exact partition function, and -inf for all others. Their weights are
unbiased at every temperature as they are, and a softmax would spoil that, so they are never normalised: a row sums to
1 on average only. Of the means, the arithmetic one alone keeps them unbiased; the other two are refused.

A *masked class*, with a logit of -inf, has the probability 0. The geometric mean masks a class that any member of
weight above 0 masks; the arithmetic means only one that all of them mask. Where members leave no class that all of them
allow, there is no geometric mean, and the row is NaN.
"""

from __future__ import annotations

__all__ = ["MEANS", "Mean", "SoftTargets", "log_mean_probabilities", "mean_logits", "soften"]

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kdcache.codecs.base import Decoder, check_codes, checked_temperature
from kdcache.errors import MergedCacheError, OptionError, ShapeError, UnknownTeacherError
from kdcache.row_selection import RowIndex, row_positions, select_rows

Mean = Literal["geometric", "arithmetic", "tempered-arithmetic"]
"""Name of a mean over teachers."""

MEANS: tuple[Mean, ...] = get_args(Mean)
"""All names of means."""


def soften(logits: Float[Tensor, "*batch class"], temperature: float | Tensor) -> Float[Tensor, "*batch class"]:
    """Turn logits into soft targets: softmax(logits / temperature) over the last axis.

    Equation 1 of Hinton, Vinyals and Dean (2015).

    Parameters
    ----------
    logits : Tensor [..., class]
        Of any floating-point type.
    temperature : float or 0-dim Tensor
        Finite, above 0.

    Returns
    -------
    Tensor [..., class]
        Probabilities; float64 for float64 logits, else float32.

    Raises
    ------
    TemperatureError
        The temperature is not a finite number above 0.

    Examples
    --------
    >>> soften(torch.tensor([2.0, 0.0]), temperature=2.0)
    tensor([0.7311, 0.2689])
    """
    return torch.softmax(at_least_float32(logits) / checked_temperature(temperature), dim=-1)


def mean_logits(
    logits: Float[Tensor, "row teacher class"], *, weights: Sequence[float] | Tensor | None = None
) -> Float[Tensor, "row class"]:
    """Average logits over teachers: sum_e w_e z_e, whose softmax is the geometric mean of the teachers' own.

    Parameters
    ----------
    logits : Tensor [row, teacher, class]
        Of any floating-point type; -inf where a class is masked.
    weights : sequence of float or Tensor [teacher], optional
        At least 0 and not all 0; divided by their sum. Equal where absent. Teachers of weight 0 are left out.

    Returns
    -------
    Tensor [row, class]
        float64 for float64 logits, else float32; -inf where a teacher masks the class.

    Raises
    ------
    OptionError
        A weight is negative or not finite, or all are 0.
    ShapeError
        The logits have other axes, or there is another number of weights than teachers.
    """
    logits = _checked_members(logits)
    if logits.shape[1] == 1:
        _normalised_weights(weights, logits)
        return logits[:, 0]
    normalised = _normalised_weights(weights, logits)
    used = [index for index, weight in enumerate(normalised) if weight > 0]
    if len(used) < len(normalised):  # 0 times -inf is NaN
        logits, normalised = logits[:, used], [normalised[index] for index in used]
    # no einsum: autocast and TF32 would compute a product of matrices in reduced precision
    return (logits * _weight_tensor(normalised, logits)[:, None]).sum(dim=1)


def log_mean_probabilities(
    logits: Float[Tensor, "row teacher class"],
    *,
    temperature: float | Tensor,
    mean: Mean = "geometric",
    weights: Sequence[float] | Tensor | None = None,
) -> Float[Tensor, "row class"]:
    """Give the logarithm of an ensemble's soft targets; the module's docstring defines the three means.

    Computed from log-softmax throughout: no probability is rounded to 0 before its logarithm is taken.

    Parameters
    ----------
    logits : Tensor [row, teacher, class]
        Of any floating-point type.
    temperature : float or 0-dim Tensor
        Finite, above 0.
    mean : {"geometric", "arithmetic", "tempered-arithmetic"}, default "geometric"
        The only one that needs no more than the mean of the logits is the default.
    weights : sequence of float or Tensor [teacher], optional
        At least 0 and not all 0; divided by their sum. Equal where absent.

    Returns
    -------
    Tensor [row, class]
        Natural logarithms of probabilities; float64 for float64 logits, else float32.

    Raises
    ------
    OptionError
        `mean` is no known mean; a weight is negative or not finite, or all are 0.
    ShapeError
        The logits have other axes, or there is another number of weights than teachers.
    TemperatureError
        The temperature is not a finite number above 0.

    Examples
    --------
    >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    >>> log_mean_probabilities(logits, temperature=1.0, mean="arithmetic").exp()
    tensor([[0.6904, 0.3096]])
    """
    check_choice("mean", mean, MEANS)
    divisor = checked_temperature(temperature)
    if mean == "geometric" or logits.shape[1:2] == (1,):
        return torch.log_softmax(mean_logits(logits, weights=weights) / divisor, dim=-1)
    members = _checked_members(logits)
    log_weights = _weight_tensor(_normalised_weights(weights, members), members).log()[:, None]
    if mean == "arithmetic":
        return torch.logsumexp(torch.log_softmax(members / divisor, dim=-1) + log_weights, dim=1)
    mixture = torch.logsumexp(torch.log_softmax(members, dim=-1) + log_weights, dim=1)
    return torch.log_softmax(mixture / divisor, dim=-1)


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """A batch of soft targets, still coded: decoded when asked for, at any temperature.

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
        """Move codes and decoders to a device; nothing is decoded.

        Parameters
        ----------
        device : torch.device or str
            The destination.
        non_blocking : bool, default False
            Let the copy of pinned memory overlap with computation.
        """
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
        return self._decode(tuple(range(len(self.codes))), checked_temperature(temperature))

    def probabilities(
        self,
        temperature: float | Tensor,
        *,
        mean: Mean = "geometric",
        weights: Sequence[float] | Mapping[str, float] | None = None,
        teachers: Sequence[str] | None = None,
    ) -> Float[Tensor, "row class"]:
        """Give the soft targets at a temperature; the parameters are those of `log_probabilities`.

        Returns
        -------
        Tensor [row, class]
            float32; each row sums to 1, where `is_normalised` on average. Rows that are not available are NaN.
        """
        return self.log_probabilities(temperature, mean=mean, weights=weights, teachers=teachers).exp()

    def log_probabilities(
        self,
        temperature: float | Tensor,
        *,
        mean: Mean = "geometric",
        weights: Sequence[float] | Mapping[str, float] | None = None,
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
        indices, ordered_weights = self._selection(mean, weights, teachers)
        if any(self.decoders[index].codec.is_normalised for index in indices):
            return self._log_mean_weights(indices, divisor, mean, ordered_weights)
        softened_afterwards = mean == "tempered-arithmetic" and len(indices) > 1
        members = self._decode(indices, 1.0 if softened_afterwards else divisor)
        return log_mean_probabilities(members, temperature=divisor, mean=mean, weights=ordered_weights)

    def mean_logits(
        self,
        *,
        temperature: float | Tensor = 1.0,
        weights: Sequence[float] | Mapping[str, float] | None = None,
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
        indices, ordered_weights = self._selection("geometric", weights, teachers)
        if any(self.decoders[index].codec.is_normalised for index in indices):
            raise OptionError(
                "These soft targets are sampled (codec TopK, tail='samples'): a row holds weights of the few classes "
                "that were drawn, and no logits to average or to match. Use a divergence on soft targets, such as "
                "'forward-kl' at a high temperature, or build the cache with TopK(tail='class-means') or Codes()."
            )
        return mean_logits(self._decode(indices, divisor), weights=ordered_weights)

    def _log_mean_weights(
        self, indices: tuple[int, ...], temperature: float, mean: Mean, weights: Sequence[float] | None
    ) -> Tensor:
        if len(indices) > 1 and mean != "arithmetic":
            raise OptionError(
                f"The {mean} mean of {len(indices)} teachers needs the probability of every class from each, and these "
                "soft targets are sampled (codec TopK, tail='samples'): most classes of a row have weight 0, which is "
                "right on average only. Use mean='arithmetic', which stays unbiased; or one of the `teachers`; or "
                "build the cache with merge='geometric', TopK(tail='class-means') or Codes()."
            )
        members = self._decode(indices, temperature) / temperature
        log_weights = _weight_tensor(_normalised_weights(weights, members), members).log()[:, None]
        if len(indices) == 1:
            return members[:, 0]
        for place, index in enumerate(indices):
            if not self.decoders[index].codec.is_normalised:
                members[:, place] = torch.log_softmax(members[:, place], dim=-1)
        return torch.logsumexp(members + log_weights, dim=1)

    def _decode(self, indices: tuple[int, ...], temperature: float) -> Tensor:
        decoded = [self.decoders[index].decode(self.codes[index], temperature=temperature) for index in indices]
        logits = decoded[0][:, None] if len(decoded) == 1 else torch.stack(decoded, dim=1)
        if self.available is None:
            return logits
        return logits.masked_fill(self.available.logical_not()[:, None, None], float("nan"))

    def _selection(
        self,
        mean: Mean,
        weights: Sequence[float] | Mapping[str, float] | None,
        teachers: Sequence[str] | None,
    ) -> tuple[tuple[int, ...], Sequence[float] | None]:
        check_choice("mean", mean, MEANS)
        if self.merge:
            self._check_merged(mean, weights, teachers)
            return (0,), None
        names = self.teacher_names if teachers is None else _checked_names(teachers, self.teacher_names)
        indices = tuple(self.teacher_names.index(name) for name in names)
        if not isinstance(weights, Mapping):
            return indices, weights
        return indices, _weights_by_name(weights, names, self.teacher_names)

    def _check_merged(self, mean: Mean, weights: object, teachers: object) -> None:
        asked = {"weights": weights, "teachers": teachers}
        refused = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
        if mean != "geometric":
            refused.insert(0, f"mean={mean!r}")
        if refused:
            raise MergedCacheError(
                f"This cache keeps only the geometric mean of {', '.join(self.teacher_names)}; it cannot give "
                f"{' or '.join(refused)}. Leave that out, or build the cache without `merge` to keep the members apart."
            )


def at_least_float32(values: Tensor) -> Tensor:
    """Give float64 tensors as they are and all others as float32."""
    return values if values.dtype == torch.float64 else values.to(torch.float32)


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices with a `OptionError`."""
    if value not in choices:
        raise OptionError(f"{option} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _checked_members(logits: Tensor) -> Tensor:
    if logits.ndim != 3:
        raise ShapeError(f"Logits must have the axes [row, teacher, class], got shape {tuple(logits.shape)}.")
    return at_least_float32(logits)


def _normalised_weights(weights: Sequence[float] | Tensor | None, logits: Tensor) -> list[float]:
    num_teachers = logits.shape[1]
    if weights is None:
        return [1 / num_teachers] * num_teachers
    listed = torch.as_tensor(weights, dtype=torch.float64).tolist()
    if not isinstance(listed, list) or len(listed) != num_teachers:
        raise ShapeError(f"{num_teachers} teachers need as many weights, got {weights!r}.")
    total = math.fsum(listed)
    if min(listed) < 0 or not (math.isfinite(total) and total > 0):
        raise OptionError(f"Weights must be finite, at least 0 and not all 0; got {weights!r}.")
    return [weight / total for weight in listed]


def _weight_tensor(weights: list[float], logits: Tensor) -> Tensor:
    if len(set(weights)) == 1:  # made on the device, without a copy that waits for it
        return logits.new_full((len(weights),), weights[0])
    return logits.new_tensor(weights)


def _checked_names(teachers: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(teachers, str):
        raise OptionError(f"`teachers` is a sequence of names, got the text {teachers!r}; write [{teachers!r}].")
    names = tuple(teachers)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UnknownTeacherError(f"Unknown teachers {unknown} among {list(names)}; the ensemble has {list(known)}.")
    if len(set(names)) < len(names):
        raise OptionError(f"A teacher is named twice in {list(names)}; use `weights` to give it more weight.")
    return names


def _weights_by_name(weights: Mapping[str, float], names: tuple[str, ...], known: tuple[str, ...]) -> list[float]:
    if set(weights) != set(names):
        raise UnknownTeacherError(
            f"Weights are given for {sorted(weights)}, the selected teachers are {list(names)} of {list(known)}. "
            "Name exactly the selected teachers; a weight may be 0."
        )
    return [weights[name] for name in names]
