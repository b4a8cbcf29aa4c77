"""Teachers: live torch modules, or modules made from a job file, each with a fingerprint of its weights."""

from __future__ import annotations

__all__ = [
    "HeadedTeacher",
    "ModuleTeacher",
    "SourcedTeacher",
    "Teacher",
    "load_checkpoint",
    "settings_digest",
    "weights_digest",
]

import contextlib
import functools
import hashlib
import json
import pickle
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdcache import jobs
from kdcache.build.headed import TeacherWithHead
from kdcache.codecs.head_logits import Head
from kdcache.devices import choose_device, move
from kdcache.documents import Fingerprint, TeacherSource
from kdcache.errors import JobError, WrongClassCountError
from kdcache.soft_targets import at_least_float32

Autocast = Literal["bfloat16", "float16"] | None
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of lambdas and bound methods: another one in every process
_IN_USE_LOCK = threading.Lock()


@dataclass
class _Use:
    """How often a module is running now, and what it was like before the first use."""

    count: int
    modes: dict[nn.Module, bool]
    device: torch.device


_IN_USE: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()


@runtime_checkable
class Teacher(Protocol):
    """What a build needs of a teacher. Sent to other processes by pickling."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What makes this teacher this teacher."""
        ...

    def running(self) -> contextlib.AbstractContextManager[Callable[[Any], Tensor]]:
        """Make the teacher ready, and give a function from a batch of inputs to logits.

        The logits are [example, class], or [example, position, class] for sequences.
        """
        ...


@runtime_checkable
class HeadedTeacher(Protocol):
    """A teacher that may hand out its last hidden states and its head."""

    def has_linear_head(self) -> bool:
        """Tell whether it does; logits are then head @ hidden states."""
        ...

    def running_body(self) -> contextlib.AbstractContextManager[tuple[Callable[[Any], Tensor], Head]]:
        """Make the teacher ready, and give a function from a batch of inputs to hidden states, and the head.

        The hidden states are [example, component], or [example, position, component] for sequences.
        """
        ...


