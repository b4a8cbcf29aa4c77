"""Benchmarks: what kdcache costs, side by side with doing without it, in one run.

``python -m benchmarks`` runs them all; ``python -m benchmarks NAME ...`` some. Every figure is the median of repeated,
interleaved runs with one torch thread; ratios travel better between machines than seconds do.

``python -m benchmarks.students`` stands apart: it trains students for half an hour, and what it measures is what they
have learnt.
"""
