"""Formats that other systems keep soft targets in, written anew from their published descriptions.

Each class keeps what its original keeps, in a container of the original's kind, and reads it at a temperature as the
original's training code does. They are the other side of the comparison, not parts of kdcache.
"""

from __future__ import annotations

__all__ = ["DistillKit", "Kept", "MlDr", "Peer", "RandomSampling", "ResidualBin", "TinyViT"]

from benchmarks.fidelity.peers.base import Kept, Peer
from benchmarks.fidelity.peers.distillkit import DistillKit, ResidualBin
from benchmarks.fidelity.peers.ml_dr import MlDr
from benchmarks.fidelity.peers.random_sampling import RandomSampling
from benchmarks.fidelity.peers.tinyvit import TinyViT
