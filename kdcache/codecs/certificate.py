"""The certificate: what coding changed, measured on real rows, and what a logit error can change at most.

KL is KL(teacher || decoded) in nats, between the soft targets of the teacher's logits and of the decoded logits at the
same temperature. A *logit error* is decoded - true; softmax does not see a shift, so only the spread of a row's errors
over its classes, the *error range*, matters. A class that is masked in both, with a logit of -inf, has neither error
nor weight.
"""

from __future__ import annotations

__all__ = ["LADDER", "error_range", "kl_bound", "measure", "total_variation_bound"]

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kdcache.codecs.base import checked_temperature, row_blocks
from kdcache.errors import ShapeError

LADDER: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 20.0)
"""Temperatures at which a cache is certified: the range that the paper trains with."""

_LARGE = 30.0
"""Centred error over temperature, in nats, beyond which exponentials of errors could overflow."""

_MASKED_IN_BOTH = -1e300
"""Stands for -inf on both sides: exp of it is 0, and the error is 0 instead of NaN."""


def measure(
    logits: Float[Tensor, "row class"],
    decoded: Float[Tensor, "row class"],
    temperatures: Sequence[float] = LADDER,
) -> Float64[Tensor, "row temperature"]:
    r"""Measure KL(teacher || decoded) of each row at each temperature.

    Accurate to about 1e-15 nats however small the KL, and exactly 0 where nothing was lost, because the two
    distributions are never subtracted from each other: with errors e = decoded - logits, teacher soft targets p and
    x = (e - E_p e) / temperature, KL = log(1 + E_p(exp(x) - 1 - x)), whose terms are all positive. A row with an x
    above 30, as outlying and masked classes have, is measured as E_p(log p - log q) instead, which overflows for no
    finite logits.

    A class that is masked in both changes nothing. A class masked in the decoded logits alone makes KL infinite where
    float64 gives it a probability above 0. A class masked in the teacher's logits alone takes probability from all
    others, which KL shows; the error range is infinite in either case. A row of nothing but -inf has no probability
    to lose, and measures 0.

    Parameters
    ----------
    logits : Tensor [row, class]
        The teacher's logits.
    decoded : Tensor [row, class]
        The decoded logits, shifted or not, on the same device.
    temperatures : sequence of float, default LADDER
        Finite, above 0.

    Returns
    -------
    Tensor [row, temperature]
        float64, in nats, at least 0, and finite for finite logits whose spans over temperature float64 holds. NaN in
        a row that holds NaN or +inf.

    Raises
    ------
    ShapeError
        The two arrays differ in shape, or have other axes than [row, class].
    TemperatureError
        A temperature is not a finite number above 0.

    Notes
    -----
    Computed in float64 and in blocks of rows, so that the memory is bounded for any number of classes. On a device
    without float64 the blocks are measured on the CPU.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> measure(logits, logits + 7.0, temperatures=[1.0, 4.0])
    tensor([[0., 0.]], dtype=torch.float64)
    """
    _check_pair(logits, decoded)
    divisors = [checked_temperature(temperature) for temperature in temperatures]
    divergences = torch.empty(logits.shape[0], len(temperatures), dtype=torch.float64)
    for block, true_block, decoded_block in _float64_blocks(logits, decoded):
        true, coded = _below_maximum(true_block), _below_maximum(decoded_block)
        if bool(coded.isneginf().any()):
            is_masked = true.isneginf() & coded.isneginf()
            true, coded = (values.masked_fill_(is_masked, _MASKED_IN_BOTH) for values in (true, coded))
        for index, divisor in enumerate(divisors):
            divergences[block, index] = _divergence(true, coded, divisor).to(divergences.device)
    return divergences.to(_float64_device(logits.device))


def error_range(logits: Float[Tensor, "row class"], decoded: Float[Tensor, "row class"]) -> Float64[Tensor, " row"]:
    """Measure the spread over classes of each row's errors: max - min of (decoded - logits).

    Parameters
    ----------
    logits : Tensor [row, class]
        The teacher's logits.
    decoded : Tensor [row, class]
        The decoded logits, shifted or not, on the same device.

    Returns
    -------
    Tensor [row]
        float64, in logits, at least 0: what `kl_bound` takes. Infinite where a class is masked on one side alone.

    Raises
    ------
    ShapeError
        The two arrays differ in shape, or have other axes than [row, class].
    """
    _check_pair(logits, decoded)
    ranges = torch.empty(logits.shape[0], dtype=torch.float64)
    for block, true_block, decoded_block in _float64_blocks(logits, decoded):
        ranges[block] = _spread(true_block, decoded_block).to(ranges.device)
    return ranges.to(_float64_device(logits.device))


