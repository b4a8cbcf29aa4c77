"""Reports: what came out of training, as figures read back from disk and as pictures."""

from __future__ import annotations

__all__ = ["Bar", "RatePoints", "bars", "check_picture", "rate_curves", "read_metrics", "student_curves"]

from kdcache.report.metrics import read_metrics
from kdcache.report.pictures import Bar, bars, student_curves
from kdcache.report.rates import RatePoints, check_picture, rate_curves
