"""Whole windows of two texts, with SmolLM2's hidden states at every token: what a transformer learns from on a device.

A whole [row, class] array of a million rows would take 190 GB. Hidden states take 1.2, and logits are made of them, a
batch at a time.
"""

from __future__ import annotations

__all__ = ["TEXTS", "WindowPlan", "WindowSubject", "Windows", "now", "open_windows"]

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor, nn

from benchmarks.students.subjects import thinned
from benchmarks.students.transformer import CausalTransformer
from benchmarks.teachers import smollm2
from benchmarks.teachers.recorded import Kind

TEXTS: Final[dict[Kind, str]] = {"main": "Moby Dick", "other": "State of the Union"}
_SEED: Final = 0
_BATCH_WINDOWS: Final = 64


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """How long, on how much, and how large students are trained that read whole windows.

    Parameters
    ----------
    num_train_windows : tuple of int
        Windows of 256 tokens to learn from, of each text at most.
    num_held_out_windows : int
        Windows of each text to measure on.
    width, depth, num_heads : int
        Of the student.
    steps, batch_windows : int
        Updates, and windows of each.
    learning_rates : tuple of float
        Adam's highest, after a rise over a twentieth of the steps; it falls to 0 along a straight line. The best is
        chosen with full logits at temperature 1, for all arms.
    seeds : int
        Students an arm and temperature.
    temperatures : tuple of float
        At which students learn.
    """

    num_train_windows: tuple[int, int]
    num_held_out_windows: int
    width: int
    depth: int
    num_heads: int
    steps: int
    batch_windows: int
    learning_rates: tuple[float, ...]
    seeds: int
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of text, and what the teacher made of them.

    Parameters
    ----------
    tokens : Tensor [window, position]
        int64.
    following : Tensor [window, position]
        int64, the token that follows each in the text.
    text : Tensor [window]
        int64, the text of each window: its place in `TEXTS`.
    hidden : Tensor [row, component]
        bfloat16, the teacher's last hidden states at the windows' positions, one window after the other.
    """

    tokens: Int[Tensor, "window position"]
    following: Int[Tensor, "window position"]
    text: Int[Tensor, " window"]
    hidden: BFloat16[Tensor, "row component"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_rows(self) -> int:
        """Positions of all windows."""
        return self.tokens.numel()


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowSubject:
    """A teacher's hidden states over windows, its head, and how to make a student.

    Parameters
    ----------
    name, title : str
        For the results file and for people.
    train, held_out : Windows
        To learn from and to measure on.
    head : Tensor [class, component]
        float32: logits are float32 products of hidden states with it.
    student : callable
        Makes a student, from torch's global generator, that gives logits [window, position, class] for tokens.
    forward_tokens_per_second : float
        How quickly the teacher made the hidden states.
    """

    name: str
    title: str
    train: Windows
    held_out: Windows
    head: Float[Tensor, "class component"]
    student: Callable[[], nn.Module]
    forward_tokens_per_second: float

    @property
    def num_classes(self) -> int:
        """Classes of the teacher."""
        return len(self.head)

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.head.device

    def logits(self, hidden: Float[Tensor, "row component"]) -> Float[Tensor, "row class"]:
        """Make the teacher's logits of some rows, float32."""
        return hidden.float() @ self.head.T


def open_windows(plan: WindowPlan, device: torch.device) -> WindowSubject:
    """Cut both texts into windows, hold some of each out, and have SmolLM2 read the rest and those."""
    teacher = smollm2.network().to(device)
    cut = [_cut(smollm2.token_ids(kind)) for kind in TEXTS]
    split = [_split(len(tokens), plan, place) for place, (tokens, _) in enumerate(cut)]
    seconds = [0.0]

    def windows(side: int) -> Windows:
        tokens, following = (torch.cat([cut[place][part][split[place][side]] for place in range(2)]) for part in (0, 1))
        text = torch.cat([torch.full((len(split[place][side]),), place) for place in range(2)])
        hidden = _read(teacher, tokens.to(device), seconds)
        return Windows(tokens=tokens.to(device), following=following.to(device), text=text.to(device), hidden=hidden)

    _read(teacher, cut[0][0][: 2 * _BATCH_WINDOWS].to(device), [0.0])  # the first batches are slow
    train, held_out = windows(0), windows(1)
    return WindowSubject(
        name="transformer",
        title="SmolLM2-135M on two texts, 49,152 classes",
        train=train,
        held_out=held_out,
        head=teacher.head.float(),
        student=lambda: CausalTransformer(
            smollm2.NUM_CLASSES, window=smollm2.WINDOW, width=plan.width, depth=plan.depth, num_heads=plan.num_heads
        ),
        forward_tokens_per_second=(train.num_rows + held_out.num_rows) / seconds[0],
    )


def _cut(ids: Int[Tensor, " token"]) -> tuple[Int[Tensor, "window position"], Int[Tensor, "window position"]]:
    """Cut a text into windows one after the other, and give the token after each as well."""
    num_windows = (len(ids) - 1) // smollm2.WINDOW
    length = num_windows * smollm2.WINDOW
    return ids[:length].view(num_windows, -1), ids[1 : length + 1].view(num_windows, -1)


def _split(num_windows: int, plan: WindowPlan, place: int) -> tuple[Int[Tensor, " window"], Int[Tensor, " window"]]:
    """Draw windows to hold out, and spread those to learn from evenly over the others."""
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(_SEED))
    held_out, others = order.split([plan.num_held_out_windows, num_windows - plan.num_held_out_windows])
    return thinned(others.sort().values, plan.num_train_windows[place]), held_out.sort().values


@torch.no_grad()
def _read(teacher: smollm2.Network, tokens: Int[Tensor, "window position"], seconds: list[float]) -> Tensor:
    start = now(tokens.device)
    states = [teacher.hidden(batch).flatten(0, 1) for batch in tokens.split(_BATCH_WINDOWS)]
    hidden = torch.cat(states)
    seconds[0] += now(tokens.device) - start
    return hidden


def now(device: torch.device) -> float:
    """Give the time in seconds, once the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
