"""What the topk codec learns from the pilot, added up block by block."""

from __future__ import annotations

__all__ = ["PilotSums"]

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kdcache.codecs.topk.tail import Tail, without
from kdcache.errors import CodecError

_SHAPE_TEMPERATURE = 4.0
_POPULARITY_TEMPERATURE = 2.0
_WIDEST_RISE = 16.0  # of class means above the (k + 1)-th: differences of float64 sums stay exact to 1e-5


class PilotSums:
    """Sums over the rows of a pilot, on the CPU.

    Parameters
    ----------
    num_classes : int
        Classes of a row.
    num_nodes : int
        Coefficients of a row's log-partition.
    """

    def __init__(self, num_classes: int, num_nodes: int) -> None:
        self._num_rows = 0
        self._num_kept = torch.zeros(num_classes, dtype=torch.int64)
        self._num_masked = torch.zeros(num_classes, dtype=torch.int64)
        self._soft_targets = torch.zeros(num_classes, dtype=torch.float64)
        self._log_sums = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
        self._coefficients = [torch.empty(0, num_nodes, dtype=torch.float64)]

    def add(
        self,
        gaps: Float32[Tensor, "row class"],
        classes: Int64[Tensor, "row place"],
        tail: Tail,
    ) -> None:
        """Add rows.

        Parameters
        ----------
        gaps : Tensor [row, class]
            Gaps to the row's maximum, infinite for masked classes.
        classes : Tensor [row, place]
            Kept classes; places without one hold the number of classes.
        tail : Tail
            The rows' tails.
        """
        wide = gaps.to(torch.float64)
        self._num_rows += len(gaps)
        self._num_kept += torch.bincount(classes.flatten(), minlength=gaps.shape[1] + 1)[:-1]
        self._num_masked += (gaps == torch.inf).sum(dim=0)
        self._soft_targets += torch.softmax(-wide / _POPULARITY_TEMPERATURE, dim=1).sum(dim=0)
        outside = without(wide, classes)
        relative = (tail.reference[:, None] - outside) / _SHAPE_TEMPERATURE
        self._log_sums = torch.logaddexp(self._log_sums, torch.logsumexp(relative, dim=0))
        self._coefficients.append(tail.coefficients)

    def common_parameters(self) -> dict[str, npt.NDArray[Any]]:
        """Give the order of the classes, and the principal axes of the log-partition's coefficients.

        Classes come in the order of how often they are kept and, where that is equal, of their mean soft target at
        temperature 2.
        """
        popularity = self._num_kept + self._soft_targets / (self._num_rows + 1)
        rows = torch.cat(self._coefficients)
        mean = rows.mean(dim=0)
        axes = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors.flip(1).T
        return {
            "class_of_rank": popularity.argsort(descending=True, stable=True).numpy(),
            "node_basis": axes.to(torch.float32).numpy(),
            "node_mean": mean.to(torch.float32).numpy(),
        }

    def class_means(self, *, num_kept: int) -> npt.NDArray[np.float32]:
        """Give the classes' mean logits over the rows whose tail they are in, float32 [class].

        Logits are taken from the row's weakest kept class, which centres the rows, and averaged as
        4 log mean exp(z / 4). A class that is kept in every row stands level with the weakest kept class, at 0, and no
        class stands more than 16 above the (k + 1)-th. A class that is masked in every row has -inf.

        Parameters
        ----------
        num_kept : int
            Classes that are kept in a row, k.

        Raises
        ------
        CodecError
            A class is masked in some rows and not in others.
        """
        masked = self._num_masked == self._num_rows
        irregular = (self._num_masked > 0) & ~masked
        if bool(irregular.any()):
            index = int(irregular.nonzero()[0])
            raise CodecError(
                f"Class {index} is masked in {int(self._num_masked[index])} of the pilot's {self._num_rows} rows. "
                'Class means hold masks that are the same in every row. Use TopK(tail="samples") or Lossless(), which '
                "keep masks that change from row to row."
            )
        num_tail = (self._num_rows - self._num_kept).to(torch.float64)
        means = _SHAPE_TEMPERATURE * (self._log_sums - num_tail.log())
        means = torch.where(num_tail > 0, means, 0.0)
        highest = means[~masked].sort(descending=True).values
        capped = means.clamp(max=highest[min(num_kept, len(highest) - 1)] + _WIDEST_RISE)
        return torch.where(masked, -torch.inf, capped).to(torch.float32).numpy()
