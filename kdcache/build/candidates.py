"""Candidates of rate control: codecs fitted to some rows of a pilot, and measured on others.

The rows of a pilot have two parts, in their order, so that rows of one sequence rarely stand in both:

- the *fitted rows*: every codec is fitted to them. A basis holds out the last eighth of them, and finds its step there;
- the *held-out rows*, the last: an eighth of the pilot, 256 at most. No codec was fitted to them. Bytes, fidelity and
  time are measured on them, forecasts are made and codecs chosen from that.

A pilot of fewer than 64 rows has too few to spare: all of them are both.
"""

from __future__ import annotations

__all__ = [
    "MIN_ROWS_FOR_BASIS",
    "Candidate",
    "attempt",
    "fitted_rows",
    "held_out_rows",
    "made_rows",
    "measure_codec",
    "step_rows",
    "stored_bytes_per_row",
]

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kdcache.build.plan import chunk_rows_of
from kdcache.build.task import certify_codes, measure_every_row
from kdcache.codecs import Codec, Decoder, SpectralCodec, fitted_codec, parameters_to
from kdcache.codecs.divergence import TEMPERATURES
from kdcache.codecs.head_logits import Logits, rows_of
from kdcache.documents import CertificateDocument, CodecSpec, PlanDocument, Spectral
from kdcache.errors import CodecError
from kdcache.store.shards import encode_shard
from kdcache.store.teachers import codec_shard_spec

MAX_HELD_OUT_ROWS = 256
MIN_ROWS_FOR_BASIS = 64
_MADE_ELEMENTS = 2**27


@dataclass(frozen=True, eq=False)
class Candidate:
    """A fitted codec and what it did to held-out rows.

    Parameters
    ----------
    codec : Codec
    parameters : dict of str to ndarray
    bytes_per_row : float
        Stored and compressed, parameters excluded.
    parameter_bytes : int
        Stored once a teacher.
    certificate : CertificateDocument
        Fidelity on the held-out rows.
    mean_kl, max_kl : float
        Mean over and largest of all held-out rows, the largest over temperatures 1, 2 and 4, in nats.
    encode_seconds_per_row : float
        Encoding, decoding and measuring.
    """

    codec: Codec
    parameters: Mapping[str, np.ndarray]
    bytes_per_row: float
    parameter_bytes: int
    certificate: CertificateDocument
    mean_kl: float
    max_kl: float
    encode_seconds_per_row: float

    def bytes_over(self, num_rows: int) -> float:
        """Bytes a row with the parameters' bytes spread over so many rows."""
        return self.bytes_per_row + self.parameter_bytes / num_rows


def held_out_rows(logits: Logits) -> Logits:
    """Give the pilot's last eighth, 256 rows at most, to which no codec is fitted; all of a small pilot."""
    return logits if len(logits) < MIN_ROWS_FOR_BASIS else rows_of(logits, slice(-_num_held_out(logits), None))


def fitted_rows(logits: Logits) -> Logits:
    """Give the rows that codecs are fitted to: those that are not held out; all of a small pilot."""
    return logits if len(logits) < MIN_ROWS_FOR_BASIS else rows_of(logits, slice(None, -_num_held_out(logits)))


def step_rows(logits: Logits) -> Logits:
    """Give rows, 256 at most, on which steps and targets of a basis are searched: fitted rows it does not span."""
    fitted = fitted_rows(logits)
    return rows_of(fitted, slice(-max(1, min(MAX_HELD_OUT_ROWS, len(fitted) // 8)), None))


def _num_held_out(logits: Logits) -> int:
    return min(MAX_HELD_OUT_ROWS, len(logits) // 8)


def made_rows(logits: Logits) -> Tensor:
    """Give rows of logits; of hidden states the last ones are made, as many as memory should hold."""
    if isinstance(logits, Tensor):
        return logits
    return logits[-max(MAX_HELD_OUT_ROWS, _MADE_ELEMENTS // logits.shape[1]) :]


def attempt(spec: CodecSpec, logits: Logits, plan: PlanDocument) -> Candidate | None:
    """Fit a codec and measure it, on hidden states where it is one for them; None where it cannot hold these logits."""
    pilot = fitted_rows(logits)
    try:
        codec, parameters = fitted_codec(
            spec, plan.cache.num_classes, pilot if isinstance(spec, Spectral) else made_rows(pilot)
        )
        return measure_codec(codec, parameters, logits, plan)
    except CodecError:
        return None


def measure_codec(
    codec: Codec,
    parameters: Mapping[str, np.ndarray],
    logits: Logits,
    plan: PlanDocument,
) -> Candidate:
    """Encode the pilot's held-out rows, and measure bytes, fidelity and time."""
    decoder = Decoder(codec, parameters_to(parameters, logits.device))
    held_out = held_out_rows(logits)
    held_out = held_out if isinstance(codec, SpectralCodec) else held_out[:]
    start = time.perf_counter()
    codes, errors = decoder.encode_measured(held_out)
    certificate = certify_codes(decoder, held_out, codes, errors)
    seconds = time.perf_counter() - start
    divergences = measure_every_row(decoder, held_out, codes, TEMPERATURES)  # of all rows: a sample may mislead
    return Candidate(
        codec=codec,
        parameters=parameters,
        bytes_per_row=stored_bytes_per_row(codes, codec, plan),
        parameter_bytes=sum(array.nbytes for array in parameters.values()),
        certificate=certificate,
        mean_kl=float(divergences.mean(dim=0).max()),
        max_kl=float(divergences.max()),
        encode_seconds_per_row=seconds / len(held_out),
    )


def stored_bytes_per_row(codes: Tensor, codec: Codec, plan: PlanDocument) -> float:
    """Count the compressed bytes of a row of codes, in chunks as the cache has them or as few rows allow."""
    chunk_rows = chunk_rows_of(plan, codec.spec)
    chunk_rows = min(chunk_rows, max(len(codes) // 8 * 8, 1))  # bits are shuffled by eights; real chunks fit
    whole = len(codes) // chunk_rows * chunk_rows
    spec = codec_shard_spec(
        codec.spec,
        shard_rows=whole,
        chunk_rows=chunk_rows,
        num_columns=codec.num_columns,
        storage_dtype=codec.storage_dtype,
    )
    return len(encode_shard(codes[:whole].cpu().numpy(), spec)) / whole
