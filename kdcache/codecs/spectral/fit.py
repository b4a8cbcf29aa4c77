"""Fitting the spectral codec's basis: the axes of the pilot's logits in the metric of the KL."""

from __future__ import annotations

__all__ = ["Basis", "centred", "fit_basis", "masked_classes", "projection_of"]

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.codecs.rounding import coarsest_dtype, rounding_noise
from kdcache.errors import CodecError

_CLASS_BLOCK_ELEMENTS = 2**25
_ROW_BLOCK_ELEMENTS = 2**23
_SMALLEST_EIGENVALUE = 1e-9  # of the largest: below lies the rounding of float32 logits
_SMALLEST_OF_HEAD = 1e-13  # below lies the rounding of float64 sums
_SMALLEST_UNIT = 1e-4  # of the largest hidden unit: what the pilot hardly showed still counts
_RIDGE = 1e-3  # of the metric's mean diagonal before its negative part: what the pilot never felt still costs something
_WEIGHT_TEMPERATURE = 2.0
_LEAST_WEIGHT = 0.1
_LARGEST_ENTRY = 1000.0  # of the basis, so that float16 holds large and small entries alike


@dataclass(frozen=True, eq=False)
class Basis:
    """What `fit_basis` finds.

    Parameters
    ----------
    mean : Tensor [class]
        The mean of the centred rows, float32; -inf in masked classes.
    basis : Tensor [component, class]
        Decoded logits are mean + coordinates @ basis; float16, 0 in masked classes.
    weights : Tensor [class]
        Of the projection, float32: what lies outside the basis is left out where it matters least.
    spread : Tensor [component]
        Standard deviation of the pilot's coordinates, float64, descending.
    """

    mean: Tensor
    basis: Tensor
    weights: Tensor
    spread: Tensor


def masked_classes(logits: Logits) -> Bool[Tensor, " class"]:
    """Tell which classes are -inf in every row."""
    masked = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    for block in _rows(logits):
        masked &= (block == -torch.inf).all(dim=0)
    return masked


def centred(logits: Float[Tensor, "row class"]) -> Float[Tensor, "row class"]:
    """Take each row's mean over classes off, in float32 or float64."""
    wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
    rows: Tensor = wide - wide.mean(dim=1, keepdim=True)
    return rows


def fit_basis(pilot: Logits, *, rank: int | None = None) -> Basis:
    """Fit mean and basis to the logits of a pilot.

    With X the centred rows less their mean and w a weight a class (mean softmax at temperature 2 over its mean, plus
    0.1), the principal axes of X sqrt(w) span what the logits span. In their span the Fisher metric is
    M = sum over T in (1, 2, 4) of S (diag(mean p_T) - mean p_T p_T^T) S^T / T^2, S the axes without weights; with
    M = L L^T, the eigenvectors of L^T Cov L are the axes along which the KL's quadratic form and the covariance are
    both diagonal. The pilot is read in blocks of rows and of classes, so that it may be a memory map.

    Parameters
    ----------
    pilot : Tensor [row, class] or HeadLogits
        No masked classes. Of a head, S spans all that it can give, whatever the pilot showed of it.
    rank : int, optional
        Components at most, down to the rounding of float32. Where absent, the pilot's numerical rank: logits that were
        rounded to 16 bits, whatever their type is now, lose the components that such rounding alone would make.

    Raises
    ------
    CodecError
        The pilot has fewer than 2 rows.
    """
    if len(pilot) < 2:
        raise CodecError("The pilot has fewer than 2 rows: a basis cannot be fitted.")
    mean, probabilities = _means(pilot)
    weights = (probabilities[_WEIGHT_TEMPERATURE] / probabilities[_WEIGHT_TEMPERATURE].mean() + _LEAST_WEIGHT).float()
    span = _span(pilot, mean, weights, rank)
    metric, covariance = _forms(pilot, mean, span, probabilities)
    values, axes = _axes(metric, covariance)
    basis = axes.float() @ span
    scale = float(basis.abs().amax()) / _LARGEST_ENTRY
    basis = (basis / max(scale, 1e-30)).to(torch.float16)
    return Basis(
        mean=mean.float(),
        basis=basis,
        weights=weights,
        spread=values.flip(0).clamp(min=0).sqrt() * scale,
    )


