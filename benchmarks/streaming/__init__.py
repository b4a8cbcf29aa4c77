"""Streaming: what it costs to read soft targets into training, from kdcache and from what users would pick instead.

``python -m benchmarks.streaming`` runs all parts and writes docs/streaming.md from the figures; ``--quick`` is a look
at a fifth of the rows. A *contestant* stores the rows of a *row set* in its own way and gives them back shuffled, in
batches; each lives in a process of its own, and all take turns.
"""
