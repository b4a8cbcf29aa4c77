"""Write the golden caches of the present format version: `python tests/golden/write_caches.py`.

Run once for each format version, when it is released; what was written stays and is read for ever. Teachers are linear
maps with weights in steps of 1/8, so that their logits are exact in float32, float16 and bfloat16 alike. Some rows have
a masked class.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import kdcache

FOLDER = Path(__file__).parent / "v1"
NAMES = [f"example-{index}" for index in range(12)]
CODECS = {
    "lossless-float32": kdcache.Lossless(),
    "lossless-bfloat16": kdcache.Lossless(dtype="bfloat16"),
    "codes-uint8": kdcache.Codes(),
    "codes-uint16-uniform": kdcache.Codes(dtype="uint16", spacing="uniform"),
    "spectral": kdcache.Spectral(max_kl=0.001),
    "topk-class-means": kdcache.TopK(k=2),
    "topk-samples": kdcache.TopK(k=2, tail="samples", num_samples=2),
    "bound-codes-uint8": kdcache.Codes(),
}
"""What was added since: "bound" with records that name their chunks' checksums."""

UNMASKED = ("spectral", "topk-class-means")
"""These keep one mask for all rows, and the golden rows' masks change from row to row."""


def logits(teacher_index: int, *, masked: bool = True) -> torch.Tensor:
    """Give the true logits [row, class] of a teacher."""
    rows, classes = torch.meshgrid(torch.arange(12), torch.arange(5), indexing="ij")
    values = ((rows * 7 + classes * (3 + teacher_index)) % 16 - 8).float() / 8
    return values.masked_fill((rows * 5 + classes) % 11 == teacher_index, -torch.inf) if masked else values


class Table(nn.Module):
    """Gives the logits of the rows whose numbers it is given."""

    def __init__(self, teacher_index: int, *, masked: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(logits(teacher_index, masked=masked))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table[rows]


def main() -> None:
    """Write one cache a codec."""
    transfer_set = kdcache.TransferSet.from_arrays(
        torch.arange(12), labels=[index % 5 for index in range(12)], example_ids=NAMES
    )
    for name, codec in CODECS.items():
        if (FOLDER / name).exists():  # what was written stays
            continue
        masked = name not in UNMASKED
        teachers = {"a": Table(0, masked=masked), "b": Table(1, masked=masked)}
        kdcache.build_cache(FOLDER / name, transfer_set, teachers, codec=codec, shard_rows=8, chunk_rows=4)


if __name__ == "__main__":
    main()