def _axes(metric: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Give variances, ascending, and axes [component, component] that diagonalise both forms.

    Raises
    ------
    CodecError
        The forms are not finite, or too ill-conditioned for float64.
    """
    try:
        root = torch.linalg.cholesky(metric)
        values, rotation = torch.linalg.eigh(root.T @ covariance @ root)
    except RuntimeError as error:
        raise CodecError(
            f"The pilot's logits give no basis ({error}): they span more than float32 can tell apart. Classes that are "
            "masked by a huge negative logit are to be -inf; or use Codes() or Lossless(). "
            "None of these rows was encoded."
        ) from error
    return values, torch.linalg.solve_triangular(root.T, rotation.flip(1), upper=True).T


def _means(pilot: Logits) -> tuple[Tensor, dict[float, Tensor]]:
    total = torch.zeros(pilot.shape[1], dtype=torch.float64, device=pilot.device)
    sums = {temperature: total.clone() for temperature in TEMPERATURES}
    for block in _rows(pilot):
        rows = centred(block)
        total += rows.sum(dim=0, dtype=torch.float64)
        for temperature in TEMPERATURES:
            sums[temperature] += torch.softmax(rows / temperature, dim=1).sum(dim=0, dtype=torch.float64)
    return total / len(pilot), {key: value / len(pilot) for key, value in sums.items()}


def _span(pilot: Logits, mean: Tensor, weights: Tensor, rank: int | None) -> Float[Tensor, "component class"]:
    """Give the principal axes of the weighted rows, unweighted again: the rows of the span, orthonormal in w."""
    if isinstance(pilot, HeadLogits):
        return _span_of_head(pilot, weights, rank)
    values, span = _principal_axes(pilot, mean, weights, rank)
    dtype = coarsest_dtype(pilot) if rank is None else None
    if dtype is None:
        return span
    noise = rounding_noise(pilot, weights, dtype).largest_eigenvalues(span * weights.sqrt())
    above = values > noise
    return span[above] if bool(above.any()) else span[:1]


def _principal_axes(pilot: Tensor, mean: Tensor, weights: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Give the eigenvalues [component] of the weighted rows, descending, and the axes [component, class] unweighted."""
    num_rows, num_classes = pilot.shape
    root = weights.sqrt()
    row_means = torch.cat([block.double().mean(dim=1, keepdim=True) for block in _rows(pilot)])

    def weighted(rows: slice, classes: slice) -> Tensor:
        return (pilot[rows, classes].double() - row_means[rows] - mean[classes]).float() * root[classes]

    if num_classes <= num_rows:
        gram = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=pilot.device)
        for rows in _row_slices(pilot):
            gram += _outer(weighted(rows, slice(None)).T)
        values, vectors = torch.linalg.eigh(gram)
        kept = _kept(values, rank)
        return values.flip(0)[:kept], (vectors.flip(1)[:, :kept].T / root).float()
    gram = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=pilot.device)
    for classes in _class_slices(pilot):
        gram += _outer(weighted(slice(None), classes))
    values, vectors = torch.linalg.eigh(gram)
    if float(values[-1]) <= 0:
        return values[-1:], torch.zeros(1, num_classes, device=pilot.device)
    kept = _kept(values, rank)
    turned = (vectors.flip(1)[:, :kept] / values.flip(0)[:kept].sqrt()).T.float()
    span = torch.empty(kept, num_classes, device=pilot.device)
    for classes in _class_slices(pilot):
        span[:, classes] = turned @ weighted(slice(None), classes) / root[classes]
    return values.flip(0)[:kept], span


