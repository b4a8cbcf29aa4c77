"""Pilot: the first rows of a build, on which the codec is fitted and size, fidelity and time are forecast."""

from __future__ import annotations

__all__ = ["Forecast", "TeacherForecast", "pilot_batches", "run_pilot"]

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcache.build.inference import BatchLogits, Inputs
from kdcache.build.rows import BatchKey, RowMap
from kdcache.build.task import certify_codes
from kdcache.build.work import StoredTeacher
from kdcache.codecs import Codec, codec_for, parameters_to
from kdcache.documents import CacheDocument, CertificateDocument, PlanDocument
from kdcache.store.shards import ShardSpec, encode_shard

KEPT_PILOT_BYTES = 2**28
"""Pilot logits kept in memory, so that tasks in the same process need not compute them again."""


@dataclass(frozen=True)
class TeacherForecast:
    """What a pilot says of one stored teacher.

    Parameters
    ----------
    name : str
    num_pilot_rows : int
    bytes_per_row : float
        As stored, compressed.
    certificate : CertificateDocument
        Fidelity on the pilot.
    inference_seconds_per_row, encode_seconds_per_row : float
        Measured in this process.
    """

    name: str
    num_pilot_rows: int
    bytes_per_row: float
    certificate: CertificateDocument
    inference_seconds_per_row: float
    encode_seconds_per_row: float


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
    def num_bytes(self) -> float:
        """Forecast size of all shards, in bytes."""
        rows = self.plan.cache.num_rows * self.plan.cache.num_views
        return rows * sum(teacher.bytes_per_row for teacher in self.teachers)

    @property
    def seconds(self) -> float:
        """Forecast time of the build in this process, in seconds: inference, with encoding on other threads."""
        rows = self.plan.cache.num_rows * self.plan.cache.num_views
        return rows * sum(
            max(teacher.inference_seconds_per_row, teacher.encode_seconds_per_row) for teacher in self.teachers
        )


@dataclass(frozen=True, eq=False)
class Pilot:
    """A fitted teacher: parameters, forecast, and the logits that were computed."""

    parameters: dict[str, np.ndarray]
    forecast: TeacherForecast
    kept: Mapping[BatchKey, Tensor]


def pilot_batches(row_map: RowMap, num_pilot_rows: int) -> list[BatchKey]:
    """Choose whole batches of the first view, spread evenly over the transfer set, with about `num_pilot_rows` rows."""
    rows_per_batch = max(1, row_map.plan.cache.num_rows // row_map.num_batches)
    count = min(row_map.num_batches, -(-num_pilot_rows // rows_per_batch))
    chosen = np.unique(np.linspace(0, row_map.num_batches - 1, count).round().astype(int))
    return [BatchKey(0, int(index)) for index in chosen]


@torch.inference_mode()
def run_pilot(stored: StoredTeacher, inputs: Inputs) -> Pilot:
    """Run a teacher on the pilot, fit the codec, and forecast.

    Raises
    ------
    NonFiniteLogitsError, WrongClassCountError, CodecError
        The teacher's logits cannot be cached; nothing has been written.
    """
    plan = inputs.row_map.plan
    keys = pilot_batches(inputs.row_map, plan.num_pilot_rows)
    with stored.teacher.running() as run:
        batches = BatchLogits(stored.name, run, inputs, num_classes=plan.cache.num_classes)
        pieces, inference_seconds = [], 0.0
        stream = batches.stream(keys)
        for index in range(len(keys)):
            start = time.perf_counter()
            pieces.append(next(stream))
            if index or len(keys) == 1:
                inference_seconds += time.perf_counter() - start
    logits = torch.cat(pieces)
    codec = codec_for(plan.codec, plan.cache.num_classes)
    parameters = codec.fit(logits)
    on_device = parameters_to(parameters, logits.device)
    start = time.perf_counter()
    codes = codec.encode(logits, on_device)
    certificate = certify_codes(codec, logits, codes, on_device)
    forecast = TeacherForecast(
        name=stored.name,
        num_pilot_rows=len(logits),
        bytes_per_row=_stored_bytes(codes.cpu().numpy(), codec, plan.cache) / len(logits),
        certificate=certificate,
        inference_seconds_per_row=inference_seconds / max(1, len(logits) - (len(pieces[0]) if len(keys) > 1 else 0)),
        encode_seconds_per_row=(time.perf_counter() - start) / len(logits),
    )
    return Pilot(parameters, forecast, _kept(keys, pieces))


def _stored_bytes(codes: np.ndarray, codec: Codec, cache: CacheDocument) -> int:
    chunk_rows = min(cache.chunk_rows, len(codes))
    whole = len(codes) // chunk_rows * chunk_rows
    spec = ShardSpec(whole, chunk_rows, codec.num_columns, codec.storage_dtype, codec.fill)
    return len(encode_shard(codes[:whole], spec)) * len(codes) // whole


def _kept(keys: list[BatchKey], pieces: list[Tensor]) -> dict[BatchKey, Tensor]:
    kept, num_bytes = {}, 0
    for key, piece in zip(keys, pieces, strict=True):
        num_bytes += piece.nbytes
        if num_bytes > KEPT_PILOT_BYTES:
            break
        kept[key] = piece
    return kept
