"""Does something grow over time, or does it only vary?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, linear_regression

SURE = 2.0
"""Standard errors; a slope that lies closer to nothing than this is noise."""


@dataclass(frozen=True)
class Trend:
    """A straight line through values over time.

    Attributes:
        per_hour: Its slope.
        error_per_hour: The slope's standard error.
        span_s: How long the values were watched.
    """

    per_hour: float
    error_per_hour: float
    span_s: float

    @property
    def sure_growth(self) -> float:
        """By how much the values grew within the span at least, 0 where that may be noise."""
        slope = max(0.0, self.per_hour - SURE * self.error_per_hour)
        return slope * self.span_s / 3600

    def text(self, digits: int = 0) -> str:
        return f"{self.per_hour:+,.{digits}f} ± {SURE * self.error_per_hour:,.{digits}f}"


def trend_of(at_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Fit a line; of fewer than three values nothing can be said, and the trend is none."""
    span_s = at_s[-1] - at_s[0] if at_s else 0.0
    if len(at_s) < 3 or span_s <= 0:
        return Trend(0.0, 0.0, span_s)
    slope, start = linear_regression(at_s, values)
    middle = fmean(at_s)
    spread = sum((at - middle) ** 2 for at in at_s)
    residuals = (value - (start + slope * at) for at, value in zip(at_s, values, strict=True))
    variance = sum(residual**2 for residual in residuals) / (len(at_s) - 2)
    return Trend(slope * 3600, sqrt(variance / spread) * 3600, span_s)
