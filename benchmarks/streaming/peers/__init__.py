"""Packages that a user would pick to stream rows, each in the form that its documentation recommends."""

from __future__ import annotations

__all__ = ["PACKAGES"]

from typing import Final

from benchmarks.streaming.contestant import Contestant
from benchmarks.streaming.peers.h5 import H5PY
from benchmarks.streaming.peers.huggingface import DATASETS
from benchmarks.streaming.peers.lance import LANCE
from benchmarks.streaming.peers.lightning import LITDATA
from benchmarks.streaming.peers.mosaic import MOSAIC
from benchmarks.streaming.peers.parquet import PARQUET
from benchmarks.streaming.peers.tensor_store import TENSORSTORE
from benchmarks.streaming.peers.web import WEBDATASET

PACKAGES: Final[tuple[Contestant, ...]] = (
    *LITDATA,
    *MOSAIC,
    *DATASETS,
    *H5PY,
    *PARQUET,
    *WEBDATASET,
    *TENSORSTORE,
    *LANCE,
)
"""In the order of the tables."""
