"""Pilot: the first rows of a build, on which the codec is fitted and size, fidelity and time are forecast."""

from __future__ import annotations

__all__ = ["Forecast", "RatePoint", "TeacherForecast", "pilot_batches", "run_pilot"]

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.build.candidates import Candidate
from kdcache.build.curve import further_candidates
from kdcache.build.inference import BatchLogits, Inputs
from kdcache.build.masks import count_other_masks
from kdcache.build.memory import TaskMemory, task_memory
from kdcache.build.rate_control import choose_codec
from kdcache.build.refusals import naming_rows, refuse_probabilities
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.spool import PilotLogits
from kdcache.build.work import StoredTeacher
from kdcache.codecs import Codec
from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.documents import CertificateDocument, CodecSpec, PlanDocument

KEPT_PILOT_BYTES = 2**28
"""Pilot logits kept in memory, so that tasks in the same process need not compute them again."""


@dataclass(frozen=True)
class RatePoint:
    """What one codec costs and keeps on held-out rows of a pilot.

    Parameters
    ----------
    codec : codec spec
    bytes_per_row : float
        As stored, compressed, without the parameters.
    parameter_bytes : int
        Stored once a teacher.
    certificate : CertificateDocument
        Fidelity on the held-out rows.
    is_choice : bool
        Whether this is the codec that a build takes.
    """

    codec: CodecSpec
    bytes_per_row: float
    parameter_bytes: int
    certificate: CertificateDocument
    is_choice: bool

    def bytes_over(self, num_rows: int) -> float:
        """Bytes of so many rows and the parameters."""
        return self.bytes_per_row * num_rows + self.parameter_bytes


@dataclass(frozen=True)
class TeacherForecast:
    """What a pilot says of one stored teacher.

    Parameters
    ----------
    name : str
    codec : codec spec
        As asked for, or as chosen; nothing in it is left open.
    num_pilot_rows : int
    bytes_per_row : float
        As stored, compressed, on held-out rows; without the parameters.
    parameter_bytes : int
        Of the codec's parameters, stored once.
    certificate : CertificateDocument
        Fidelity on held-out rows of the pilot.
    inference_seconds_per_row, encode_seconds_per_row : float
        Measured in this process.
    points : tuple of RatePoint
        Every codec that was measured, the one chosen among them; of a plan also other steps of its basis.
    num_other_masks : int
        Rows of the pilot that mask (-inf) other classes than most of its rows do.
    memory : TaskMemory, optional
        What a task takes at its peak.
    """

    name: str
    codec: CodecSpec
    num_pilot_rows: int
    bytes_per_row: float
    parameter_bytes: int
    certificate: CertificateDocument
    inference_seconds_per_row: float
    encode_seconds_per_row: float
    points: tuple[RatePoint, ...]
    num_other_masks: int = 0
    memory: TaskMemory | None = None


@dataclass(frozen=True)
class Forecast:
    """What a build will write and take: the plan, and a forecast for each stored teacher.

    Parameters
    ----------
    address : str
    plan : PlanDocument
    teachers : tuple of TeacherForecast
        Those whose codec is still to be fitted; teachers already begun have theirs.
    """

    address: str
    plan: PlanDocument
    teachers: tuple[TeacherForecast, ...]

    @property
    def num_stored_rows(self) -> int:
        """Rows of all views that each teacher stores."""
        return self.plan.cache.num_rows * self.plan.cache.num_views

    @property
    def num_bytes(self) -> float:
        """Forecast size of all shards and parameters, in bytes."""
        rows = self.num_stored_rows
        return sum(rows * teacher.bytes_per_row + teacher.parameter_bytes for teacher in self.teachers)

    @property
    def seconds(self) -> float:
        """Forecast time of the build in this process, in seconds: inference, with encoding on other threads."""
        return self.num_stored_rows * sum(
            max(teacher.inference_seconds_per_row, teacher.encode_seconds_per_row) for teacher in self.teachers
        )


@dataclass(frozen=True, eq=False)
class Pilot:
    """A fitted teacher: codec and parameters, forecast, and the logits that were computed."""

    codec: Codec
    parameters: dict[str, np.ndarray]
    forecast: TeacherForecast
    kept: Mapping[BatchKey, Logits]


