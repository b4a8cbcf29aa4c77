"""Fidelity for bytes: what a cache keeps of real teachers, beside what other systems keep of them.

``run`` compares kdcache's codecs with other systems' formats, which `peers` writes anew from their published
descriptions, on rows that no codec was fitted to. ``python -m benchmarks.fidelity --help`` says what can be chosen.
"""

from __future__ import annotations

__all__ = ["run"]

from benchmarks.fidelity.runner import run
