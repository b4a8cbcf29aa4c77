"""What coding changed in each row, from one pass over its classes: KL, bounds on it, the range of the errors.

For rows of many classes, which are worked on tile by tile: some rows and some classes, few enough to stay in a
processor's cache. Whoever sums fills a tile with logits and errors, however these come about, and calls `add`.
"""

from __future__ import annotations

__all__ = ["TILE_COLUMNS", "TILE_ROWS", "ErrorSums", "RowErrors", "tile_rows"]

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from kdcache.codecs.moments import ErrorMoments
from kdcache.codecs.precision import keeps_float32

TILE_ROWS = 512
TILE_COLUMNS = 256
"""Rows and classes of a tile: seven float32 arrays of them are 3.5 MB, and a product for so many rows is efficient."""

TILE_ROWS_ON_DEVICE = 2048
TILE_COLUMNS_ON_DEVICE = 4096
"""The same on an accelerator, which has 235 MB to spare and for which a small tile is all waiting."""


@dataclass(frozen=True, eq=False)
class RowErrors:
    """What coding changed in each row.

    Parameters
    ----------
    kl : Tensor [row, temperature]
        float64, KL(teacher || decoded) in nats at temperatures 1, 2 and 4.
    kl_ceiling : Tensor [row, temperature]
        float64, what KL is at most if logits and errors were rounded on the way as far as can be; else KL.
    scaled_bounds : Tensor [row, interval]
        float64, as of `kdcache.codecs.bounds.scaled_bounds`.
    error_range : Tensor [row]
        float64, largest less smallest error, in logits.
    lowest_logit, highest_logit : Tensor [row]
        float32, of the teacher's logits that are not masked.
    """

    kl: Float64[Tensor, "row temperature"]
    kl_ceiling: Float64[Tensor, "row temperature"]
    scaled_bounds: Float64[Tensor, "row interval"]
    error_range: Float64[Tensor, " row"]
    lowest_logit: Float32[Tensor, " row"]
    highest_logit: Float32[Tensor, " row"]

    def put(self, rows: Int[Tensor, " row"], others: RowErrors) -> None:
        """Overwrite some rows with those of `others`, in place."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(others, field.name)

    @classmethod
    def of_no_rows(cls, device: torch.device) -> RowErrors:
        """Give the errors of no rows."""
        three = torch.empty(0, 3, dtype=torch.float64, device=device)
        one = three[:, 0]
        return cls(three, three.clone(), three.clone(), one, one.float(), one.float())

    @classmethod
    def concatenated(cls, parts: list[RowErrors]) -> RowErrors:
        """Join rows of several blocks."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def tile_rows(device: torch.device) -> int:
    """Give the rows of a tile on a device."""
    return TILE_ROWS if device.type == "cpu" else TILE_ROWS_ON_DEVICE


