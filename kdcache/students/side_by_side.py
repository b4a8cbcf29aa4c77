"""Side by side: many students of one architecture that see the same inputs at the same time.

Two ways, with one interface. *Stacked*: the students' parameters stand in one tensor [student, ...] each and the
module runs under ``torch.func.vmap``; small students then share the cost of every operation's launch. *Looped*: one
module after the other, which serves every module, and large ones best.
"""

from __future__ import annotations

__all__ = ["LoopedStudents", "SideBySide", "StackedStudents", "Way", "make_students", "place_side_by_side"]

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from kdcache.errors import JobError

Way = Literal["stacked", "looped"]
LARGEST_STACKED = 100_000
"""Parameters of one student above which a processor is faster with one module after the other (measured: from 6 to 18
ReLU networks of 784 inputs, stacking wins up to 100 units a layer and loses 5% at 300)."""


class SideBySide(Protocol):
    """Students of one architecture, run on the same inputs at the same time."""

    @property
    def way(self) -> Way:
        """How they are run."""

    @property
    def num_students(self) -> int:
        """How many they are."""

    def __call__(self, inputs: Any) -> Float[Tensor, "student ..."]:
        """Give the logits [student, row, class] of all students."""

    def parameters(self) -> list[Tensor]:
        """Give the leaf tensors that an optimiser works on."""

    def train(self, mode: bool) -> None:  # noqa: FBT001 - as torch.nn.Module.train
        """Put the students into training mode, or into evaluation mode."""

    def state(self) -> dict[str, Tensor]:
        """Give all parameters and buffers, stacked: [student, ...] under the module's own names."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""

    def module(self, student_index: int) -> nn.Module:
        """Give a copy of one student as a module of its own, on the processor, in evaluation mode."""


def make_students(make_student: Callable[[], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    """Make one student a seed, with ``torch.manual_seed(seed)`` before each; the global generator stays as it was.

    Parameters
    ----------
    make_student : callable () -> torch.nn.Module
    seeds : sequence of int [student]

    Raises
    ------
    JobError
        What is made is no module, or differs in its parameters' names or shapes from seed to seed.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    students = []
    with torch.random.fork_rng(devices=devices):
        for seed in seeds:
            torch.manual_seed(seed)
            students.append(make_student())
    for seed, student in zip(seeds, students, strict=True):
        if not isinstance(student, nn.Module):
            raise JobError(f"the student factory gave a {type(student).__qualname__}; expected a torch.nn.Module")
        if _shapes(student) != _shapes(students[0]):
            raise JobError(
                f"the student factory gave other parameters for seed {seed} than for seed {seeds[0]}: "
                f"{_shapes(student)} and {_shapes(students[0])}. Students of a sweep have one architecture; only their "
                "initial weights may differ"
            )
    return students


def place_side_by_side(
    modules: Sequence[nn.Module], inputs: Any, *, device: torch.device | str = "cpu", way: Way | None = None
) -> SideBySide:
    """Put students side by side on a device.

    Parameters
    ----------
    modules : sequence of torch.nn.Module [student]
        As `make_students` gives them. They are taken over: train them here or there, not in both places.
    inputs : batch
        One batch of inputs as they will come, on which stacking is tried. The students keep their state and the
        global generators theirs.
    device : torch.device or str
        Where they run.
    way : "stacked" or "looped", optional
        By default stacked where that is faster and works: not for one student, not on a processor for students of more
        than 100,000 parameters, not where a buffer changes in training (as in BatchNorm), not where vmap refuses.

    Raises
    ------
    JobError
        ``way="stacked"`` was asked for and does not work; or a student gives no logits [row, class] for these inputs.
    """
    for module in modules:
        module.to(device)
    _check_logits(modules[0], inputs, torch.device(device))
    if way == "looped" or (way is None and not _gains(modules, torch.device(device))):
        return LoopedStudents(modules)
    reason = _refusal(modules, inputs, torch.device(device))
    if reason is None:
        return StackedStudents(modules)
    if way == "stacked":
        raise JobError(f"the students cannot be stacked: {reason}; leave `way` out, or ask for 'looped'")
    return LoopedStudents(modules)


