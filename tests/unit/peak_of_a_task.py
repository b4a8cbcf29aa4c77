"""A program: builds a cache, and prints the anonymous memory it took at its peak and what was stated for it, as JSON.

A thread looks every millisecond: Linux keeps no peak of anonymous memory alone.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

import kdcache
from kdcache.documents import Codes, Lossless, Spectral, TopK

NUM_CLASSES, NUM_AXES, NUM_ROWS = 4096, 16, 4 * 4096
CODECS = {
    "codes": Codes(),
    "large inputs": Codes(),
    "lossless": Lossless(),
    "spectral": Spectral(step=0.5),
    "topk": TopK(k=32),
}


class Wide(nn.Module):
    """Logits along a few axes: no weights to speak of, and no activations but its logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.axes = nn.Parameter(torch.randn(NUM_AXES, NUM_CLASSES), requires_grad=False)

    def forward(self, inputs):
        if inputs.shape[1] > NUM_AXES:
            time.sleep(0.5)  # so that as many batches wait as may
        return inputs[:, :NUM_AXES] @ self.axes


class LargeInputs(torch.utils.data.Dataset):
    """Inputs of a quarter of a mebibyte each, made when they are asked for."""

    def __len__(self):
        return NUM_ROWS // 4

    def __getitem__(self, index):
        return torch.full((2**16,), index / NUM_ROWS)


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak:
    """The largest anonymous memory since `begin`, above what was held then."""

    def __init__(self):
        self.before = self.largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def begin(self):
        self.before = self.largest = anonymous_bytes()
        self._thread.start()

    def end(self):
        self._stop.set()
        self._thread.join()
        return self.largest - self.before

    def _watch(self):
        while not self._stop.wait(0.001):
            self.largest = max(self.largest, anonymous_bytes())


def main(name):
    torch.set_num_threads(1)
    small = kdcache.TransferSet.from_arrays(torch.randn(NUM_ROWS, NUM_AXES), digest_inputs=False)
    large = kdcache.TransferSet(LargeInputs(), digest_inputs=False)
    transfer_set = large if name == "large inputs" else small
    peak, stated = Peak(), []

    def on_progress(step):
        if step.task_memory is not None and not stated:
            stated.append(step.task_memory)
            peak.begin()

    with tempfile.TemporaryDirectory() as folder:
        kdcache.build_cache(
            f"{folder}/cache", transfer_set, {"a": Wide()},
            codec=CODECS[name], shard_rows=4096, num_pilot_rows=256, batch_size=256, on_progress=on_progress,
        )  # fmt: skip
    print(json.dumps({"measured": peak.end(), "stated": stated[0].task_bytes}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
