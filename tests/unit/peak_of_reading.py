"""A program: reads two teachers' soft targets, 256 rows of 262,144 classes, and prints the memory it took at its peak.

"loss-spectral" and "loss-topk" take 64 rows, which are a quarter of a result.

In results: float32 arrays [256 rows, 262,144 classes] of 256 MiB. What lay in memory before is not counted.
"""

import sys
from pathlib import Path

import torch

from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to
from kdcache.documents import Codes, Spectral, TopK
from kdcache.losses import distillation_loss
from kdcache.soft_targets import SoftTargets

NUM_ROWS, NUM_CLASSES = 256, 262_144
SPECS = {"loss-spectral": Spectral(step=0.1), "loss-topk": TopK(k=64)}


def narrow_batch(spec):
    """64 rows along 8 axes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8, generator=generator) @ torch.randn(8, NUM_CLASSES, generator=generator)
    if isinstance(spec, Spectral):
        codec, parameters = SpectralCodec.fitted(spec, NUM_CLASSES, rows)
    else:
        codec = codec_for(spec, NUM_CLASSES)
        parameters = codec.fit(rows)
    decoder = Decoder(codec, parameters_to(parameters, "cpu"))
    codes = decoder.encode(rows)
    return SoftTargets((codes, codes), (decoder, decoder), ("a", "b"))


def batch(ask):
    if ask in SPECS:
        return narrow_batch(SPECS[ask])
    codec = codec_for(Codes(), NUM_CLASSES)
    row = torch.linspace(-20, 5, NUM_CLASSES)[None]
    decoder = Decoder(codec, parameters_to(codec.fit(row), "cpu"))
    codes = decoder.encode(row).repeat(NUM_ROWS, 1)
    return SoftTargets((codes, codes), (decoder, decoder), ("a", "b"))


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def read(ask, soft_targets, student):
    if ask.startswith("loss"):
        distillation_loss(student, soft_targets, temperature=2.0, soft_weight=1.0).backward()
        return student.grad
    if ask == "blocks":
        return [block.probabilities(2.0).amax() for _, block in soft_targets.row_blocks(max_elements=2**22)]
    if ask == "mean_logits":
        return soft_targets.mean_logits()
    return soft_targets.probabilities(2.0, mean=ask)


def main(ask):
    torch.set_num_threads(1)
    soft_targets = batch(ask)
    student = torch.zeros(len(soft_targets), NUM_CLASSES).requires_grad_() if ask.startswith("loss") else None
    read(ask, soft_targets[:1], None if student is None else torch.zeros(1, NUM_CLASSES).requires_grad_())
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now
    kept = read(ask, soft_targets, student)
    print((status("VmHWM") - before) / (4 * NUM_ROWS * NUM_CLASSES))  # noqa: T201
    del kept


if __name__ == "__main__":
    main(sys.argv[1])