@final
class StackedStudents:
    """Students whose parameters are stacked, run under vmap.

    Each student draws random numbers of its own (dropout), but not those it would draw alone.

    Parameters
    ----------
    modules : sequence of torch.nn.Module [student]
        On one device.
    """

    way: Literal["stacked"] = "stacked"

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.num_students = len(modules)
        self._template = copy.deepcopy(modules[0])
        parameters, buffers = stack_module_state(list(modules))
        self._parameters: dict[str, Tensor] = dict(parameters)
        self._buffers: dict[str, Tensor] = dict(buffers)
        self._run = vmap(self._run_one, in_dims=(0, 0, None), randomness="different")

    def _run_one(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Any) -> Tensor:
        logits: Tensor = functional_call(self._template, (parameters, buffers), (inputs,))
        return logits

    def __call__(self, inputs: Any) -> Float[Tensor, "student ..."]:
        """Give the logits [student, row, class] of all students."""
        logits: Tensor = self._run(self._parameters, self._buffers, inputs)
        return logits

    def parameters(self) -> list[Tensor]:
        """Give the leaf tensors [student, ...] that an optimiser works on."""
        return [parameter for parameter in self._parameters.values() if parameter.requires_grad]

    def train(self, mode: bool) -> None:  # noqa: FBT001 - as torch.nn.Module.train
        """Put the students into training mode, or into evaluation mode."""
        self._template.train(mode)

    def state(self) -> dict[str, Tensor]:
        """Give all parameters and buffers, stacked: [student, ...] under the module's own names."""
        return {name: tensor.detach() for name, tensor in {**self._parameters, **self._buffers}.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def module(self, student_index: int) -> nn.Module:
        """Give a copy of one student as a module of its own, on the processor, in evaluation mode."""
        module = copy.deepcopy(self._template)
        state = self.state()
        for name, tensor in _named_tensors(module).items():
            tensor.copy_(state[name][student_index])
        return module.cpu().eval()


@final
class LoopedStudents:
    """Students run one after the other.

    Parameters
    ----------
    modules : sequence of torch.nn.Module [student]
        On one device.
    """

    way: Literal["looped"] = "looped"

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = list(modules)
        self.num_students = len(self.modules)

    def __call__(self, inputs: Any) -> Float[Tensor, "student ..."]:
        """Give the logits [student, row, class] of all students."""
        return torch.stack([module(inputs) for module in self.modules])

    def parameters(self) -> list[Tensor]:
        """Give the leaf tensors that an optimiser works on."""
        return [parameter for module in self.modules for parameter in module.parameters() if parameter.requires_grad]

    def train(self, mode: bool) -> None:  # noqa: FBT001 - as torch.nn.Module.train
        """Put the students into training mode, or into evaluation mode."""
        for module in self.modules:
            module.train(mode)

    def state(self) -> dict[str, Tensor]:
        """Give all parameters and buffers, stacked: [student, ...] under the module's own names."""
        each = [_named_tensors(module) for module in self.modules]
        return {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for index, module in enumerate(self.modules):
            for name, tensor in _named_tensors(module).items():
                tensor.copy_(state[name][index])

    def module(self, student_index: int) -> nn.Module:
        """Give a copy of one student as a module of its own, on the processor, in evaluation mode."""
        return copy.deepcopy(self.modules[student_index]).cpu().eval()


def _gains(modules: Sequence[nn.Module], device: torch.device) -> bool:
    """Tell whether stacking can be expected to be faster."""
    return len(modules) > 1 and (device.type != "cpu" or _num_parameters(modules[0]) <= LARGEST_STACKED)


def _check_logits(module: nn.Module, inputs: Any, device: torch.device) -> None:
    logits = _try(LoopedStudents([copy.deepcopy(module)]), inputs, device, training=False)
    if logits.ndim < 3:
        raise JobError(f"a student gives logits of shape {tuple(logits.shape[1:])}; expected [row, class]")


def _refusal(modules: Sequence[nn.Module], inputs: Any, device: torch.device) -> str | None:
    """Say why the students cannot be stacked, or None; tried on copies of two of them."""
    looped = LoopedStudents([copy.deepcopy(module) for module in modules[:2]])
    before = looped.state()
    _try(looped, inputs, device, training=True)
    changed = [name for name, tensor in looped.state().items() if not _same(tensor, before[name])]
    if changed:
        return f"training changes the buffers {changed}"
    try:
        stacked = StackedStudents(looped.modules)
        _try(stacked, inputs, device, training=True)
        got = _try(stacked, inputs, device, training=False)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"torch.func.vmap refuses them ({type(error).__name__}: {error})"
    expected = _try(looped, inputs, device, training=False)
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-3, atol=1e-4):
        return "stacked they give other logits than one by one"
    return None


def _try(students: SideBySide, inputs: Any, device: torch.device, *, training: bool) -> Tensor:
    """Run students once, leaving the global generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(training):
        students.train(training)
        return students(inputs).detach()


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.nan_to_num(), right.nan_to_num()) if left.is_floating_point() else torch.equal(left, right)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _named_tensors(module).items()}


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
