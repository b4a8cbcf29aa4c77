"""What soft targets cost a training step on an accelerator, and what the loss takes there.

Students' steps over the same student with float32 logits that lie on the device and are gathered there by index_select.
Contestants take turns of many steps each, in an order drawn anew, and only the end of a turn waits for the device: a
single step that waits would hide what runs beside. Then the loss alone, in rows of 262,144 classes.
"""

from __future__ import annotations

__all__ = ["run_large_loss", "run_step"]

import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import kdcache
from benchmarks.streaming.row_sets import TEACHER, lookup_teacher, mixed_logits
from benchmarks.timing import interleaved
from kdcache.codecs import Decoder, SpectralCodec, codec_for, parameters_to

NUM_EXAMPLES: Final = 51_200
NUM_CLASSES: Final = 1000
BATCH_SIZE: Final = 256
STEPS: Final = 50
ROUNDS: Final = 9
TEMPERATURE: Final = 4.0
CODECS: Final = {
    "float16": kdcache.Lossless(dtype="float16"),
    "uint8 codes": kdcache.Codes(),
    "spectral": kdcache.Spectral(max_kl=0.0075),
}
TIERS: Final = ("device", "memory", "mapped", "windows")
LARGE_ROWS: Final = 2048
LARGE_CLASSES: Final = 262_144
LARGE_COMPONENTS: Final = 640
_PILOT_ROWS: Final = 2048
_PICTURES: Final = 2048

Batches = Callable[[], Iterator[tuple[Tensor, Any]]]
Loss = Callable[[Tensor, Any, Tensor], Tensor]


class _Student(NamedTuple):
    module: nn.Module
    picture: tuple[int, int, int]
    is_mixed: bool
    """In bfloat16 where that is known to be enough."""


def run_step(device: str = "cuda") -> list[dict[str, Any]]:
    """Measure the steps of four students, from one that is all launches to one that is a residual network."""
    torch.manual_seed(0)
    logits = mixed_logits(NUM_EXAMPLES)
    students = {
        "MLP 784-800-800-1000": _Student(_mlp(784, 800), (1, 28, 28), is_mixed=False),
        "small CNN": _Student(_cnn(), (1, 28, 28), is_mixed=False),
        "MLP 3072-8192-8192-1000": _Student(_mlp(3072, 8192), (3, 32, 32), is_mixed=False),
        "residual CNN, 21 layers, 64 x 64": _Student(_residual(), (3, 64, 64), is_mixed=True),
    }
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        caches = {name: _cache(Path(folder) / name, logits, codec) for name, codec in CODECS.items()}
        return [
            line
            for name, student in students.items()
            for line in _compare(name, student, logits.float().to(device), caches, Path(folder), torch.device(device))
        ]


def _cache(folder: Path, logits: Tensor, codec: Any) -> kdcache.SoftTargetCache:
    inputs = kdcache.TransferSet.from_arrays(torch.arange(len(logits)))
    return kdcache.build_cache(folder, inputs, {TEACHER: lookup_teacher(logits)}, codec=codec, device="cpu")


def _mlp(num_inputs: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, NUM_CLASSES),
    )  # fmt: skip


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, NUM_CLASSES),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, states: Tensor) -> Tensor:
        return functional.relu(states + self.inner(states))


def _residual() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
    for width in (64, 128, 256, 512):
        if width > 64:
            layers.append(nn.Conv2d(width // 2, width, 2, stride=2))
        layers += [_Residual(width), _Residual(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, NUM_CLASSES))


def _ours(outputs: Tensor, soft_targets: Any, labels: Tensor) -> Tensor:
    return kdcache.distillation_loss(outputs, soft_targets, labels, temperature=TEMPERATURE, soft_weight=0.9)


def _plain(outputs: Tensor, logits: Any, labels: Tensor) -> Tensor:
    soft = torch.softmax(logits / TEMPERATURE, 1)
    softened = -(soft * torch.log_softmax(outputs / TEMPERATURE, 1)).sum(1).mean() * TEMPERATURE**2
    return 0.9 * softened + 0.1 * functional.cross_entropy(outputs, labels)


def _compare(
    name: str,
    student: _Student,
    logits: Tensor,
    caches: dict[str, kdcache.SoftTargetCache],
    folder: Path,
    device: torch.device,
) -> list[dict[str, Any]]:
    module = student.module.to(device)
    pictures = torch.rand(_PICTURES, *student.picture, device=device)
    labels = torch.arange(len(logits), device=device) % NUM_CLASSES
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)

    def steps(batches: Batches, loss: Loss) -> Iterator[None]:
        while True:
            for rows, soft_targets in batches():
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=student.is_mixed):
                    outputs = module(pictures.index_select(0, rows % _PICTURES))
                loss(outputs.float(), soft_targets, labels.index_select(0, rows)).backward()
                optimizer.step()
                yield

    def turn(stream: Iterator[None]) -> None:
        for _ in range(STEPS):
            next(stream)
        _wait(device)

    contestants = {
        "float32 logits on the device": steps(partial(_on_device, logits), _ours),
        "float32 logits on the device, plain torch's loss": steps(partial(_on_device, logits), _plain),
        "hard labels alone": steps(
            partial(_on_device, logits), lambda outputs, _, ids: functional.cross_entropy(outputs, ids)
        ),
    }
    for codec, cache in caches.items():
        for tier in TIERS:
            loader = _loader(cache, tier, folder / f"{codec}-copy", device)
            contestants[f"{codec}: {tier}"] = steps(partial(_batches, loader), _ours)
    timings = interleaved(
        {one: partial(turn, stream) for one, stream in contestants.items()},
        rounds=ROUNDS, warm_up=2, turns=np.random.default_rng(0),
    )  # fmt: skip
    base = timings["float32 logits on the device"].seconds
    return [
        {"student": name, "soft_targets": one, "step_ms": 1000 * timing.median / STEPS, **_ratios(timing.seconds, base)}
        for one, timing in timings.items()
    ]