def _span_of_head(pilot: HeadLogits, weights: Tensor, rank: int | None) -> Float[Tensor, "component class"]:
    """Give the head's own rows, orthonormal in w: all that it can give, or the principal axes of the pilot among it."""
    weight = pilot.head.weight
    centre = weight.mean(dim=0, dtype=torch.float64)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for classes in _class_slices(weight.T):
        columns = weight[classes].double() - centre
        gram += (columns.T * weights[classes].double()) @ columns
    # a hidden unit counts by what it adds to the logits, however unit and weight share it
    size = pilot.hidden.double().square().mean(dim=0).sqrt()
    size = size.clamp(min=_SMALLEST_UNIT * float(size.amax().clamp(min=1e-30)))
    values, vectors = torch.linalg.eigh(size[:, None] * gram * size)
    count = max(1, int((values > _SMALLEST_OF_HEAD * values[-1].clamp(min=1e-30)).sum()))
    axes = vectors.flip(1)[:, :count]
    scales = values.flip(0)[:count].clamp(min=1e-30).sqrt()
    turn = size[:, None] * axes / scales
    if rank is not None and rank < count:
        inner = (pilot.hidden.double() / size) @ (axes * scales)
        _, principal = torch.linalg.eigh(torch.cov(inner.T))
        turn = turn @ principal.flip(1)[:, :rank]
    span = torch.empty(turn.shape[1], len(weight), device=weight.device)
    for classes in _class_slices(span):
        span[:, classes] = (turn.T @ (weight[classes].double() - centre).T).float()
    return span


def _outer(matrix: Tensor) -> Float64[Tensor, "a a"]:
    wide = matrix.double()
    return wide @ wide.T


def _kept(values: Tensor, rank: int | None) -> int:
    found = int((values > _SMALLEST_EIGENVALUE * values[-1].clamp(min=1e-30)).sum())
    return max(1, found if rank is None else min(found, rank))


def _forms(pilot: Logits, mean: Tensor, span: Tensor, probabilities: dict[float, Tensor]) -> tuple[Tensor, Tensor]:
    """Give the Fisher metric and the covariance, both [component, component] float64, in the span's coordinates."""
    num_rows, identity = len(pilot), torch.eye(len(span), dtype=torch.float64, device=span.device)
    together = torch.stack([value / temperature**2 for temperature, value in probabilities.items()]).sum(dim=0)
    metric = torch.zeros(len(span), len(span), dtype=torch.float64, device=span.device)
    for classes in _class_slices(span):
        metric += ((span[:, classes] * together[classes].float()) @ span[:, classes].T).double()
    metric += _RIDGE * metric.diagonal().mean().clamp(min=1e-12) * identity
    inner = torch.linalg.pinv(_gram(span), hermitian=True)
    covariance = torch.zeros_like(metric)
    for block in _rows(pilot):
        rows = centred(block)
        for temperature in TEMPERATURES:
            expected = (torch.softmax(rows / temperature, dim=1).float() @ span.T).double()
            metric -= expected.T @ expected / (temperature**2 * num_rows)
        coordinates = ((rows - mean.to(rows.dtype)).float() @ span.T).double() @ inner
        covariance += coordinates.T @ coordinates / num_rows
    return metric, covariance


def _gram(span: Tensor) -> Tensor:
    total = torch.zeros(len(span), len(span), dtype=torch.float64, device=span.device)
    for classes in _class_slices(span):
        total += _outer(span[:, classes])
    return total


def projection_of(
    basis: Float[Tensor, "component class"], weights: Float[Tensor, " class"]
) -> Float64[Tensor, "component component"]:
    """Give the inverse of basis diag(weights) basis^T: coordinates = projection @ (basis * weights) @ row."""
    total = torch.zeros(len(basis), len(basis), dtype=torch.float64, device=basis.device)
    for classes in _class_slices(basis):
        total += _outer(basis[:, classes].double() * weights[classes].double().sqrt())
    inverse: Tensor = torch.linalg.pinv(total, hermitian=True, rtol=1e-12)
    return inverse


def _row_slices(pilot: Logits) -> Iterator[slice]:
    step = max(1, _ROW_BLOCK_ELEMENTS // pilot.shape[1])
    for start in range(0, len(pilot), step):
        yield slice(start, min(start + step, len(pilot)))


def _rows(pilot: Logits) -> Iterator[Tensor]:
    for rows in _row_slices(pilot):
        yield pilot[rows]


def _class_slices(matrix: Tensor) -> Iterator[slice]:
    step = max(1, _CLASS_BLOCK_ELEMENTS // max(1, len(matrix)))
    for start in range(0, matrix.shape[1], step):
        yield slice(start, min(start + step, matrix.shape[1]))
