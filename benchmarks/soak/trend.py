"""Judging growth: a straight line through the samples, and the error of its slope."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt
from statistics import fmean, median

FITTED = 2 / 3
"""The last part of the measured time that is fitted: caches that fill up at the beginning are not growth."""
TOLERANCE = 0.05
"""Relative to the mean, a change over the measured time below this is not growth."""
ERRORS = 3.0
"""Growth of fewer standard errors could be chance: of some thirty series, one passes two now and then."""
LEAST = 6
"""Fewest samples that a line is fitted to."""
FLAT, GROWING, FOLLOWING, SHOWN = "flat", "growing", "grows with the log", "shown"


@dataclass(slots=True)
class Series:
    """One quantity, sampled again and again.

    Attributes:
        group: its owner or its source.
        judged: whether it must not grow.
        follows: title of a series that this one may grow with, and how many times as fast at most.
        floor: a change over the measured time below this is not growth, whatever the mean: one open file, say.
        times: seconds since the measuring began.
    """

    group: str
    name: str
    unit: str = ""
    judged: bool = True
    floor: float = 0.0
    follows: tuple[str, float] | None = None
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its name in a list of all series."""
        return f"{self.group}: {self.name}" + (f", {self.unit}" if self.unit else "")


@dataclass(frozen=True, slots=True)
class Trend:
    """The trend of a series.

    Attributes:
        start, end: medians of the first and the last tenth.
        mean: of the fitted part.
        slope: per hour.
        error: standard error of the slope, per hour.
        seen_from: least slope per hour that would have been called growing.
        line: the fitted line's ends, as (seconds, value).
    """

    start: float
    end: float
    mean: float
    slope: float
    error: float
    seen_from: float
    verdict: str
    line: tuple[tuple[float, float], tuple[float, float]]


def judge(series: list[Series]) -> list[tuple[Series, Trend | None]]:
    """Return every series with its trend."""
    judged = [(curve, trend(curve)) for curve in series]
    slopes = {curve.title: line.slope for curve, line in judged if line is not None}
    for place, (curve, line) in enumerate(judged):
        if curve.follows is not None and line is not None and line.verdict == GROWING:
            leader, times = curve.follows
            if line.slope <= times * slopes.get(leader, 0.0):
                judged[place] = (curve, replace(line, verdict=FOLLOWING))
    return judged


def trend(series: Series) -> Trend | None:
    """Fit a line to the last two thirds of a series; None where there are too few samples."""
    times, values = series.times, series.values
    if len(times) < 2:
        return None
    begin, end = times[0], times[-1]
    fitted = [(at, value) for at, value in zip(times, values, strict=True) if at >= end - (end - begin) * FITTED]
    if len(fitted) < LEAST:
        return None
    middle, mean = fmean(at for at, _ in fitted), fmean(value for _, value in fitted)
    spread = sum((at - middle) ** 2 for at, _ in fitted)
    slope = sum((at - middle) * (value - mean) for at, value in fitted) / spread
    residuals = [value - mean - slope * (at - middle) for at, value in fitted]
    error = _standard_error(residuals, spread)
    hours = (end - begin) / 3600
    least = max(TOLERANCE * abs(mean), series.floor) / hours
    seen_from = max(least, ERRORS * error * 3600)
    growing = slope * 3600 >= least and slope > ERRORS * error
    tenth = max(1, len(values) // 10)
    first, last = fitted[0][0], fitted[-1][0]
    return Trend(
        start=median(values[:tenth]),
        end=median(values[-tenth:]),
        mean=mean,
        slope=slope * 3600,
        error=error * 3600,
        seen_from=seen_from,
        verdict=SHOWN if not series.judged else GROWING if growing else FLAT,
        line=((first, mean + slope * (first - middle)), (last, mean + slope * (last - middle))),
    )


def _standard_error(residuals: list[float], spread: float) -> float:
    """Return the slope's standard error, wider where neighbouring samples are alike, as memory's are."""
    squares = sum(residual * residual for residual in residuals)
    if squares < 1e-18:
        return 0.0
    alike = sum(earlier * later for earlier, later in pairwise(residuals)) / squares
    alike = min(max(alike, 0.0), 0.9)
    return sqrt(squares / (len(residuals) - 2) / spread * (1 + alike) / (1 - alike))
