"""What a cache says of its soft targets' error, summed up from the certificates of its teachers."""

from __future__ import annotations

__all__ = ["Certificate", "certificate_of"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdcache.codecs import kl_bound, total_variation_bound
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.guard import GUARD_FACTOR
from kdcache.documents import CertificateDocument, Histogram, merged_bounds

_BOUNDS = ("bound_mean", "bound_p99", "kl_bound", "kl_bound_of_means", "total_variation_bound")


@dataclass(frozen=True)
class Certificate:
    """What is known of the soft targets' error at one temperature. KL is KL(teacher || decoded), in nats.

    A teacher is a stored one, which in a merged cache is the members' mean. R is the largest error range of all rows of
    the chosen teachers; s is a number that each row has for the interval that the temperature lies in, see
    `kdcache.codecs.scaled_bounds`. What holds for every row:

    - of each teacher alone: `kl_bound`, `kl_bound_of_means`, `total_variation_bound`;
    - of the arithmetic mean with any weights: the same, because KL and total variation are jointly convex, so that the
      mean's KL is at most the weighted mean of the teachers' at the same temperature. With equal weights `bound_mean`
      is therefore no less than the mean over rows of the mean's KL; with others it need not be;
    - of the geometric mean with any weights: `kl_bound_of_means` and `total_variation_bound`, because its error is the
      weighted mean of the teachers' errors, whose range is not above R. The closer `kl_bound` is not proved for it;
    - of the tempered-arithmetic mean, whose errors have a range up to 2 R: 4 `kl_bound_of_means`, and a total variation
      of tanh(R / (2 temperature)), which is below 2 `total_variation_bound`.

    At temperatures 1, 2 and 4, rows that were guarded by a target (`max_kl`) have a mean KL of at most the target, and
    none above twice of it: `bound_mean`, `bound_p99` and `kl_bound` say so where it is the closer bound. Both are held
    against the logits of the process that encoded the rows. A shard that another process left without a record is
    adopted if it keeps to the target within 5% by our logits; `kl_bound` is never below what was measured.

    Where what a codec decodes depends on the temperature, as with `TopK`, there are only measurements and what its
    target promises: all other bounds are None. With its tail "samples", whose weights are no distribution, KL is that
    of the kept classes and one class made of all others.

    Parameters
    ----------
    temperature : float
    mean_kl, p99_kl, max_kl : float or None
        Measured for each teacher alone when its rows were encoded: over the measured rows of all teachers the mean, a
        number that 99% are not above (up to 19% too large), and the largest; None at a temperature that was not
        measured. They bound no other row and no mean over teachers: the errors of two teachers can cost more in their
        mean than in either of them.
    num_measured_rows : int
        Rows that were measured, summed over teachers.
    bound_mean, bound_p99 : float or None
        s / temperature^2 over all rows of all teachers, measured or not: the mean, and a number that 99% are not above
        (up to 19% too large); None below temperature 1.
    kl_bound : float or None
        The largest bound over all rows: the largest s / temperature^2 from temperature 1 up, and at most
        `kl_bound_of_means`.
    kl_bound_of_means : float or None
        R^2 / (8 temperature^2), from all rows (Hoeffding 1963, lemma 1).
    total_variation_bound : float or None
        tanh(R / (4 temperature)), from all rows; total variation is half the L1 distance.
    """

    temperature: float
    mean_kl: float | None
    p99_kl: float | None
    max_kl: float | None
    num_measured_rows: int
    bound_mean: float | None
    bound_p99: float | None
    kl_bound: float | None
    kl_bound_of_means: float | None
    total_variation_bound: float | None


def certificate_of(
    certificates: Sequence[CertificateDocument], temperature: float, *, targets: Sequence[float | None] = (None,)
) -> Certificate:
    """Sum up the certificates of some teachers at one temperature.

    Parameters
    ----------
    certificates : sequence of CertificateDocument [teacher]
        One at least.
    temperature : float
        Finite, above 0.
    targets : sequence of float or None [teacher]
        The `max_kl` in nats that each teacher's rows were guarded with while they were encoded; None without a guard.
    """
    measured, bounded = _measured(certificates, temperature), _bounded(certificates, temperature)
    held = [target for target in targets if target is not None]
    if temperature in TEMPERATURES and len(held) == len(targets):
        target = max(held)
        limits = {"bound_mean": target, "bound_p99": GUARD_FACTOR * target, "kl_bound": GUARD_FACTOR * target}
        # adopted rows may stand a little above their limits, see `kdcache.build.task.ADOPTED_TOLERANCE`
        for name, figure in (("bound_mean", "mean_kl"), ("bound_p99", "p99_kl"), ("kl_bound", "max_kl")):
            limits[name] = max(limits[name], measured[figure] or 0.0)
        bounded |= {name: _smaller(bounded[name], limit) for name, limit in limits.items()}
    return Certificate(
        temperature=temperature,
        num_measured_rows=sum(item.num_measured_rows for item in certificates),
        **measured,
        **bounded,
    )


def _smaller(bound: float | None, limit: float) -> float:
    return limit if bound is None else min(bound, limit)


def _measured(certificates: Sequence[CertificateDocument], temperature: float) -> dict[str, float | None]:
    """Sum up the KL of the measured rows of all teachers."""
    if any(temperature not in item.temperatures for item in certificates):
        return dict.fromkeys(("mean_kl", "p99_kl", "max_kl"))
    places = [item.temperatures.index(temperature) for item in certificates]
    pairs = list(zip(certificates, places, strict=True))
    total = sum(item.mean_kl[place] * item.num_measured_rows for item, place in pairs)
    count = sum(item.num_measured_rows for item in certificates)
    largest = max(item.max_kl[place] for item, place in pairs)
    histogram = Histogram.merged([item.kl_histograms[place] for item, place in pairs])
    return {"mean_kl": total / count, "p99_kl": histogram.quantile(0.99, largest=largest), "max_kl": largest}


def _bounded(certificates: Sequence[CertificateDocument], temperature: float) -> dict[str, float | None]:
    """Sum up the bounds of all rows of all teachers."""
    ranges = [item.max_error_range for item in certificates if item.max_error_range is not None]
    found: dict[str, float | None] = dict.fromkeys(_BOUNDS)
    if len(ranges) < len(certificates):
        return found
    largest = torch.tensor(max(ranges), dtype=torch.float64)
    of_means = float(kl_bound(largest, temperature))
    found |= {"kl_bound": of_means, "kl_bound_of_means": of_means}
    found["total_variation_bound"] = float(total_variation_bound(largest, temperature))
    intervals = [bound for bound in merged_bounds(certificates) if bound.temperature <= temperature]
    if intervals:
        bound, square = intervals[-1], temperature**2
        found["bound_mean"] = min(bound.mean / square, of_means)
        found["bound_p99"] = min(bound.histogram.quantile(0.99, largest=bound.max) / square, of_means)
        found["kl_bound"] = min(bound.max / square, of_means)
    return found
