"""Bias correction: make a student predict each class as often as it stands in the training data, without labels.

A student whose transfer set left classes out has never had a reason to predict them, and a shift of a few biases
mends most of that. Hinton, Vinyals and Dean 2015, section 3, tuned one shift on the test set; here the shift follows
from the class frequencies alone.
"""

from __future__ import annotations

__all__ = ["match_class_frequencies"]

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.errors import KdcacheError, NonFiniteLogitsError, ShapeError, TransferSetError

_MAX_ITERATIONS = 200
_MAX_SWEEPS = 100
_BISECTIONS = 80
_SMOOTH_SPREAD = 64.0
"""Logits within a row that are no further apart than this need no help from a higher temperature."""
_LARGEST_NEWTON = 1024
"""Classes up to which Newton's method is used: its matrix has a row and a column a class."""


def match_class_frequencies(
    logits: Float[Tensor, "row class"],
    frequencies: Float[Tensor, " class"],
    *,
    classes: Sequence[int] | None = None,
    tolerance: float = 1e-6,
) -> Float[Tensor, " class"]:
    r"""Find the bias for which each class's mean softmax mass is its frequency.

    Solves ``mean over rows of softmax(logits + bias)[c] = frequencies[c]`` for every corrected class c, with bias 0
    for the others. This is where the gradient of the convex function
    ``mean over rows of logsumexp(logits + bias) - sum over c of frequencies[c] bias[c]`` is zero, so the bias is
    unique (up to a common shift when all classes are corrected; then its mean is 0). Newton's method with a line
    search finds it, begun by steps of iterative scaling, ``bias += log(frequencies / mass)``, which alone serve for
    more than 1,024 corrected classes. Logits that are far apart are approached through higher temperatures, at which
    the problem is smooth, each solution beginning the next.

    Parameters
    ----------
    logits : Tensor [row, class]
        A student's logits on many inputs; no labels are needed.
    frequencies : Tensor [class]
        Frequency of each class in the training data, above 0 for the corrected classes. Only these are read.
    classes : sequence of int, optional
        The classes to correct; all by default. With some of them, the rest keep their logits.
    tolerance : float
        Largest difference allowed between a mass and its frequency.

    Returns
    -------
    Tensor [class] float32
        To be added to the logits, on the device of the logits.

    Raises
    ------
    ShapeError
        `logits` is no [row, class] with at least one row, or `frequencies` has another number of classes.
    NonFiniteLogitsError
        A logit is NaN or infinite.
    TransferSetError
        No bias can do it: a frequency is 0, or the frequencies leave too much or nothing for the other classes; or a
        class does not exist.
    KdcacheError
        The tolerance was not reached, which can only be when it is below the precision of the logits.

    Examples
    --------
    >>> logits = torch.tensor([[4.0, 0.0], [1.0, 0.0]])
    >>> bias = match_class_frequencies(logits, torch.tensor([0.5, 0.5]))
    >>> torch.softmax(logits + bias, dim=1).mean(dim=0)
    tensor([0.5000, 0.5000])
    """
    _check_shapes(logits, frequencies)
    corrected = _check_classes(classes, logits.shape[1])
    wanted = frequencies.detach().to("cpu", torch.float64)
    _check_frequencies(wanted, corrected)
    columns = torch.tensor(corrected, device=logits.device)
    values = _solve(logits.detach().double(), wanted[corrected].to(logits.device), columns, tolerance)
    bias = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    bias[columns] = values - values.mean() if len(corrected) == logits.shape[1] else values
    return bias.float()


def _solve(logits: Tensor, wanted: Tensor, columns: Tensor, tolerance: float) -> Tensor:
    spread = float((logits.amax(dim=1) - logits.amin(dim=1)).max())
    num_stages = max(0, math.ceil(math.log2(max(spread, 1.0) / _SMOOTH_SPREAD)))
    values, error = torch.zeros_like(wanted), math.inf
    for stage in reversed(range(num_stages + 1)):
        temperature = 2.0**stage
        problem = _Problem(logits / temperature, wanted, columns)
        scaled, error = problem.solve(values / temperature, tolerance if stage == 0 else 1e-3)
        values = scaled * temperature
    if error > tolerance:
        values, error = _Problem(logits, wanted, columns).bisect(values, tolerance)
    if error > tolerance:
        raise KdcacheError(
            f"the class frequencies were missed by {error:.1e} after {_MAX_ITERATIONS} iterations (tolerance "
            f"{tolerance:.1e}); give a larger tolerance"
        )
    return values


