"""A small language model that learns from SmolLM2 on Moby Dick: the last eight tokens, 49,152 classes."""

from __future__ import annotations

__all__ = ["PADDING", "LanguageModel", "contexts", "following", "open_lm"]

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.students.subjects import Plan, Subject, thinned
from benchmarks.teachers import load, smollm2

CONTEXT_TOKENS: Final = 8
PADDING: Final = 0  # SmolLM2's end-of-text, which no novel holds
_WIDTH: Final = 64
_HIDDEN: Final = 256
_SEED: Final = 0


class LanguageModel(nn.Module):
    """The last tokens' embeddings side by side, one hidden layer, and the embedding again as the last layer.

    The last layer takes 64 numbers to 49,152, in bfloat16 while training under autocast: an update of 64 rows takes
    some 20 ms on one core.

    Parameters
    ----------
    num_classes : int
        Tokens there are.
    context_tokens : int
        Tokens it looks at.
    """

    def __init__(self, num_classes: int = smollm2.NUM_CLASSES, context_tokens: int = CONTEXT_TOKENS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, _WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.body = nn.Sequential(
            nn.Linear(context_tokens * _WIDTH, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _WIDTH), nn.LayerNorm(_WIDTH)
        )
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Int[Tensor, "row position"]) -> Float[Tensor, "row class"]:
        """Give the logits of the token after each row's last."""
        return nn.functional.linear(self.body(self.embedding(tokens).flatten(1)), self.embedding.weight, self.bias)


def open_lm(plan: Plan) -> Subject:
    """Open SmolLM2's recording: rows of some windows to learn from, of others to measure on.

    A row's teacher had read its window from the start up to this token; its student is given the last eight of them.
    """
    recorded = load("smollm2")
    if recorded.token_ids is None:
        raise ValueError("smollm2: expected token_ids in the recording, got none")
    inputs = contexts(recorded.token_ids.view(-1, smollm2.WINDOW)).flatten(0, 1)
    labels = following(smollm2.token_ids("main"), recorded.token_ids.view(-1, smollm2.WINDOW)).flatten()
    pilot, held_out = recorded.split(plan.num_held_out, seed=_SEED)
    train = thinned(pilot, plan.num_train)
    return Subject(
        name="lm",
        title="SmolLM2-135M on Moby Dick, 49,152 classes",
        train_inputs=inputs[train],
        held_out_inputs=inputs[held_out],
        train_logits=recorded.logits(train),
        held_out_logits=recorded.logits(held_out),
        held_out_labels=labels[held_out],
        student=LanguageModel,
    )


def contexts(
    windows: Int[Tensor, "window position"], length: int = CONTEXT_TOKENS
) -> Int[Tensor, "window position context"]:
    """Give at every position of every window the last tokens up to it, padded before the window's start.

    Examples
    --------
    >>> contexts(torch.tensor([[5, 6, 7]]), length=2).tolist()
    [[[0, 5], [5, 6], [6, 7]]]
    """
    return nn.functional.pad(windows, (length - 1, 0), value=PADDING).unfold(1, length, 1).contiguous()


def following(ids: Int[Tensor, " token"], cut: Int[Tensor, "window position"]) -> Int[Tensor, "window position"]:
    """Give the token of a text that follows each token of the windows cut from it; -1 after the text's last.

    Raises
    ------
    ValueError
        The windows are not those that `smollm2.windows` cuts from this text.

    Examples
    --------
    >>> text = torch.arange(10)
    >>> following(text, smollm2.windows(text, num_windows=2, window=3)).tolist()
    [[1, 2, 3], [8, 9, -1]]
    """
    places = smollm2.windows(torch.arange(len(ids)), num_windows=len(cut), window=cut.shape[1])
    if not torch.equal(ids[places], cut):
        raise ValueError("the recorded windows are not cut from this text; record both again: rm -r benchmarks/.cache")
    return torch.cat([ids, torch.tensor([-1])])[places + 1]