class ErrorSums:
    r"""Sums over the classes of some rows, to which tiles are added.

    With z a logit less the row's `top` and d its error less the row's `centre`, weights at temperatures 4, 2 and 1 are
    v = exp(z / 4), v^2 and v^4, and of the decoded logits w = exp((z + d) / 4), w^2 and w^4: two exponentials serve
    three temperatures. KL = log sum w_T - log sum v_T - E_T d / T. Tiles hold a quarter of logits and errors, which
    spares two passes; a factor of 4 rounds nothing.

    Parameters
    ----------
    top : Tensor [row]
        float32, a logit of each row that is near its largest one: at most 80 below, or its sums overflow.
    centre : Tensor [row]
        float32, what errors are near to, where the decoded logits are shifted against the true ones.
    num_classes : int
    tile_columns : int, optional
        Classes of a tile; 256 on a processor and 4,096 on an accelerator by default.
    """

    def __init__(
        self,
        top: Float32[Tensor, " row"],
        centre: Float32[Tensor, " row"],
        num_classes: int,
        *,
        tile_columns: int | None = None,
    ) -> None:
        usual = TILE_COLUMNS if top.device.type == "cpu" else TILE_COLUMNS_ON_DEVICE
        num_rows, columns = len(top), min(tile_columns or usual, num_classes)
        num_tiles = -(-num_classes // columns)
        self._num_classes, self._columns = num_classes, columns
        self._top, self._centre = top / 4, centre
        self._weights = top.new_empty(3, num_rows, columns)
        self._values = top.new_empty(3, num_rows, columns)
        self._scratch = top.new_empty(num_rows, columns)
        # of each tile; added up once, in float64
        self._totals = top.new_empty(num_tiles, 3, num_rows)
        self._plain = top.new_empty(num_tiles, 3, num_rows)
        self._coded = top.new_empty(3, num_tiles, num_rows)
        self._products = top.new_empty(num_tiles, num_rows, 3, 3)
        self._extremes = top.new_empty(4, num_tiles, num_rows)

    def tiles(
        self, classes: slice
    ) -> Iterator[tuple[slice, Float32[Tensor, "row class"], Float32[Tensor, "row class"]]]:
        """Yield tiles to be filled: their places among `classes`, a quarter of logits, a quarter of errors less centre.

        What was filled is added when the next tile is asked for. All classes are to be visited once, in blocks that
        start at multiples of the tile's columns.
        """
        for start in range(classes.start, classes.stop, self._columns):
            end = min(start + self._columns, classes.stop)
            values, weights = self._values[:, :, : end - start], self._weights[:, :, : end - start]
            yield slice(start - classes.start, end - classes.start), values[0], values[1]
            self._add(start // self._columns, values, weights, self._scratch[:, : end - start])

    def _add(self, place: int, values: Tensor, weights: Tensor, scratch: Tensor) -> None:
        depth, offset, square = values
        of_one, of_two, of_four = weights
        for kind, (extreme, of) in enumerate(_EXTREMES):
            extreme(values[of], dim=1, out=self._extremes[kind, place])
        depth.sub_(self._top[:, None])
        torch.mul(offset, offset, out=square)
        torch.exp(depth, out=of_four)
        torch.mul(of_four, of_four, out=of_two)
        torch.mul(of_two, of_two, out=of_one)
        torch.sum(weights, dim=2, out=self._totals[place])
        torch.sum(values, dim=2, out=self._plain[place])
        _sum_products(weights, values, scratch, out=self._products[place])
        torch.add(depth, offset, out=scratch).exp_()
        torch.sum(scratch, dim=1, out=self._coded[2, place])
        torch.sum(scratch.mul_(scratch), dim=1, out=self._coded[1, place])
        torch.sum(scratch.mul_(scratch), dim=1, out=self._coded[0, place])

    def row_errors(
        self,
        *,
        error_margin: Tensor | None = None,
        kl_margin: Tensor | None = None,
        error_rounding: float = 0.0,
        logit_rounding: float = 0.0,
        logit_margin: Tensor | None = None,
    ) -> RowErrors:
        """Give what the sums come to, with room in bounds and range for what was rounded on the way into the tiles.

        KL is NaN or infinite where float32 does not hold the weights: a logit lies more than 80 above `top`, or all
        that are decoded far below.

        Parameters
        ----------
        error_margin : Tensor [row], optional
            What every error may be off by.
        kl_margin : Tensor [row], optional
            The same of the errors of likely classes, in the mean over which KL is made; as `error_margin` by default.
        error_rounding, logit_rounding : float
            What errors and logits may be off by besides, as shares of the row's largest.
        logit_margin : Tensor [row], optional
            What every logit may be off by besides.
        """
        sums = ErrorMoments.empty(len(self._top), self._num_classes, self._columns, self._top)
        quarters = sums.moments.new_tensor([4.0, 4.0, 16.0])
        sums.moments[0, :, :3] = self._totals.sum(dim=0, dtype=torch.float64).T
        sums.moments[0, :, 3] = self._num_classes
        sums.moments[1:, :, :3] = (self._products.sum(dim=0, dtype=torch.float64) * quarters).permute(2, 0, 1)
        sums.moments[1:, :, 3] = self._plain.sum(dim=0, dtype=torch.float64) * quarters[:, None]
        sums.centre.copy_(self._centre[:, None])
        lowest, highest = 4 * self._extremes[::2].amin(dim=1), 4 * self._extremes[1::2].amax(dim=1)
        sums.lowest.copy_(lowest[1])
        sums.highest.copy_(highest[1])
        total, errors = sums.moments[0, :, :3], sums.moments[2, :, :3]
        coded = self._coded.sum(dim=1, dtype=torch.float64).T
        temperatures = total.new_tensor([1.0, 2.0, 4.0])
        divergences = (coded.log() - total.log() - errors / total / temperatures).clamp_(min=0)
        divergences[coded < _LEAST_TOTAL] = torch.nan
        largest_error = torch.maximum(sums.highest.abs(), sums.lowest.abs())
        largest_logit = torch.maximum(lowest[0].abs(), highest[0].abs()).double()
        rounding = _FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps * (largest_logit + self._centre.double().abs())
        rounding = rounding + error_rounding * largest_error
        margin = rounding if error_margin is None else rounding + error_margin.double()
        mean_margin = margin if kl_margin is None else rounding + kl_margin.double()
        logits_off = largest_logit.new_zeros(()) if logit_margin is None else logit_margin
        near = (highest[0].double()[:, None] - _NEGLIGIBLE * temperatures).abs()
        likely_logit = torch.minimum(torch.maximum(highest[0].double().abs()[:, None], near), largest_logit[:, None])
        return RowErrors(
            kl=divergences,
            kl_ceiling=_ceiling(
                divergences,
                (logit_rounding * likely_logit + logits_off[..., None]) / temperatures,
                mean_margin[:, None] / temperatures,
            ),
            scaled_bounds=sums.scaled_bounds(
                error_margin=margin, logit_margin=logit_rounding * largest_logit + logits_off
            ),
            error_range=sums.error_range() + 2 * margin,
            lowest_logit=lowest[0],
            highest_logit=highest[0],
        )


def _ceiling(kl: Tensor, logit_margin: Tensor, error_margin: Tensor) -> Float64[Tensor, "row temperature"]:
    """Bound KL by the KL of rounded numbers; margins are in units of the temperature.

    KL is about half the second moment of the errors. Its root grows by the error margin at most (Minkowski), and a mean
    over classes by a factor exp(2 margin) where logits, hence log-weights, are off by a margin.
    """
    return torch.exp(2 * logit_margin) * (kl.sqrt() + error_margin * 2**-0.5) ** 2


_NEGLIGIBLE = 20.0
"""Logits over temperature below the largest at which classes are too unlikely to be felt: exp(-20) is 2e-9."""

_LEAST_TOTAL = 1e-30
"""Weights of all decoded logits together below which float32 has lost them: these lie too far below the true ones."""

_FLOAT32_ROUNDINGS = 8.0
"""Units in the last place that a float32 logit made or decoded in another order of sums may be off by."""

_EXTREMES = ((torch.amin, 0), (torch.amax, 0), (torch.amin, 1), (torch.amax, 1))
"""What is kept of each tile: smallest and largest logit, smallest and largest error."""


def _sum_products(
    weights: Float[Tensor, "temperature row class"],
    values: Float[Tensor, "moment row class"],
    scratch: Float[Tensor, "row class"],
    *,
    out: Float[Tensor, "row temperature moment"],
) -> None:
    """Sum products over the classes; as matrix products where those are exact, four times faster."""
    if keeps_float32(weights.device):
        torch.bmm(weights.transpose(0, 1), values.permute(1, 2, 0), out=out)
        return
    for temperature in range(3):
        for moment in range(3):
            torch.mul(weights[temperature], values[moment], out=scratch)
            out[:, temperature, moment] = scratch.sum(dim=1)
