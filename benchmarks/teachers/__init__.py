"""Real teachers and real inputs that come inside packages, and what the teachers said, recorded once.

``load(name, kind=...)`` opens a recording and makes it on first use; the modules `smollm2`, `efficientnet` and `ppocr`
give the living networks and their inputs. Recordings lie in benchmarks/.cache, each with the recipe it was made from.
"""

from __future__ import annotations

__all__ = ["NAMES", "Head", "Recorded", "efficientnet", "load", "ppocr", "smollm2"]

from collections.abc import Callable
from typing import Final

from benchmarks.teachers import efficientnet, ppocr, smollm2
from benchmarks.teachers.recorded import Head, Kind, Recorded

_LOADERS: Final[dict[str, Callable[[Kind], Recorded]]] = {
    "smollm2": smollm2.load,
    "ppocr": ppocr.load,
    "efficientnet-lite0": lambda kind: efficientnet.load("lite0", kind),
    "efficientnet-lite1": lambda kind: efficientnet.load("lite1", kind),
    "efficientnet-lite2": lambda kind: efficientnet.load("lite2", kind),
}
NAMES: Final = tuple(_LOADERS)


def load(name: str, *, kind: Kind = "main") -> Recorded:
    """Open what a teacher said about its main inputs, or about ones of another kind; record it on first use.

    Parameters
    ----------
    name
        One of `NAMES`.
    kind
        "main": the inputs a codec is tuned on; "other": inputs unlike them, to see what then happens.

    Raises
    ------
    SystemExit
        A package is missing, with the command that installs it; or the name or kind is unknown.
    """
    if name not in _LOADERS:
        raise SystemExit(f"there is no teacher {name!r}; there are {', '.join(NAMES)}")
    if kind not in {"main", "other"}:
        raise SystemExit(f"there is no kind {kind!r} of inputs; there are main and other")
    return _LOADERS[name](kind)
