"""What every codec offers, and the decoder that a reader carries."""

from __future__ import annotations

__all__ = [
    "BLOCK_ELEMENTS",
    "TORCH_DTYPES",
    "Codec",
    "Decoder",
    "LogitCodec",
    "MeasuringCodec",
    "StorageDtype",
    "block_elements",
    "check_codes",
    "check_logits",
    "check_num_classes",
    "check_row_values",
    "checked_temperature",
    "parameters_to",
    "row_blocks",
    "rows_of_codes",
]

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from kdcache.codecs.head_logits import HeadLogits, Logits
from kdcache.codecs.row_errors import RowErrors
from kdcache.documents.codec_specs import CodecSpec
from kdcache.errors import CodecError, NonFiniteLogitsError, ShapeError, TemperatureError, WrongClassCountError

StorageDtype = Literal["uint8", "uint16", "float16", "float32"]
"""Types of the stored codes: those every Zarr reader knows."""

TORCH_DTYPES: Mapping[StorageDtype, torch.dtype] = {
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""The torch type of each stored type."""

BLOCK_ELEMENTS = 2**18
"""Elements worked on at a time: few enough for the temporaries to stay within a processor's cache."""

BLOCK_ELEMENTS_ON_DEVICE = 2**26
"""The same on an accelerator, where a step over few elements takes no less time than one over many."""


class Codec(Protocol):
    """Logits to codes and back; a frozen object without state and without I/O.

    A logit of -inf is a *masked class*: probability exactly 0 at every temperature. Every codec keeps it as such.

    Every method works on the device of the tensors it is given, and keeps its memory bounded by working on blocks of
    rows where it needs more than its result.
    """

    @property
    def spec(self) -> CodecSpec:
        """The document this codec was made from."""

    @property
    def num_classes(self) -> int:
        """Classes of a row of logits."""

    @property
    def num_columns(self) -> int:
        """Columns of a row of codes."""

    @property
    def storage_dtype(self) -> StorageDtype:
        """Type of the codes."""

    @property
    def fill(self) -> float:
        """Reserved code of a hole: never written for a row that exists (int for integer codes)."""

    @property
    def depends_on_temperature(self) -> bool:
        """Whether `decode` gives other logits at every temperature; if not, it ignores the temperature."""

    @property
    def is_normalised(self) -> bool:
        """Whether decoded / temperature are log-weights, -inf for classes not kept, whose weights are right on average.

        They are used as they are: a softmax over them would make them biased. Where this is False, decoded are logits,
        and their softmax at the temperature are the soft targets.
        """

    def fit(self, pilot: Float[Tensor, "row class"]) -> dict[str, npt.NDArray[Any]]:
        """Fit the parameters to the pilot's logits; deterministic, and the pilot may lie on any device.

        Raises
        ------
        CodecError
            The pilot is empty or cannot be coded at all.
        NonFiniteLogitsError
            The pilot holds NaN, +inf, or a row of nothing but -inf.
        ShapeError, WrongClassCountError
            The pilot is no [row, class] array of this codec's classes.
        """

    def check_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that are not of this codec.

        Raises
        ------
        CodecError
            A parameter is missing, surplus, or has another shape, dtype or value than this codec writes.
        """

    def prepare(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the parameters as `decode` works on them fastest; it takes them prepared or not."""

    def prepare_to_encode(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the parameters as `encode` works on them fastest; it takes them prepared or not."""

    def encode(
        self, logits: Float[Tensor, "row class"], parameters: Mapping[str, Tensor]
    ) -> Shaped[Tensor, "row column"]:
        """Encode logits, on their device, into codes of type `storage_dtype`.

        Raises
        ------
        CodecError
            The logits cannot be held within what the codec promises.
        NonFiniteLogitsError
            A logit is NaN or +inf, or all of a row are -inf; the message names the row.
        ShapeError, WrongClassCountError
            The logits are no [row, class] array of this codec's classes.
        """

    def decode(
        self, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor], *, temperature: float = 1.0
    ) -> Float[Tensor, "row class"]:
        """Decode codes, on their device, into float32 logits that may be shifted by a number of their row's own.

        `temperature` is the one at which they will be softened; see `depends_on_temperature` and `is_normalised`.

        A masked class is -inf again.

        Raises
        ------
        CodecError
            The codes have another dtype than `storage_dtype`.
        ShapeError
            The codes have another number of columns.
        TemperatureError
            The codec depends on the temperature, which is not a finite number above 0.
        """

    def is_fill(self, codes: Shaped[Tensor, "row column"]) -> Bool[Tensor, " row"]:
        """Tell for each row whether it holds the reserved fill code in any column."""


class LogitCodec:
    """What codecs have in common whose decoded logits serve every temperature, and whose parameters need no preparing.

    A codec that works faster on other parameters overrides how they are prepared.
    """

    @property
    def depends_on_temperature(self) -> bool:
        """False: the logits serve every temperature."""
        return False

    @property
    def is_normalised(self) -> bool:
        """False: decoded logits are softened by a softmax."""
        return False

    def prepare(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the parameters as they are."""
        return parameters

    def prepare_to_encode(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Give the parameters as they are."""
        return parameters


@runtime_checkable
class MeasuringCodec(Protocol):
    """A codec that measures what it changes while it encodes, and takes hidden states with a head for logits."""

    def encode_measured(
        self, logits: Logits, parameters: Mapping[str, Tensor]
    ) -> tuple[Shaped[Tensor, "row column"], RowErrors]:
        """Encode as `Codec.encode` does, and say of every row what that changed."""
        ...

    def row_errors(
        self, logits: Logits, codes: Shaped[Tensor, "row column"], parameters: Mapping[str, Tensor]
    ) -> RowErrors:
        """Say of every row what these codes of it change."""
        ...


@dataclass(frozen=True, eq=False)
class Decoder:
    """A codec and its parameters: all that turns codes into logits.

    The form in which the codec works on its parameters fastest is made once, when it is first needed, and shared by
    `decode` and `encode` and by all threads: a wide basis stands in memory once as it is stored and once as it is used.
    Within `torch.compile` it is made in the graph, in every call, unless `decode`, or `to` another device,
    made it before.

    Parameters
    ----------
    codec : Codec
        The codec that made the codes.
    parameters : Mapping[str, Tensor]
        Its parameters, on one device; see `parameters_to`.

    Raises
    ------
    CodecError
        The parameters are not of this codec.
    """

    codec: Codec
    parameters: Mapping[str, Tensor] = field(repr=False)
    _moved: dict[torch.device, Decoder] = field(default_factory=dict, init=False, repr=False)
    _prepared: dict[str, Mapping[str, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.codec.check_parameters(self.parameters)

    def __reduce__(self) -> tuple[type[Decoder], tuple[Codec, dict[str, Tensor]]]:
        return type(self), (self.codec, dict(self.parameters))

    def decode(self, codes: Shaped[Tensor, "row column"], *, temperature: float = 1.0) -> Float[Tensor, "row class"]:
        """Decode codes into float32 logits, to be softened at `temperature`; see `Codec.decode`."""
        return self.codec.decode(codes, self._to_decode(), temperature=temperature)

    def encode(self, logits: Float[Tensor, "row class"]) -> Shaped[Tensor, "row column"]:
        """Encode logits with these parameters; see `Codec.encode`."""
        return self.codec.encode(logits, self._to_encode())

    def encode_measured(self, logits: Logits) -> tuple[Shaped[Tensor, "row column"], RowErrors | None]:
        """Encode logits, and say of every row what that changed, where the codec knows it from encoding.

        Parameters
        ----------
        logits : Tensor [row, class] or HeadLogits
            HeadLogits for a `MeasuringCodec` alone.

        Raises
        ------
        CodecError, NonFiniteLogitsError, ShapeError, WrongClassCountError
            As of `Codec.encode`.
        TypeError
            The codec needs logits that are made.
        """
        if isinstance(self.codec, MeasuringCodec):
            return self.codec.encode_measured(logits, self._to_encode())
        if isinstance(logits, HeadLogits):
            raise TypeError(f"{type(self.codec).__name__} needs logits that are made, got hidden states and a head")
        return self.encode(logits), None

    def row_errors(self, logits: Logits, codes: Shaped[Tensor, "row column"]) -> RowErrors | None:
        """Say of every row what these codes of it change; None where the codec is no `MeasuringCodec`."""
        if isinstance(self.codec, MeasuringCodec):
            return self.codec.row_errors(logits, codes, self._to_encode())
        return None

    def to(self, device: torch.device | str) -> Decoder:
        """Give this decoder with its parameters on `device`, ready to decode there.

        The copy is made once for each device and kept, so that moving every batch costs nothing.
        """
        target = torch.device(device)
        if all(value.device == target for value in self.parameters.values()):
            return self
        if target not in self._moved:
            with self._lock:
                if target not in self._moved:
                    self._moved[target] = self._copy_on(target)
        return self._moved[target]

    def _to_decode(self) -> Mapping[str, Tensor]:
        if "decode" in self._prepared:
            return self._prepared["decode"]
        if torch.compiler.is_compiling():  # nothing can be kept from within a graph
            return self.codec.prepare(self.parameters)
        with self._lock:
            if "decode" not in self._prepared:
                self._prepared["decode"] = self.codec.prepare(self.parameters)
            return self._prepared["decode"]

    def _to_encode(self) -> Mapping[str, Tensor]:
        with self._lock:
            if "encode" not in self._prepared:  # from what `decode` works on, so that the two share what is large
                self._prepared["encode"] = self.codec.prepare_to_encode(self._to_decode())
            return self._prepared["encode"]

    def _copy_on(self, device: torch.device) -> Decoder:
        # made without __init__: the parameters are checked already, and a check would wait for the device
        moved = object.__new__(Decoder)
        parameters = parameters_to(self.parameters, device)
        values = {
            "codec": self.codec,
            "parameters": parameters,
            "_moved": {},
            "_prepared": {},
            "_lock": threading.RLock(),
        }
        for name, value in values.items():
            object.__setattr__(moved, name, value)
        moved._to_decode()
        return moved


def parameters_to(
    parameters: Mapping[str, Tensor] | Mapping[str, npt.NDArray[Any]], device: torch.device | str
) -> dict[str, Tensor]:
    """Put a codec's parameters, arrays or tensors, onto a device.

    Parameters
    ----------
    parameters : mapping of str to numpy.ndarray or Tensor
        As `Codec.fit` gives them or a cache stores them. Arrays are copied.
    device : torch.device or str
        Where the logits or codes lie.
    """
    tensors = {
        name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        for name, value in parameters.items()
    }
    return {name: value.to(device) for name, value in tensors.items()}


def block_elements(device: torch.device) -> int:
    """Give how many elements are worked on at a time on a device."""
    return BLOCK_ELEMENTS if device.type == "cpu" else BLOCK_ELEMENTS_ON_DEVICE


def row_blocks(num_rows: int, num_columns: int, *, max_elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Cut rows into consecutive blocks of at most `max_elements` elements, one row at least."""
    step = max(1, max_elements // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def rows_of_codes(codes: Shaped[Tensor, "row column"], rows: Tensor) -> Shaped[Tensor, "row column"]:
    """Take some rows of codes, by their numbers; torch indexes no uint16."""
    return codes.view(torch.int16)[rows].view(torch.uint16) if codes.dtype == torch.uint16 else codes[rows]


def checked_temperature(temperature: float | Tensor) -> float:
    """Give the temperature as a float, or raise a `TemperatureError` unless it is a finite number above 0."""
    if type(temperature) is float and 0 < temperature < math.inf:  # as nearly always, and in every loss
        return temperature
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        raise TemperatureError(f"One temperature at a time: got a tensor of shape {tuple(temperature.shape)}.")
    try:
        value = math.nan if _is_no_number(temperature) else float(temperature)
    except (TypeError, ValueError) as error:
        raise TemperatureError(f"A temperature must be a finite number above 0, got {temperature!r}.") from error
    if not 0 < value < math.inf:  # so written for compilers, to whom isfinite is a tensor's
        raise TemperatureError(f"A temperature must be a finite number above 0, got {temperature!r}.")
    return value


def _is_no_number(value: object) -> bool:
    """Tell whether `float` would take a value that is no number: a truth value or a text."""
    return isinstance(value, bool | np.bool_ | str | bytes) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def check_num_classes(num_classes: int) -> None:
    """Refuse a class count below 1 with a `CodecError`."""
    if num_classes < 1:
        raise CodecError(f"A codec needs at least 1 class, got num_classes={num_classes}.")


def check_logits(logits: Logits, num_classes: int) -> None:
    """Refuse anything but floating-point [row, class] logits of `num_classes` classes."""
    if logits.ndim != 2:
        raise ShapeError(
            f"Logits must have the axes [row, class], got shape {tuple(logits.shape)}. "
            "Flatten views and positions into rows first."
        )
    if not logits.is_floating_point():
        raise CodecError(f"Logits must be floating-point numbers, got {logits.dtype}.")
    if logits.shape[1] != num_classes:
        raise WrongClassCountError(f"The codec is made for {num_classes} classes, the logits have {logits.shape[1]}.")


def check_row_values(logits: Tensor, *, first_row: int = 0) -> None:
    """Refuse NaN, +inf and rows without a finite logit; -inf beside a finite logit is a masked class.

    Parameters
    ----------
    logits : Tensor [row, class]
        Of any floating-point type, with at least one class.
    first_row : int, default 0
        What the first row is called in the message, where the logits are a block of a batch.

    Raises
    ------
    NonFiniteLogitsError
        The message names the row.
    """
    is_bad = logits.amax(dim=1).isfinite().logical_not()  # a maximum is finite unless the row holds NaN or +inf
    if bool(is_bad.any()):
        row = int(is_bad.nonzero()[0, 0])
        held = "nothing but -inf" if bool(logits[row].isneginf().all()) else "NaN or +inf"
        raise NonFiniteLogitsError(
            f"Row {first_row + row} of the logits holds {held}, which has no soft targets. Mask classes with -inf, and "
            "leave at least one finite logit in a row."
        )


def check_codes(codes: Tensor, codec: Codec) -> None:
    """Refuse codes that have another shape or dtype than the codec writes."""
    if codes.ndim != 2 or codes.shape[1] != codec.num_columns:
        raise ShapeError(
            f"Codes of this codec have the shape [row, {codec.num_columns}], got {tuple(codes.shape)}. "
            "They belong to another teacher or another codec."
        )
    expected = TORCH_DTYPES[codec.storage_dtype]
    if codes.dtype != expected:
        raise CodecError(f"Codes of this codec are stored as {expected}, got {codes.dtype}.")
