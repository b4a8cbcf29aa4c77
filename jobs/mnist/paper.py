"""The paper's figures: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 3, and table 5 for 3% of the data."""

from __future__ import annotations

from typing import Final

TEACHER_ERRORS: Final = 67
HARD_ERRORS: Final = 146
SOFT_ERRORS: Final = 74

BEST_TEMPERATURES: Final = (2.5, 4.0)
"""With 30 units a layer; "significantly better than higher or lower"."""
LEVEL_ABOVE: Final = 8.0
"""With 300 or more units a layer, "all temperatures above 8 gave fairly similar results"."""

WITHOUT_3_ERRORS: Final = (206, 109)
"""All test errors, before and after the bias of class 3 was raised."""
WITHOUT_3_ERRORS_ON_3: Final = (133, 14)
WITHOUT_3_BIAS: Final = 3.5

ONLY_7_8_ERROR_PERCENT: Final = (47.3, 13.2)
ONLY_7_8_BIAS: Final = -7.6

SPEECH_ALL_HARD_ACCURACY_PERCENT: Final = 58.9
SPEECH_3_PERCENT_HARD_ACCURACY_PERCENT: Final = 44.5
SPEECH_3_PERCENT_SOFT_ACCURACY_PERCENT: Final = 57.0