class _Problem:
    """One convex problem: corrected columns of the logits, in float64, and the masses they must get."""

    def __init__(self, logits: Tensor, wanted: Tensor, columns: Tensor) -> None:
        self.wanted = wanted
        self.logits = logits.index_select(1, columns)
        others = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        others[columns] = False
        self.rest = torch.logsumexp(logits.masked_fill(~others, -torch.inf), dim=1)
        """Log of the sum of exp over the classes left alone [row]; -inf where there are none."""

    def log_normalisers(self, values: Tensor) -> Tensor:
        """Log of the softmax's denominator [row]."""
        return torch.logaddexp(torch.logsumexp(self.logits + values, dim=1), self.rest)

    def objective(self, values: Tensor) -> float:
        """Give the convex function whose minimum is sought."""
        return float(self.log_normalisers(values).mean() - self.wanted @ values)

    def probabilities(self, values: Tensor) -> Tensor:
        """Softmax of the corrected classes [row, class]."""
        return (self.logits + values - self.log_normalisers(values).unsqueeze(1)).exp()

    def solve(self, values: Tensor, tolerance: float) -> tuple[Tensor, float]:
        """Improve the bias of the corrected classes [class]; return it with the largest error of a mass."""
        for iteration in range(_MAX_ITERATIONS):
            probabilities = self.probabilities(values)
            mass = probabilities.mean(dim=0)
            error = float((mass - self.wanted).abs().max())
            if error <= tolerance:
                break
            values = self.next_values(values, probabilities, mass, scale=iteration < 3)
        return values, error

    def bisect(self, values: Tensor, tolerance: float) -> tuple[Tensor, float]:
        """Set one class after the other to its mass, by bisection: slow, and sure where Newton's steps stall."""
        error = math.inf
        for _ in range(_MAX_SWEEPS):
            for index in range(len(values)):
                values = values.clone()
                values[index] = self.own_bias(values, index)
            error = float((self.probabilities(values).mean(dim=0) - self.wanted).abs().max())
            if error <= tolerance:
                break
        return values, error

    def own_bias(self, values: Tensor, index: int) -> Tensor:
        """Find the bias at which one class has its mass, the other biases given: the mass rises with it."""
        others = torch.ones(len(values), dtype=torch.bool, device=values.device)
        others[index] = False
        corrected = torch.logsumexp((self.logits + values).masked_fill(~others, -torch.inf), dim=1)
        gaps = self.logits[:, index] - torch.logaddexp(corrected, self.rest)
        low, high = torch.logit(self.wanted[index]) - gaps.max(), torch.logit(self.wanted[index]) - gaps.min()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_low = torch.sigmoid(gaps + middle).mean() < self.wanted[index]
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return (low + high) / 2

    def next_values(self, values: Tensor, probabilities: Tensor, mass: Tensor, *, scale: bool) -> Tensor:
        """Make one step that lowers the objective."""
        smallest = torch.finfo(mass.dtype).tiny
        scaled = self.wanted.log() - mass.clamp_min(smallest).log()
        if scale or len(values) > _LARGEST_NEWTON:
            return values + scaled
        newton = self.newton_step(probabilities, mass)
        slope = float((mass - self.wanted) @ newton)
        start = self.objective(values)
        for halving in range(20):
            share = 0.5**halving
            if self.objective(values + share * newton) <= start + 1e-4 * share * slope:
                return values + share * newton
        return values + scaled

    def newton_step(self, probabilities: Tensor, mass: Tensor) -> Tensor:
        """Solve Hessian x step = -gradient [class], with a ridge for flat directions that shrinks with the error."""
        gradient = mass - self.wanted
        hessian = torch.diag(mass) - probabilities.T @ probabilities / len(probabilities)
        ridge = gradient.abs().max().clamp(1e-8, 1e-2) * mass.clamp_min(1e-10)
        step: Tensor = torch.linalg.solve(hessian + torch.diag(ridge), -gradient)
        return step


def _check_shapes(logits: Tensor, frequencies: Tensor) -> None:
    if logits.ndim != 2 or logits.shape[0] == 0:
        raise ShapeError(f"logits have shape {tuple(logits.shape)}; expected [row, class] with at least one row")
    if frequencies.shape != logits.shape[1:]:
        raise ShapeError(
            f"frequencies have shape {tuple(frequencies.shape)}; the logits have {logits.shape[1]} classes, so "
            f"expected ({logits.shape[1]},)"
        )
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteLogitsError(f"row {int((~finite).nonzero()[0])} of the logits holds NaN or infinity")


def _check_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    corrected = sorted(set(range(num_classes) if classes is None else classes))
    if not corrected:
        raise TransferSetError("classes is empty; name the classes to correct, or leave it out to correct all")
    unknown = [index for index in corrected if not 0 <= index < num_classes]
    if unknown:
        raise TransferSetError(f"classes {unknown} do not exist; the logits have classes 0 to {num_classes - 1}")
    return corrected


def _check_frequencies(wanted: Tensor, corrected: list[int]) -> None:
    values = wanted[corrected]
    impossible = [index for index, value in zip(corrected, values.tolist(), strict=True) if not value > 0]
    if impossible:
        raise TransferSetError(
            f"classes {impossible} have frequency 0 or less: no finite bias gives them that. Correct only classes "
            "that stand in the training data: classes=[...]"
        )
    total = float(values.sum())
    if len(corrected) == len(wanted):
        if abs(total - 1) > 1e-4:
            raise TransferSetError(f"the frequencies sum to {total:.6f}; expected 1")
        wanted[corrected] = values / total
    elif not total < 1:
        raise TransferSetError(
            f"the corrected classes' frequencies sum to {total:.6f}, which leaves nothing for the "
            f"{len(wanted) - len(corrected)} other classes, whose softmax mass cannot be 0; correct them too, or leave "
            "one of the classes out"
        )