def pilot_batches(row_map: RowMap, num_pilot_rows: int) -> list[BatchKey]:
    """Choose whole batches, spread evenly over the transfer set, with about `num_pilot_rows` rows; views take turns.

    No example is in it twice, so that what is held out is of other examples than what codecs are fitted to.
    """
    rows_per_batch = max(1, row_map.plan.cache.num_rows // row_map.num_batches)
    count = min(row_map.num_batches, -(-num_pilot_rows // rows_per_batch))
    chosen = np.unique(np.linspace(0, row_map.num_batches - 1, count).round().astype(int))
    views = itertools.cycle(range(row_map.plan.cache.num_views))
    return [BatchKey(view_index, int(index)) for view_index, index in zip(views, chosen, strict=False)]


@torch.inference_mode()
def run_pilot(stored: StoredTeacher, inputs: Inputs, *, with_curve: bool = False) -> Pilot:
    """Run a teacher on the pilot, fit the codec, and forecast.

    With `with_curve` the forecast also holds what other steps of a fitted basis cost and keep: for plans, since a build
    needs none of it.

    Raises
    ------
    NonFiniteLogitsError, WrongClassCountError, CodecError
        The teacher's logits cannot be cached; nothing has been written.
    TeacherError
        The teacher failed, or gives probabilities in place of logits.
    """
    plan = inputs.row_map.plan
    keys = pilot_batches(inputs.row_map, plan.num_pilot_rows)
    with stored.running(plan.codec) as (run, head):
        batches = BatchLogits(stored.name, run, inputs, num_classes=plan.cache.num_classes, head=head)
        collected = PilotLogits(stored.name, _num_rows(inputs.row_map, keys))
        kept, num_timed_rows, inference_seconds = _Kept(), 0, 0.0
        stream = batches.stream(keys)
        for index, key in enumerate(keys):
            start = time.perf_counter()
            piece = next(stream)
            if index or len(keys) == 1:  # the first batch warms the teacher up
                inference_seconds += time.perf_counter() - start
                num_timed_rows += len(piece)
            collected.add(piece.hidden if isinstance(piece, HeadLogits) else piece)
            kept.add(key, piece)
        logits = collected.logits(head)
        if isinstance(logits, Tensor):
            refuse_probabilities(stored.name, logits)
    with naming_rows(stored.name, lambda row: inputs.name_row(*_place_of(inputs.row_map, keys, row))):
        chosen, candidates = choose_codec(logits, plan)
    further = further_candidates(chosen, candidates, logits, plan) if with_curve else []
    forecast = TeacherForecast(
        name=stored.name,
        codec=chosen.codec.spec,
        num_pilot_rows=len(logits),
        bytes_per_row=chosen.bytes_per_row,
        parameter_bytes=chosen.parameter_bytes,
        certificate=chosen.certificate,
        inference_seconds_per_row=inference_seconds / max(1, num_timed_rows),
        encode_seconds_per_row=chosen.encode_seconds_per_row,
        points=tuple(_point(item, is_choice=item is chosen) for item in (*candidates, *further)),
        num_other_masks=count_other_masks(logits) if isinstance(logits, Tensor) else 0,
        memory=task_memory(
            inputs.row_map,
            chosen.codec,
            chosen.parameters,
            logits,
            input_bytes=inputs.held_batches * batches.largest_input_bytes,
        ),
    )
    return Pilot(chosen.codec, dict(chosen.parameters), forecast, kept.logits)


def _point(candidate: Candidate, *, is_choice: bool) -> RatePoint:
    return RatePoint(
        candidate.codec.spec, candidate.bytes_per_row, candidate.parameter_bytes, candidate.certificate, is_choice
    )


def _num_rows(row_map: RowMap, keys: list[BatchKey]) -> int:
    return sum(end - first for first, end in map(row_map.rows_of_batch, keys))


def _place_of(row_map: RowMap, keys: list[BatchKey], row: int) -> tuple[int, int]:
    """Give the view and the row of its block that a row of the pilot is."""
    for key in keys:
        first, end = row_map.rows_of_batch(key)
        if row < end - first:
            return key.view_index, first + row
        row -= end - first
    raise IndexError(row)


class _Kept:
    """The first batches of a pilot, as many as `KEPT_PILOT_BYTES` hold."""

    def __init__(self) -> None:
        self.logits: dict[BatchKey, Logits] = {}
        self._num_bytes = 0

    def add(self, key: BatchKey, piece: Logits) -> None:
        self._num_bytes += piece.nbytes
        if self._num_bytes <= KEPT_PILOT_BYTES:
            self.logits[key] = piece
