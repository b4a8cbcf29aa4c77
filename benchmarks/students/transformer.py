"""A small causal transformer that learns from SmolLM2: the token embedding is its last layer as well."""

from __future__ import annotations

__all__ = ["CausalTransformer"]

from typing import Final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_EMBEDDING_DEVIATION: Final = 0.02
_WIDENING: Final = 4  # of the hidden layer between two attentions, as most transformers have it


class CausalTransformer(nn.Module):
    """Token and position embeddings, blocks of attention and a hidden layer, and the embedding again at the end.

    Parameters
    ----------
    num_classes : int
        Tokens there are.
    window : int
        Most positions of an example.
    width, depth, num_heads : int
        Numbers a token, blocks, and heads of each attention.
    """

    def __init__(self, num_classes: int, *, window: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.places = nn.Parameter(torch.empty(window, width))
        for weight in (self.embedding.weight, self.places):
            nn.init.normal_(weight, std=_EMBEDDING_DEVIATION)
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Int[Tensor, "example position"]) -> Float[Tensor, "example position class"]:
        """Give the logits of the token after each position."""
        states = self.embedding(tokens) + self.places[: tokens.shape[1]]
        return nn.functional.linear(self.norm(self.blocks(states)), self.embedding.weight, self.bias)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.incoming = nn.Linear(width, 3 * width)
        self.outgoing = nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, _WIDENING * width), nn.GELU(), nn.Linear(_WIDENING * width, width))

    def forward(self, states: Float[Tensor, "example position width"]) -> Float[Tensor, "example position width"]:
        attended = states + self._attention(self.first_norm(states))
        changed: Tensor = attended + self.hidden(self.second_norm(attended))
        return changed

    def _attention(self, states: Float[Tensor, "example position width"]) -> Float[Tensor, "example position width"]:
        examples, positions, width = states.shape
        parts = self.incoming(states).view(examples, positions, 3, self.num_heads, width // self.num_heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        outgoing: Tensor = self.outgoing(mixed.transpose(1, 2).reshape(examples, positions, width))
        return outgoing
