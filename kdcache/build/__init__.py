"""Building: run teachers over a transfer set and publish their logits as a cache.

A *plan* is everything that decides which bytes are written. The *pilot* is the rows a codec is fitted on. A *task* is
one teacher's logits for one shard. An *executor* runs tasks. *Finalising* writes complete.json, last.
"""

from __future__ import annotations

__all__ = [
    "BuildProgress",
    "CacheStatus",
    "Comparison",
    "Forecast",
    "ModuleTeacher",
    "SourcedTeacher",
    "Teacher",
    "TeacherComparison",
    "TeacherForecast",
    "TeacherStatus",
    "TeacherWithHead",
    "build_cache",
    "build_job",
    "compare_job",
    "compare_with_teachers",
    "plan_cache",
    "plan_job",
    "read_status",
    "weights_digest",
]

from kdcache.build.builder import BuildProgress, build_cache, plan_cache
from kdcache.build.comparison import Comparison, TeacherComparison, compare_job, compare_with_teachers
from kdcache.build.headed import TeacherWithHead
from kdcache.build.job import build_job, plan_job
from kdcache.build.pilot import Forecast, TeacherForecast
from kdcache.build.status import CacheStatus, TeacherStatus, read_status
from kdcache.build.teachers import ModuleTeacher, SourcedTeacher, Teacher, weights_digest