def kl_bound(error_range: Float[Tensor, " row"], temperature: float) -> Float[Tensor, " row"]:
    """Bound KL(teacher || decoded) by the error range: R^2 / (8 temperature^2), in nats.

    KL is the log moment generating function of the centred errors over temperature, which lie in an interval of width
    R / temperature (Hoeffding 1963, lemma 1).

    Parameters
    ----------
    error_range : Tensor [row]
        Spread of each row's logit errors, as measured by `error_range` or promised by a codec.
    temperature : float
        Finite, above 0.

    Raises
    ------
    TemperatureError
        The temperature is not a finite number above 0.
    """
    return (error_range / checked_temperature(temperature)) ** 2 / 8


def total_variation_bound(error_range: Float[Tensor, " row"], temperature: float) -> Float[Tensor, " row"]:
    """Bound the total variation, half the L1 distance, between the soft targets: tanh(R / (4 temperature)).

    Attained by two classes of equal odds pushed apart by R: the logistic of R/2 less the logistic of -R/2, halved.

    Parameters
    ----------
    error_range : Tensor [row]
        Spread of each row's logit errors.
    temperature : float
        Finite, above 0.

    Raises
    ------
    TemperatureError
        The temperature is not a finite number above 0.
    """
    return torch.tanh(error_range / (4 * checked_temperature(temperature)))


def _divergence(true: Tensor, coded: Tensor, temperature: float) -> Tensor:
    """Give KL of logits whose rows have their maximum at 0."""
    weights = (true / temperature).exp_()
    total = weights.sum(dim=1)
    errors = coded - true
    centre = torch.linalg.vecdot(weights, errors) / total
    offsets = errors.sub_(centre[:, None]).div_(temperature)
    large = (offsets.amax(dim=1) <= _LARGE).logical_not()  # with a class that is masked on one side, it is NaN
    excess = torch.exp(offsets).sub_(1).sub_(offsets)
    divergences = torch.log1p((torch.linalg.vecdot(weights, excess) / total).clamp_(min=0))
    divergences[large] = _large_divergence(true[large], coded[large], temperature)
    return divergences


def _large_divergence(true: Tensor, coded: Tensor, temperature: float) -> Tensor:
    log_true, log_coded = (
        torch.log_softmax(logits / temperature, dim=1).masked_fill_(logits.isneginf(), -torch.inf)
        for logits in (true, coded)
    )
    weights = log_true.exp()
    return (weights * (log_true - log_coded)).masked_fill_(weights == 0, 0).sum(dim=1).clamp_(min=0)


def _below_maximum(logits: Tensor) -> Tensor:
    """Shift rows, in place, to a maximum of 0; a row of nothing but -inf stays as it is."""
    return logits.sub_(logits.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min))


def _spread(true: Tensor, coded: Tensor) -> Tensor:
    is_masked, is_masked_now = true.isneginf(), coded.isneginf()
    errors = coded.sub_(true)
    if not bool((is_masked | is_masked_now).any()):
        return errors.amax(dim=1) - errors.amin(dim=1)
    in_both = is_masked & is_masked_now
    highest = errors.masked_fill(in_both, -torch.inf).amax(dim=1)
    lowest = errors.masked_fill(in_both, torch.inf).amin(dim=1)
    return (highest - lowest).clamp_(min=0).masked_fill_((is_masked ^ is_masked_now).any(dim=1), torch.inf)


def _float64_blocks(logits: Tensor, decoded: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    device = _float64_device(logits.device)
    for block in row_blocks(logits.shape[0], logits.shape[1], max_elements=2**15):
        yield block, _fresh_float64(logits[block], device), _fresh_float64(decoded[block], device)


def _fresh_float64(values: Tensor, device: torch.device) -> Tensor:
    return values.detach().to(device).to(torch.float64, copy=True)


def _float64_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _check_pair(logits: Tensor, decoded: Tensor) -> None:
    if logits.ndim != 2 or logits.shape != decoded.shape:
        raise ShapeError(
            "The teacher's and the decoded logits must have the same axes [row, class], "
            f"got {tuple(logits.shape)} and {tuple(decoded.shape)}."
        )