def _ratios(seconds: tuple[float, ...], base: tuple[float, ...]) -> dict[str, Any]:
    found = sorted(ours / theirs for ours, theirs in zip(seconds, base, strict=True))
    return {"ratio": statistics.median(found), "of_rounds": [found[0], found[-1]]}


def _on_device(logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(logits), device=logits.device).split(BATCH_SIZE):
        yield rows, logits.index_select(0, rows)


def _loader(cache: kdcache.SoftTargetCache, tier: Any, copies: Path, device: torch.device) -> kdcache.SoftTargetLoader:
    options: dict[str, Any] = {"local_copy": copies} if tier == "mapped" else {}
    inputs = kdcache.TransferSet.from_arrays(torch.arange(len(cache)))
    opened = kdcache.open_cache(cache.address)
    return kdcache.SoftTargetLoader(opened, inputs, batch_size=BATCH_SIZE, tier=tier, device=str(device), **options)


def _batches(loader: kdcache.SoftTargetLoader) -> Iterator[tuple[Tensor, Any]]:
    for rows, _, soft_targets in loader:
        yield rows, soft_targets


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_large_loss(device: str = "cuda") -> list[dict[str, Any]]:
    """Measure loss and gradient of 2,048 bfloat16 rows of 262,144 classes: milliseconds, and memory beside both."""
    torch.manual_seed(0)
    head = torch.randn(LARGE_CLASSES, LARGE_COMPONENTS, device=device) * 0.12
    pilot = torch.randn(_PILOT_ROWS, LARGE_COMPONENTS, device=device).relu_() @ head.T
    teacher = (torch.randn(LARGE_ROWS, LARGE_COMPONENTS, device=device).relu_() @ head.T).bfloat16()
    targets: dict[str, Any] = {"bfloat16 logits": teacher}
    for name, spec in (("uint8 codes", kdcache.Codes()), ("top 64", kdcache.TopK(k=64))):
        codec = codec_for(spec, LARGE_CLASSES)
        targets[name] = _coded(codec, codec.fit(pilot.cpu()), teacher)
    spectral, parameters = SpectralCodec.fitted(kdcache.Spectral(max_kl=0.02), LARGE_CLASSES, pilot)
    targets["spectral"] = _coded(spectral, parameters, teacher)
    del pilot, head
    outputs = torch.randn(LARGE_ROWS, LARGE_CLASSES, device=device).bfloat16()
    labels = torch.randint(LARGE_CLASSES, (LARGE_ROWS,), device=device)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "hard labels": lambda logits: functional.cross_entropy(logits.float(), labels),
        "plain torch, float32, from bfloat16 logits": lambda logits: _plain(logits.float(), teacher.float(), labels),
    }
    for name, soft_targets in targets.items():
        losses[f"ours, {name}"] = lambda logits, soft_targets=soft_targets: _ours(logits, soft_targets, labels)  # type: ignore[misc]
    memory = {name: _extra_bytes(loss, outputs) for name, loss in losses.items()}
    timings = interleaved(
        {name: partial(_once, loss, outputs) for name, loss in losses.items()},
        rounds=ROUNDS, warm_up=2, turns=np.random.default_rng(0),
    )  # fmt: skip
    return [
        {
            "loss": name, "ms": 1000 * timing.median, "of_rounds": [1000 * value for value in timing.spread],
            "gib_beside_logits_and_gradient": memory[name] / 2**30,
        }
        for name, timing in timings.items()
    ]  # fmt: skip


def _coded(codec: Any, parameters: Any, logits: Tensor) -> kdcache.SoftTargets:
    decoder = Decoder(codec, parameters_to(parameters, logits.device))
    codes = torch.cat([decoder.encode(rows.float()) for rows in logits.split(256)])
    return kdcache.SoftTargets((codes,), (decoder,), (TEACHER,))


def _once(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> None:
    student = outputs.detach().requires_grad_()
    loss(student).backward()
    _wait(outputs.device)


def _extra_bytes(loss: Callable[[Tensor], Tensor], outputs: Tensor) -> int:
    """Give the most that is taken at a time, without the student's logits and their gradient."""
    if outputs.device.type != "cuda":
        return 0
    _once(loss, outputs)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(outputs.device)
    before = torch.cuda.memory_allocated(outputs.device)
    _once(loss, outputs)
    return torch.cuda.max_memory_allocated(outputs.device) - before - outputs.nbytes
