"""The ReLU networks of the MNIST experiment, and the weight constraint that the teacher is trained under.

Source: Hinton, Vinyals and Dean 2015, section 3; dropout and weight constraints as in Hinton et al. 2012
(arXiv 1207.0580).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kdcache.errors import JobError

NUM_PIXELS = 784
NUM_CLASSES = 10
TEACHER_UNITS = 1200
TEACHER_INPUT_DROPOUT = 0.2
TEACHER_HIDDEN_DROPOUT = 0.5

_BYTE_VALUES = 256


class ByteDropout(nn.Module):
    """Dropout whose mask costs one random byte a unit, five times cheaper on a CPU than `torch.nn.Dropout`.

    The probability is rounded to a whole number of 256ths, and the kept units are scaled by the reciprocal of the
    rounded keep probability, so that the expectation is exact. Identity in evaluation mode.

    Parameters
    ----------
    probability
        Chance that a unit is dropped, 0 <= probability < 1.

    Raises
    ------
    JobError
        If the probability lies outside its range.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise JobError(f"dropout probability: expected 0 <= probability < 1, got {probability}")
        self.probability = probability
        self._num_dropped_values = min(round(probability * _BYTE_VALUES), _BYTE_VALUES - 1)

    def forward(self, activations: Tensor) -> Tensor:
        """Return `activations`, of any shape, with units dropped at random in training mode."""
        if not self.training or self._num_dropped_values == 0:
            return activations
        num_units = activations.numel()
        # Filling 64-bit words over their full range draws eight independent bytes at a time.
        words = torch.empty((num_units + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[:num_units].view(activations.shape) >= self._num_dropped_values
        return activations * (kept * (_BYTE_VALUES / (_BYTE_VALUES - self._num_dropped_values))).to(activations.dtype)

    def extra_repr(self) -> str:
        """Return the probability, for printing."""
        return f"probability={self.probability}"


def mlp(widths: Sequence[int], *, input_dropout: float = 0.0, hidden_dropout: float = 0.0) -> nn.Sequential:
    """Build a ReLU network with logits as output.

    The layers are named, so that parameters have the same names (`linear_0.weight`, ...) with and without dropout.

    Parameters
    ----------
    widths
        Units of each layer, inputs first and classes last; at least two.
    input_dropout, hidden_dropout
        Chance that an input, or a hidden unit, is dropped in training mode.

    Returns
    -------
    nn.Sequential
        Maps inputs [example, widths[0]] to logits [example, widths[-1]].

    Raises
    ------
    JobError
        If there are fewer than two widths, or one is not positive, or a probability is out of range.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise JobError(f"widths: expected two or more positive numbers, inputs first, got {tuple(widths)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for layer_index, (num_inputs, num_outputs) in enumerate(pairwise(widths)):
        dropout = input_dropout if layer_index == 0 else hidden_dropout
        if dropout:
            layers[f"dropout_{layer_index}"] = ByteDropout(dropout)
        layers[f"linear_{layer_index}"] = nn.Linear(num_inputs, num_outputs)
        if layer_index < len(widths) - 2:
            layers[f"relu_{layer_index}"] = nn.ReLU()
    return nn.Sequential(layers)


def teacher(*, units: int = TEACHER_UNITS) -> nn.Sequential:
    """Build the paper's teacher: two hidden layers of `units` with dropout on inputs (0.2) and hidden units (0.5)."""
    return mlp(
        (NUM_PIXELS, units, units, NUM_CLASSES),
        input_dropout=TEACHER_INPUT_DROPOUT,
        hidden_dropout=TEACHER_HIDDEN_DROPOUT,
    )


def student(units: int) -> nn.Sequential:
    """Build the paper's student: two hidden layers of `units`, without any regularisation."""
    return mlp((NUM_PIXELS, units, units, NUM_CLASSES))


@torch.no_grad()
def constrain_incoming_norms(model: nn.Module, *, max_norm: float) -> None:
    """Shrink, in place, every unit's incoming weight vector whose Euclidean norm exceeds `max_norm`.

    Parameters
    ----------
    model
        Its `torch.nn.Linear` layers are constrained; weights are [unit, input].
    max_norm
        Largest norm allowed, > 0.

    Raises
    ------
    JobError
        If `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise JobError(f"max_norm: expected a number > 0, got {max_norm}")
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        norms = torch.linalg.vector_norm(module.weight, dim=1)
        too_long = (norms > max_norm).nonzero().squeeze(1)
        if len(too_long):
            module.weight[too_long] *= (max_norm / norms[too_long]).unsqueeze(1)
