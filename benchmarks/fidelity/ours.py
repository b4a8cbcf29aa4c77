"""kdcache's side: a real cache, built of a teacher that repeats its recorded logits."""

from __future__ import annotations

__all__ = ["Ours", "Sizes"]

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

import kdcache
from benchmarks.fidelity.peers import Kept
from benchmarks.fidelity.peers.base import bytes_of
from kdcache.codecs import Decoder
from kdcache.documents import CodecSpec
from kdcache.store.shards import encode_shard
from kdcache.store.teachers import shard_spec

_TEACHER = "teacher"


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk, in parts.

    Parameters
    ----------
    row_bytes : float
        Of a row held out: a peer's files divided by the rows in them; ours, the shard.
    metadata_row_bytes : float
        Ours: all other files of the real cache but the parameters, divided by its rows. They hardly grow with rows.
    parameter_bytes : int
        Ours: what is fitted, stored once a teacher however many rows there are.
    """

    row_bytes: float
    metadata_row_bytes: float = 0.0
    parameter_bytes: int = 0


class Ours:
    """A codec as a cache uses it: fitted by a build over the pilot, then given rows that the build never saw.

    Parameters
    ----------
    name, setting : str
        For tables.
    spec : codec spec
        As a user writes it.
    pilot : Tensor [row, class]
        Logits of the rows that the cache is built of.
    folder : Path
        Where the cache is built.
    device : str
        Where the build encodes.
    options
        Further options of `kdcache.build_cache`.
    """

    def __init__(
        self,
        name: str,
        setting: str,
        spec: CodecSpec,
        pilot: Float[Tensor, "row class"],
        folder: Path,
        *,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.name, self.setting = name, setting
        rows = torch.arange(len(pilot))
        self._cache = kdcache.build_cache(
            folder,
            kdcache.TransferSet.from_arrays(rows),
            {_TEACHER: _Replay(pilot)},
            codec=spec,
            device=device,
            **options,
        )
        self._folder, self._num_rows = folder, len(pilot)
        self.decoder: Decoder = self._cache.read_rows(rows[:1].numpy()).decoders[0]

    def encode(self, logits: Float[Tensor, "row class"]) -> Kept:
        """Give the stored codes, on the device of the logits."""
        return {"codes": self.decoder.to(logits.device).encode(logits)}

    def soft_targets(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Decode and soften, float32."""
        scaled = self.decoded(kept, temperature) / temperature
        return scaled.exp() if self.is_normalised else scaled.softmax(dim=1)

    def log_soft_targets(self, kept: Kept, temperature: float) -> Float64[Tensor, "row class"]:
        """Decode and soften, in float64 from the decoded logits on."""
        scaled = self.decoded(kept, temperature).double() / temperature
        return scaled if self.is_normalised else scaled.log_softmax(dim=1)

    def sizes(self, kept: Kept) -> Sizes:
        """Give the bytes of these rows as a shard of the cache's layout, and of the rest of the cache."""
        codes = kept["codes"].cpu().numpy()
        chunk_rows = min(self._cache.document.chunk_rows, len(codes))
        whole = len(codes) // chunk_rows * chunk_rows
        layout = shard_spec(self._cache.teachers[_TEACHER], self._cache.document)
        shard = encode_shard(codes[:whole], replace(layout, shard_rows=whole, chunk_rows=chunk_rows))
        teacher = self._folder / "teachers" / _TEACHER
        parameter_bytes = sum(bytes_of(folder) for folder in teacher.glob("parameters*"))
        others = bytes_of(self._folder) - bytes_of(teacher / "codes") - parameter_bytes
        return Sizes(len(shard) / whole, others / self._num_rows, parameter_bytes)

    @property
    def is_normalised(self) -> bool:
        """Whether what is decoded, over the temperature, are log-weights to be used as they are."""
        return bool(getattr(self.decoder.codec, "is_normalised", False))

    def decoded(self, kept: Kept, temperature: float) -> Float[Tensor, "row class"]:
        """Decode, on the device of the codes."""
        decoder = self.decoder.to(kept["codes"].device)
        if getattr(decoder.codec, "depends_on_temperature", False):
            return decoder.decode(kept["codes"], temperature=temperature)
        return decoder.decode(kept["codes"])


class _Replay(nn.Module):
    """Gives the recorded logits of rows by their numbers."""

    def __init__(self, logits: Float[Tensor, "row class"]) -> None:
        super().__init__()
        self.register_buffer("logits", logits, persistent=False)
        self.logits: Tensor

    def forward(self, rows: Int[Tensor, " row"]) -> Float[Tensor, "row class"]:
        return self.logits[rows]