@dataclass(frozen=True, eq=False)
class ModuleTeacher:
    """A live torch module.

    Parameters
    ----------
    name : str
        The teacher's name in the cache.
    module : nn.Module
        Gives logits, or an object or mapping with `logits`.
    device : str
        `auto` takes cuda where there is one; the module is moved there, and back when the build is over.
    autocast : {"bfloat16", "float16"}, optional
        Reduced precision of the forward pass.
    source : str, optional
        Provenance; the module's class by default.
    arguments : mapping, optional
        What the module was made with, where it came from a factory: part of its fingerprint.
    """

    name: str
    module: nn.Module
    device: str = "auto"
    autocast: Autocast = None
    source: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    _kept: dict[str, Head] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Digest of the weights, as they are when first asked for."""
        kind = type(self.module)
        return Fingerprint.make(
            name=self.name,
            source=self.source or f"{kind.__module__}:{kind.__qualname__}",
            weights_sha256=weights_digest(self.module),
            settings_sha256=settings_digest(self.module, self.arguments),
            autocast=self.autocast,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[Any], Tensor]]:
        """Run the module in evaluation mode on its device; its modes and device are restored after the last use."""
        with self._in_use() as device:
            yield lambda inputs: _logits_of(_forward(self.module, device, self.autocast, inputs))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # the module holds the head's weights already

    def has_linear_head(self) -> bool:
        """Tell whether the module is a `TeacherWithHead` without a softcap."""
        return isinstance(self.module, TeacherWithHead) and self.module.is_linear

    @contextlib.contextmanager
    def running_body(self) -> Iterator[tuple[Callable[[Any], Tensor], Head]]:
        """Run the body of a `TeacherWithHead` as `running` runs the whole.

        Raises
        ------
        TypeError
            The module is none: ask `has_linear_head` first.
        """
        if not isinstance(self.module, TeacherWithHead):
            raise TypeError(f"a {type(self.module).__qualname__} hands out no head")
        hidden = self.module.hidden
        with self._in_use() as device:
            yield lambda inputs: _forward(hidden, device, self.autocast, inputs), self._head(self.module, device)

    def _head(self, module: TeacherWithHead, device: torch.device) -> Head:
        if device.type != "cpu":  # the module will move back: a head that is kept would hold the device's memory
            return module.linear_head(self._dtype)
        if "head" not in self._kept:
            self._kept["head"] = module.linear_head(self._dtype)
        return self._kept["head"]

    @property
    def _dtype(self) -> torch.dtype | None:
        dtype: torch.dtype | None = None if self.autocast is None else getattr(torch, self.autocast)
        return dtype

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[torch.device]:
        device = choose_device(self.device)
        _begin(self.module, device)
        try:
            yield device
        finally:
            _end(self.module)


@dataclass(frozen=True, eq=False)
class SourcedTeacher:
    """A teacher named in a job file: made anew in every process that runs it, so nothing large is sent around.

    Parameters
    ----------
    source : TeacherSource
        Name, factory, arguments and checkpoint.
    folder : Path
        The job file's folder, from which the checkpoint's path and the imports are resolved.
    device, autocast
        As of `ModuleTeacher`.
    """

    source: TeacherSource
    folder: Path
    device: str = "auto"
    autocast: Autocast = None

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """Digest of the weights after the checkpoint was loaded."""
        return self._module_teacher.fingerprint

    @functools.cached_property
    def _module_teacher(self) -> ModuleTeacher:
        module = jobs.make(self.source, self.folder)
        if not isinstance(module, nn.Module):
            raise JobError(
                f"teacher {self.source.name!r}: {self.source.factory} gave a {type(module).__qualname__}; a "
                "torch.nn.Module is needed. Nothing was written"
            )
        if self.source.checkpoint is not None:
            load_checkpoint(module, self.folder / self.source.checkpoint, name=self.source.name)
        return ModuleTeacher(
            self.source.name,
            module,
            self.device,
            self.autocast,
            source=self.source.factory,
            arguments=self.source.arguments,
        )

    def running(self) -> contextlib.AbstractContextManager[Callable[[Any], Tensor]]:
        """Load the teacher if this process has not yet, and run it."""
        return self._module_teacher.running()

    def has_linear_head(self) -> bool:
        """Tell whether the factory gives a `TeacherWithHead` without a softcap."""
        return self._module_teacher.has_linear_head()

    def running_body(self) -> contextlib.AbstractContextManager[tuple[Callable[[Any], Tensor], Head]]:
        """Load the teacher if this process has not yet, and run its body."""
        return self._module_teacher.running_body()

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_module_teacher", "fingerprint")
        return {key: value for key, value in self.__dict__.items() if key not in hidden}


@dataclass(frozen=True, eq=False)
class MergedTeacher:
    """The weighted mean of the members' logits, run as one teacher; float64 where a member gives that, else float32."""

    members: tuple[Teacher, ...]
    weights: tuple[float, ...]

    @property
    def fingerprint(self) -> Fingerprint:
        """A merged teacher has its members' fingerprints, none of its own."""
        raise TypeError("a merged teacher is described by its members")

    @contextlib.contextmanager
    def running(self) -> Iterator[Callable[[Any], Tensor]]:
        """Run all members side by side."""
        with contextlib.ExitStack() as stack:
            members = [stack.enter_context(member.running()) for member in self.members]

            def mean_logits(inputs: Any) -> Tensor:
                total: Tensor | None = None
                for member, weight, teacher in zip(members, self.weights, self.members, strict=True):
                    logits = at_least_float32(member(inputs))
                    logits = logits * weight if weight > 0 else torch.zeros_like(logits)  # 0 * -inf is NaN
                    if total is not None and logits.shape != total.shape:
                        raise WrongClassCountError(
                            f"teacher {teacher.fingerprint.name!r} gave logits of shape {tuple(logits.shape)}, the "
                            f"members before it {tuple(total.shape)}; only logits over the same classes can be merged"
                        )
                    total = logits if total is None else total + logits
                return cast("Tensor", total)

            yield mean_logits


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters and buffers, saved ones first."""
    hasher = hashlib.sha256()
    state = module.state_dict()
    hidden = {f"(not saved) {name}": value for name, value in module.named_buffers() if name not in state}
    for name, value in {**state, **hidden}.items():
        if not isinstance(value, Tensor):
            hasher.update(f"{name}|{value!r}\n".encode())
            continue
        tensor = value.detach().cpu().contiguous()
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def settings_digest(module: nn.Module, arguments: Mapping[str, Any]) -> str:
    """SHA-256 over a module's printed form and what it was made with: other layers or options, another teacher.

    What a forward method does with neither weights, options nor submodules to show for it cannot be seen from here.
    """
    described = _ADDRESS.sub("", repr(module))
    text = json.dumps({"arguments": dict(arguments), "module": described}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def load_checkpoint(module: nn.Module, path: Path, *, name: str) -> None:
    """Load weights into a module: safetensors, or a torch file with ``weights_only=True``.

    Raises
    ------
    JobError
        The file is missing or unreadable, or its weights do not fit the module.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - torch checkpoints do without it

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state) if isinstance(state, Mapping) else state
        module.load_state_dict(state)
    except FileNotFoundError as error:
        raise JobError(
            f"teacher {name!r}: there is no checkpoint {path}. Paths are relative to the job file; nothing was written"
        ) from error
    except pickle.UnpicklingError as error:
        raise JobError(
            f"teacher {name!r}: checkpoint {path} cannot be loaded: it holds more than tensors, or is no checkpoint. "
            "Nothing was written. Save module.state_dict() alone, with torch.save or as .safetensors"
        ) from error
    except Exception as error:
        raise JobError(f"teacher {name!r}: checkpoint {path} cannot be loaded: {error}. Nothing was written") from error


def _begin(module: nn.Module, device: torch.device) -> None:
    with _IN_USE_LOCK:
        use = _IN_USE.get(module)
        if use is None:
            modes = {part: part.training for part in module.modules()}
            before = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
            use = _IN_USE[module] = _Use(0, modes, before)
            module.eval().to(device)
        use.count += 1


def _end(module: nn.Module) -> None:
    with _IN_USE_LOCK:
        use = _IN_USE[module]
        use.count -= 1
        if use.count:
            return
        del _IN_USE[module]
        module.to(use.device)
        for part, mode in use.modes.items():
            part.training = mode


@torch.inference_mode()
def _forward(module: Callable[..., Any], device: torch.device, autocast: Autocast, inputs: Any) -> Any:
    moved = move(inputs, device)
    dtype = None if autocast is None else getattr(torch, autocast)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if isinstance(moved, Mapping):
            return module(**moved)
        if isinstance(moved, tuple | list):
            return module(*moved)
        return module(moved)


def _logits_of(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    if not isinstance(output, Tensor):
        raise WrongClassCountError(
            f"a teacher gave a {type(output).__qualname__}; a tensor of logits, or an object or mapping with `logits`, "
            "is needed"
        )
    return output
