"""Students: many of them trained side by side from one cache, with no teacher in sight.

A *sweep* is a set of students of one architecture that differ in temperature, soft weight and seed. Its *line-up* lists
them. They run *side by side*: every batch is read, decoded and softened once for all of them.
"""

from __future__ import annotations

__all__ = [
    "BiasCorrection",
    "Evaluation",
    "Progress",
    "Scores",
    "StudentResult",
    "StudentSettings",
    "line_up",
    "match_class_frequencies",
    "train_job",
    "train_sweep",
]

from kdcache.students.bias import match_class_frequencies
from kdcache.students.correction import BiasCorrection
from kdcache.students.evaluation import Evaluation, Scores
from kdcache.students.job import train_job
from kdcache.students.lineup import StudentSettings, line_up
from kdcache.students.results import StudentResult
from kdcache.students.sweep import Progress, train_sweep
