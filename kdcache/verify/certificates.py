"""Certificates: what of their statistics can be recomputed, or held against each other, without the teacher."""

from __future__ import annotations

__all__ = ["contradictions"]

from collections.abc import Iterator

from kdcache.codecs import LADDER
from kdcache.codecs.guard import GUARD_FACTOR, guarded_kl
from kdcache.documents import CertificateDocument, CodecSpec, Histogram, Record

_ROUNDING = 1e-9
"""Share by which two figures of one certificate may part through rounding."""
_NEAR_ZERO = 1e-12
_TOLERANCE = 0.05
"""Share by which shards of another process may pass a codec's target; see `kdcache.build.task.ADOPTED_TOLERANCE`."""


def contradictions(record: Record, codec: CodecSpec) -> Iterator[str]:
    """Say where a record's statistics contradict each other, its codec's promise or Hoeffding's bound.

    Held here: the number of rows; mean <= largest; the largest lies in the last bin that the histogram fills; KL is at
    most R^2 / (8 T^2) of the error range R; rows that a target guards keep to it. Whether the figures are those of the
    teacher cannot be told without it: see `kdcache verify --against-teacher`.

    Parameters
    ----------
    record : Record
    codec : codec spec
        As the teacher's document names it.
    """
    certificate = record.certificate
    if certificate.num_measured_rows > record.num_rows:
        yield f"measured {certificate.num_measured_rows} rows of {record.num_rows}"
    if record.min_logit > record.max_logit:
        yield f"names {record.min_logit} as the smallest logit and {record.max_logit} as the largest"
    if certificate.temperatures != LADDER:
        yield f"was measured at temperatures {certificate.temperatures}, not {LADDER}"
    yield from _measurements(certificate)
    for bound in certificate.bounds:
        where = f"bounds from temperature {bound.temperature:g}"
        yield from _of_figures(where, bound.mean, bound.max, bound.histogram)
    target = guarded_kl(codec)
    if target is None:
        return
    limit = (1 + _TOLERANCE) * GUARD_FACTOR * target
    for temperature, largest in zip(certificate.temperatures[:3], certificate.max_kl, strict=False):
        if largest > limit:
            yield f"max_kl at temperature {temperature:g} is {largest:.6g}, above twice the codec's target {target:g}"


def _measurements(certificate: CertificateDocument) -> Iterator[str]:
    columns = (certificate.temperatures, certificate.mean_kl, certificate.max_kl, certificate.kl_histograms)
    for temperature, mean, largest, histogram in zip(*columns, strict=True):
        yield from _of_figures(f"KL at temperature {temperature:g}", mean, largest, histogram)
        if certificate.max_error_range is None:
            continue
        bound = certificate.max_error_range**2 / (8 * temperature**2)
        if largest > bound * (1 + 1e-6) + _NEAR_ZERO:
            yield f"max_kl at temperature {temperature:g} is {largest:.6g}; its error range allows {bound:.6g}"


def _of_figures(where: str, mean: float, largest: float, histogram: Histogram) -> Iterator[str]:
    if mean > largest * (1 + _ROUNDING) + _NEAR_ZERO:
        yield f"{where}: the mean, {mean:.6g}, is above the largest, {largest:.6g}"
    top = Histogram.of([largest])
    filled = histogram.first_bin + len(histogram.counts) - 1 if histogram.counts else None
    expected = top.first_bin if top.counts else None
    if filled != expected:
        yield f"{where}: the largest, {largest:.6g}, does not lie in the last bin that its histogram fills"
