"""Logits to soft targets: one teacher's, and the means of several; the package's docstring defines them."""

from __future__ import annotations

__all__ = [
    "ACCELERATOR_ELEMENTS",
    "MEANS",
    "Mean",
    "at_least_float32",
    "check_choice",
    "log_mean_probabilities",
    "log_mean_weights",
    "mean_logits",
    "normalised_weights",
    "soften",
    "softened_blocks",
    "softened_elements",
]

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.codecs.base import BLOCK_ELEMENTS, checked_temperature, row_blocks
from kdcache.errors import OptionError, ShapeError

Mean = Literal["geometric", "arithmetic", "tempered-arithmetic"]
"""Name of a mean over teachers."""

MEANS: tuple[Mean, ...] = get_args(Mean)
"""All names of means."""

ACCELERATOR_ELEMENTS = 2**22
"""Elements softened at a time on an accelerator: enough for the start of a kernel to cost little."""


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
        normalised_weights(weights, logits.shape[1])
        return logits[:, 0]
    normalised = normalised_weights(weights, logits.shape[1])
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
    log_weights = _weight_tensor(normalised_weights(weights, members.shape[1]), members).log()[:, None]
    if mean == "arithmetic":
        return torch.logsumexp(torch.log_softmax(members / divisor, dim=-1) + log_weights, dim=1)
    mixture = torch.logsumexp(torch.log_softmax(members, dim=-1) + log_weights, dim=1)
    return torch.log_softmax(mixture / divisor, dim=-1)


def log_mean_weights(
    log_weights: Float[Tensor, "row teacher class"],
    *,
    is_normalised: Sequence[bool],
    weights: Sequence[float] | Tensor | None = None,
) -> Float[Tensor, "row class"]:
    """Give the logarithm of the arithmetic mean of teachers' weights of classes, some of which are sampled.

    Parameters
    ----------
    log_weights : Tensor [row, teacher, class]
        Log-weights that are right on average, used as they are; or logits / temperature. May be overwritten.
    is_normalised : sequence of bool
        For each teacher, whether it gives log-weights. The others' logits are normalised here; of one teacher alone
        they are not.
    weights : sequence of float or Tensor [teacher], optional
        As in `log_mean_probabilities`, with its errors.
    """
    teacher_weights = normalised_weights(weights, log_weights.shape[1])
    if len(is_normalised) == 1:
        return log_weights[:, 0]
    for place, is_done in enumerate(is_normalised):
        if not is_done:
            log_weights[:, place] = torch.log_softmax(log_weights[:, place], dim=-1)
    return torch.logsumexp(log_weights + _weight_tensor(teacher_weights, log_weights).log()[:, None], dim=1)


def normalised_weights(weights: Sequence[float] | Tensor | None, num_teachers: int) -> list[float]:
    """Divide the weights of teachers by their sum; equal ones where absent.

    Raises
    ------
    OptionError
        A weight is negative or not finite, or all are 0.
    ShapeError
        There is another number of weights than teachers.
    """
    if weights is None:
        return [1 / num_teachers] * num_teachers
    listed = weights.double().tolist() if isinstance(weights, Tensor) else [float(weight) for weight in weights]
    if not isinstance(listed, list) or len(listed) != num_teachers:
        raise ShapeError(f"{num_teachers} teachers need as many weights, got {weights!r}.")
    total = math.fsum(listed)
    if min(listed) < 0 or not (math.isfinite(total) and total > 0):
        raise OptionError(f"Weights must be finite, at least 0 and not all 0; got {weights!r}.")
    return [weight / total for weight in listed]


def softened_elements(device: torch.device) -> int:
    """Give how many numbers are softened at a time: on a processor 2^18, which its cache holds; elsewhere 2^22."""
    return BLOCK_ELEMENTS if device.type == "cpu" else ACCELERATOR_ELEMENTS


def softened_blocks(num_rows: int, num_columns: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into blocks of at most `softened_elements`, one row at least."""
    return row_blocks(num_rows, num_columns, max_elements=softened_elements(device))


def at_least_float32(values: Tensor) -> Tensor:
    """Give float64 tensors as they are and all others as float32."""
    return values if values.dtype in {torch.float32, torch.float64} else values.to(torch.float32)


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices with a `OptionError`."""
    if value not in choices:
        raise OptionError(f"{option} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _checked_members(logits: Tensor) -> Tensor:
    if logits.ndim != 3:
        raise ShapeError(f"Logits must have the axes [row, teacher, class], got shape {tuple(logits.shape)}.")
    return at_least_float32(logits)


def _weight_tensor(weights: list[float], logits: Tensor) -> Tensor:
    if len(set(weights)) == 1:  # made on the device, without a copy that waits for it
        return logits.new_full((len(weights),), weights[0])
    return logits.new_tensor(weights)
