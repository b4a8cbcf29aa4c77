"""Refusals of a build: which example a codec's row is of, teachers that give probabilities, targets nothing reaches."""

from __future__ import annotations

__all__ = ["ROW", "counted_from", "naming_rows", "nothing_meets", "refuse_probabilities"]

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from kdcache.codecs.base import row_blocks
from kdcache.documents import CodecSpec, RateTarget, codec_in_words
from kdcache.errors import CodecError, NonFiniteLogitsError, TeacherError

ROW = re.compile(r"\bRow (\d+)\b")
"""How a codec names a row of those that it was given."""

_SUM_MARGIN = 0.01  # a softmax in bfloat16 misses 1 by up to 2^-9, one in float16 by 3e-8 a class
_BLOCK_ELEMENTS = 2**22


class Measured(Protocol):
    """What was measured of a codec on held-out rows."""

    @property
    def parameter_bytes(self) -> int:
        """Stored once a teacher."""

    @property
    def bytes_per_row(self) -> float:
        """Without the parameters."""

    @property
    def mean_kl(self) -> float:
        """Largest over temperatures 1, 2 and 4, in nats."""


def refuse_probabilities(teacher: str, logits: Float[Tensor, "row class"]) -> None:
    """Refuse a teacher that ends in a softmax: its probabilities would be softened again, and its certificate be good.

    Rows of logits that are nowhere below 0 and all sum to 1 hardly come about otherwise, of two open classes and more.

    Parameters
    ----------
    teacher : str
        Its name.
    logits : Tensor [row, class]
        The pilot, as the teacher gave it.

    Raises
    ------
    TeacherError
        Every row is at least 0 and sums to 1, masked classes, -inf, aside.
    """
    if not len(logits) or logits.shape[1] < 2 or not all(_are_probabilities(part) for part in _blocks(logits)):
        return
    raise TeacherError(
        f"teacher {teacher!r} gives probabilities: all {len(logits)} rows of the pilot are at least 0 and sum to 1. A "
        "cache keeps logits, which are softened when read; a softmax of probabilities is nearly even at every "
        "temperature. Return the logits, before the softmax, or log-probabilities: their logarithm, or "
        "log_softmax. Nothing of this teacher was written"
    )


@contextlib.contextmanager
def counted_from(first_row: int) -> Iterator[None]:
    """Let the rows that a refusal names count from the pilot's first, where a codec was given a part of the pilot."""
    try:
        yield
    except (CodecError, NonFiniteLogitsError) as error:
        if not first_row:
            raise
        raise type(error)(ROW.sub(lambda row: f"Row {int(row[1]) + first_row}", str(error))) from error


@contextlib.contextmanager
def naming_rows(teacher: str, name_row: Callable[[int], str]) -> Iterator[None]:
    """Let a refusal of the pilot say whose teacher and example it is about.

    Parameters
    ----------
    teacher : str
        Its name.
    name_row : callable (row of the pilot) -> str
        Says which example a row is of.
    """
    try:
        yield
    except (CodecError, NonFiniteLogitsError) as error:
        named = ROW.search(str(error))
        about = f" Row {named[1]} of the pilot is of {name_row(int(named[1]))}." if named else ""
        raise type(error)(
            f"teacher {teacher!r} cannot be cached so. {error}{about} Nothing of it was written"
        ) from error


def nothing_meets(target: RateTarget, found: Sequence[tuple[CodecSpec, Measured]], num_rows: int) -> str:
    """Say that no codec reaches a target, what came nearest, and what to ask for.

    Parameters
    ----------
    target : RateTarget
    found : sequence of (codec spec, Measured)
        All that were measured.
    num_rows : int
        Rows over which the parameters are spread.
    """
    asked = f"max_kl={target.max_kl:g}" if target.max_kl is not None else f"bytes_per_row={target.bytes_per_row:g}"
    told = f"No codec reaches {asked} on the pilot's held-out rows. "
    if not found:
        return f"{told}Nothing could be coded. Give a codec yourself."
    lines = "".join(f"\n  {_in_words(spec, item, num_rows)}" for spec, item in found)
    how = _at_least(found, num_rows) if target.max_kl is None else "Ask for a larger max_kl"
    return f"{told}Measured:{lines}\n{how}, or give a codec yourself."


def _in_words(spec: CodecSpec, item: Measured, num_rows: int) -> str:
    parameters = item.parameter_bytes / num_rows
    shares = f"{item.bytes_per_row:,.4g} of codes and {parameters:,.4g} of parameters"
    return (
        f"{codec_in_words(spec)}: {item.bytes_per_row + parameters:,.4g} bytes a row ({shares}) at a mean KL of "
        f"{item.mean_kl:.2g}"
    )


def _at_least(found: Sequence[tuple[CodecSpec, Measured]], num_rows: int) -> str:
    """Name the smallest that was measured, and its parameters where these weigh more than the codes."""
    spec, smallest = min(found, key=lambda pair: pair[1].bytes_per_row + pair[1].parameter_bytes / num_rows)
    parameters = smallest.parameter_bytes / num_rows
    told = (
        f"Ask for at least {_rounded_up(smallest.bytes_per_row + parameters)} bytes a row, which the smallest that was "
        f"measured takes, {codec_in_words(spec)}"
    )
    if parameters > smallest.bytes_per_row:
        told += f" (most of it parameters: {smallest.parameter_bytes:,} bytes that only {num_rows:,} rows share)"
    return told


def _rounded_up(value: float) -> str:
    """Round up to three figures, so that asking for what is said is enough."""
    text = f"{value:.3g}"
    return text if float(text) >= value else f"{value * 1.005:.3g}"


def _are_probabilities(rows: Tensor) -> bool:
    values = rows.masked_fill(rows.isneginf(), 0)
    sums = values.sum(dim=1, dtype=torch.float32)
    has_choice = bool((rows.isneginf().logical_not().sum(dim=1) > 1).all())  # one open class has probability 1 anyhow
    return has_choice and bool((values >= 0).all()) and bool(((sums - 1).abs() <= _SUM_MARGIN).all())


def _blocks(logits: Tensor) -> Iterator[Tensor]:
    for rows in row_blocks(*logits.shape, max_elements=_BLOCK_ELEMENTS):
        yield logits[rows]
