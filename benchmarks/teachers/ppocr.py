"""PP-OCRv6 small: a recogniser of printed lines, 18,710 characters a frame of eight pixels (Apache-2.0).

It is trained with connectionist temporal classification: most frames are blank, class 0, with great confidence. Its
graph ends in a softmax; the logits before that are read out of the graph, and so is the input of the last layer.
"""

from __future__ import annotations

__all__ = ["Network", "characters", "lines", "load", "network", "pictures", "read"]

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.teachers.lines import PACKAGES, WIDTH, line_pictures
from benchmarks.teachers.packages import file_of_package, require
from benchmarks.teachers.recorded import Head, Kind, Recorded
from benchmarks.teachers.recordings import Recipe, progress, recorded_arrays

NUM_CLASSES: Final = 18_710
NUM_LINES: Final = {"main": 120, "other": 40}  # of 50 frames each

_FILE: Final = "models/PP-OCRv6_rec_small.onnx"
_SHA256: Final = "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"
_PACKAGE: Final = {"PyPI rapidocr 3.10.0": _SHA256, "PyPI onnxruntime 1.32.0": ""}
_LOGITS: Final = "p2o.pd_op.add.79.0"
_HIDDEN: Final = "p2o.pd_op.transpose.8.0"
_WEIGHT: Final = "linear_8.w_0"
_BIAS: Final = "linear_8.b_0"


class Network(nn.Module):
    """The recogniser as a module; its graph runs in ONNX Runtime, on processors, without gradients.

    Attributes
    ----------
    head
        The last linear layer: weight float32 [class, component], bias float32 [class].
    """

    def __init__(self, session: Any, head: Head) -> None:
        super().__init__()
        self._session = session
        self.head = head

    def hidden(self, images: Float[Tensor, "line 3 height width"]) -> Float[Tensor, "line frame component"]:
        """Give the input of the last linear layer."""
        return self.hidden_and_logits(images)[0]

    def forward(self, images: Float[Tensor, "line 3 height width"]) -> Float[Tensor, "line frame class"]:
        """Give the logits of every frame."""
        return self.hidden_and_logits(images)[1]

    def hidden_and_logits(self, images: Float[Tensor, "line 3 height width"]) -> tuple[Tensor, Tensor]:
        """Give the input of the last linear layer [line, frame, component] and the logits [line, frame, class]."""
        hidden, logits = self._session.run([_HIDDEN, _LOGITS], {"x": images.numpy()})
        return torch.from_numpy(hidden), torch.from_numpy(logits)


def network() -> Network:
    """Give the recogniser, ready for inference, with as many threads as torch has now.

    Raises
    ------
    SystemExit
        A package is missing, or the model is not the one expected.
    """
    onnx, runtime = require("onnx"), require("onnxruntime")
    model = _model()
    weights = {
        one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer if one.name.startswith("linear_8")
    }
    for name in (_HIDDEN, _LOGITS):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    head = Head(torch.from_numpy(weights[_WEIGHT].T.copy()), torch.from_numpy(weights[_BIAS].copy()))
    return Network(session, head)


def characters() -> list[str]:
    """Give what each class stands for: class 0 is the blank, the last one a space."""
    (listed,) = (entry.value for entry in _model().metadata_props if entry.key == "character")
    return ["", *listed.split("\n")[: NUM_CLASSES - 2], " "]


def read(logits: Float[Tensor, "frame class"], written: list[str]) -> str:
    """Read a line off its frames: the best class of each, repetitions taken once, blanks left out.

    Examples
    --------
    >>> read(torch.eye(3)[[1, 1, 0, 1, 2]], ["", "o", "h"])
    'ooh'
    """
    best = logits.argmax(1).unique_consecutive()
    return "".join(written[one] for one in best.tolist())


def lines(kind: Kind) -> list[str]:
    """Give what is written in the recorded lines of a kind."""
    return line_pictures(kind, NUM_LINES[kind])[0]


def pictures(kind: Kind) -> Float[Tensor, "line 3 height width"]:
    """Give the recorded lines of a kind as float32 [line, 3, 48, 400], -1 to 1."""
    return line_pictures(kind, NUM_LINES[kind])[1]


def load(kind: Kind) -> Recorded:
    """Open the recording of a kind, 50 rows a line; make it on first use.

    The logits are those of the graph, in float32, mapped from a file.
    """
    recipe = _recipe(kind, PACKAGES[kind], num_lines=NUM_LINES[kind], width=WIDTH, seed=0)
    arrays = recorded_arrays(recipe, lambda: _record(kind))
    head = recorded_arrays(_recipe("head", {}), _record_head)
    return Recorded(
        name="ppocr",
        kind=kind,
        num_classes=NUM_CLASSES,
        example_index=torch.from_numpy(arrays["example_index"]),
        hidden=torch.from_numpy(arrays["hidden"]),
        head=Head(torch.from_numpy(head["weight"]), torch.from_numpy(head["bias"])),
        stored_logits=torch.from_numpy(arrays["logits"]),
    )


def _record(kind: Kind) -> dict[str, npt.NDArray[Any]]:
    teacher = network()
    shown = pictures(kind).split(1)  # one at a time, as the recogniser is used
    answers = [teacher.hidden_and_logits(picture) for picture in progress(shown, len(shown), f"PP-OCR, {kind}")]
    hidden = torch.cat([one for one, _ in answers])
    return {
        "hidden": hidden.flatten(0, 1).numpy(),
        "logits": torch.cat([one for _, one in answers]).flatten(0, 1).numpy(),
        "example_index": np.repeat(np.arange(len(hidden)), hidden.shape[1]),
    }


def _record_head() -> dict[str, npt.NDArray[Any]]:
    weight, bias = network().head
    if bias is None:
        raise TypeError("expected a bias in the last linear layer")
    return {"weight": weight.numpy(), "bias": bias.numpy()}


def _recipe(what: str, sources: dict[str, str], **settings: int) -> Recipe:
    return Recipe(teacher="ppocr", what=what, version=1, packages=_PACKAGE | sources, settings=settings)


def _model() -> Any:
    return require("onnx").load(str(file_of_package("rapidocr", _FILE, sha256=_SHA256)))
