"""Memory: what a task takes at its peak, stated before it runs."""

from __future__ import annotations

__all__ = ["TaskMemory", "task_memory"]

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdcache.build.rows import RowMap
from kdcache.build.spool import SPOOL_BYTES
from kdcache.build.task import ENCODING_THREADS, MEASURED_ELEMENTS
from kdcache.codecs import Codec
from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.documents import Spectral, TopK

_WORKSPACE_BYTES = 64 * MEASURED_ELEMENTS
"""Float64 and float32 blocks in which codes are made and KL is measured, and what allocators keep; about."""


@dataclass(frozen=True)
class TaskMemory:
    """Bytes that a process takes at its peak while it runs tasks, beside its teacher's weights and activations.

    Parameters
    ----------
    logits_bytes : int
        Logits, or hidden states: of the batches that a shard lies in, of the shard they become, and of the shards that
        wait to be encoded.
    coding_bytes : int
        Of the shards that are encoded at once: codes, what is decoded to be measured, and the room for blocks.
    encoded_bytes : int
        Of the same shards as they are stored, in pieces and as a whole.
    parameter_bytes : int
        The codec's parameters, as they are stored and as they are worked with.
    pilot_bytes : int
        The pilot's logits in memory, while the codec is fitted: before the tasks, and up to a quarter of a GiB during
        them where they run in the same process.
    input_bytes : int
        Batches of inputs, as many as are loaded ahead: by the pilot's largest. What else a dataset holds is its own.
    """

    logits_bytes: int
    coding_bytes: int
    encoded_bytes: int
    parameter_bytes: int
    pilot_bytes: int
    input_bytes: int = 0

    @property
    def task_bytes(self) -> int:
        """Bytes of a process that runs tasks, without the pilot's."""
        coded = self.coding_bytes + self.encoded_bytes + self.parameter_bytes
        return self.input_bytes + self.logits_bytes + coded


def task_memory(
    row_map: RowMap,
    codec: Codec,
    parameters: Mapping[str, npt.NDArray[np.generic]],
    sample: Logits,
    *,
    input_bytes: int = 0,
) -> TaskMemory:
    """State what a task takes.

    Parameters
    ----------
    row_map : RowMap
    codec : Codec
    parameters : mapping of str to ndarray
        The codec's, fitted.
    sample : Tensor [row, class] or HeadLogits
        Some logits, or hidden states, as the teacher gives them.
    input_bytes : int
        Of all batches of inputs that are held at once.
    """
    plan = row_map.plan
    shard_rows = min(plan.cache.shard_rows, plan.cache.num_rows)
    values = sample.hidden if isinstance(sample, HeadLogits) else sample
    row_bytes = values.shape[1] * values.element_size()
    batch_rows = min(plan.batch_size * int(row_map.num_rows.max()), plan.cache.num_rows)
    shard_bytes, batch_bytes = shard_rows * row_bytes, batch_rows * row_bytes
    held_bytes = shard_bytes + 2 * batch_bytes
    code_bytes = shard_rows * codec.num_columns * np.dtype(codec.storage_dtype).itemsize
    made_bytes = 4 * shard_rows * plan.cache.num_classes
    stored_bytes = sum(array.nbytes for array in parameters.values())
    elements = sum(math.prod(array.shape) for array in parameters.values())
    return TaskMemory(
        logits_bytes=held_bytes + (1 + ENCODING_THREADS) * shard_bytes,
        coding_bytes=ENCODING_THREADS * (3 * code_bytes + _decoded_bytes(codec, made_bytes) + _WORKSPACE_BYTES),
        encoded_bytes=ENCODING_THREADS * 2 * code_bytes,
        parameter_bytes=stored_bytes + 8 * elements,
        pilot_bytes=min(plan.num_pilot_rows * row_bytes, SPOOL_BYTES),
        input_bytes=input_bytes,
    )


def _decoded_bytes(codec: Codec, made_bytes: int) -> int:
    """Count what measuring makes of a whole shard: nothing where errors are summed tile by tile, or some rows serve."""
    if isinstance(codec.spec, Spectral | TopK):
        return 0
    return 2 * made_bytes
