"""Does it grow? A straight line through the samples, and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt
from statistics import fmean, median

FITTED = 2 / 3
"""Of the measured time, its last part: what fills up at the beginning, caches for instance, is no growth."""
TOLERANCE = 0.05
"""Growth over the measured time, relative to the mean, that is no growth yet."""
ERRORS = 3.0
"""Growth of fewer standard errors could be chance: of some thirty series, one passes two now and then."""
LEAST = 6
"""A line through fewer samples says nothing."""
FLAT, GROWING, FOLLOWING, SHOWN = "flat", "growing", "grows with the log", "shown"


@dataclass(slots=True)
class Series:
    """One thing that was looked at again and again.

    Attributes:
        group: whose it is, or where it comes from.
        judged: whether it must not grow.
        follows: title of a series that this one may grow with, and how many times as fast at most.
        floor: growth over the measured time that is no growth yet, whatever the mean: a single file more, say.
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
        """What it is called where all are listed."""
        return f"{self.group}: {self.name}" + (f", {self.unit}" if self.unit else "")


@dataclass(frozen=True, slots=True)
class Trend:
    """What became of a series.

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
    found = [(one, trend(one)) for one in series]
    slopes = {one.title: line.slope for one, line in found if line is not None}
    for place, (one, line) in enumerate(found):
        if one.follows is not None and line is not None and line.verdict == GROWING:
            other, times = one.follows
            if line.slope <= times * slopes.get(other, 0.0):
                found[place] = (one, replace(line, verdict=FOLLOWING))
    return found


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
    squares = sum(one * one for one in residuals)
    if squares < 1e-18:
        return 0.0
    alike = sum(one * other for one, other in pairwise(residuals)) / squares
    alike = min(max(alike, 0.0), 0.9)
    return sqrt(squares / (len(residuals) - 2) / spread * (1 + alike) / (1 - alike))
