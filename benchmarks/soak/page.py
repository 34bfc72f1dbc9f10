"""The report as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.load import HOT, HOT_SHARE
from benchmarks.soak.sampling import LOG_FACTOR, STREAM
from benchmarks.soak.trend import ERRORS, FOLLOWING, GROWING, SHOWN, TOLERANCE, Series, Trend

NOTES = f"""\
A straight line is fitted by least squares to the last two thirds of the samples. *Start* and *end* are medians of the
first and the last tenth of them all. A series is **growing** where the line rises, over the measured time, by
{TOLERANCE:.0%} of the mean or more (and by more than a few pieces, a MiB of memory), and by more than
{ERRORS:g} standard errors of its slope, which are widened where neighbouring samples resemble each other. *Seen from*
is the least slope that would have been called growing in this run: what grows more slowly than that was not looked for.

Every account was written to once before the measuring began, so that what is kept for each subject is there already:
about 350 bytes in the nats-server, and the subject's text in the workers. The nats-server also keeps those blocks of
the log in memory that were read lately, and commands to sleeping accounts read all over the log: its
memory **grows with the log** for as long as it grows by less than {LOG_FACTOR:g} bytes for each byte of the stream."""


@dataclass(frozen=True, slots=True)
class Check:
    """A condition that must hold at the end; where `failed` is None, a figure that is only reported."""

    name: str
    finding: str
    failed: bool | None = None


@dataclass(slots=True)
class Report:
    """Everything that a run measured."""

    options: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    series: list[tuple[Series, Trend | None]]
    checks: list[Check]
    measured_s: float
    warm_up_s: float
    commands: int
    date: str
    complaints: list[str] = field(default_factory=list)

    @property
    def growing(self) -> list[str]:
        """Titles of the growing series."""
        return [series.title for series, found in self.series if found is not None and found.verdict == GROWING]

    @property
    def failed(self) -> bool:
        """True if a series grows or a check failed."""
        return bool(self.growing) or any(check.failed for check in self.checks)

    @property
    def judged(self) -> list[tuple[Series, Trend]]:
        """The judged series with their trends."""
        return [(series, found) for series, found in self.series if found is not None and found.verdict != SHOWN]

    @property
    def shown(self) -> list[tuple[Series, Trend]]:
        """The series that are only shown, with their trends."""
        return [(series, found) for series, found in self.series if found is not None and found.verdict == SHOWN]

    def summary(self) -> str:
        """Return the outcome in one line."""
        wrong = [f"growing: {', '.join(self.growing)}"] if self.growing else []
        wrong += [f"{check.name}: {check.finding}" for check in self.checks if check.failed]
        if wrong:
            return "; ".join(wrong)
        if not self.judged:
            return "too few samples to judge anything"
        following = [(series, found) for series, found in self.judged if found.verdict == FOLLOWING]
        if not following:
            return f"nothing grows: {len(self.judged)} series are flat"
        log = next(found for series, found in self.series if found is not None and series.title == STREAM)
        excused = [
            f"the {series.group}'s {series.name} grows with the log, by {found.slope / log.slope:.1f} bytes a byte"
            for series, found in following
        ]
        return f"{len(self.judged) - len(following)} series are flat; {'; '.join(excused)}"

    def subtitle(self) -> str:
        """Return the options of the run in one line."""
        o = self.options
        return (
            f"{self.measured_s / 60:.0f} minutes, {o['rate']:g} commands/s to {o['accounts']:,} accounts, "
            f"{o['workers']} workers with at most {o['max_actors']} live actors each, passivated after {o['idle']:g} s"
        )

    def as_json(self) -> dict[str, Any]:
        """Return everything, with all samples."""
        return {
            "options": self.options,
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions,
            "measured_seconds": round(self.measured_s, 1),
            "warm_up_seconds": round(self.warm_up_s, 1),
            "commands": self.commands,
            "failed": self.failed,
            "growing": self.growing,
            "checks": [{"name": check.name, "finding": check.finding, "failed": check.failed} for check in self.checks],
            "complaints": self.complaints,
            "series": [
                {
                    "group": series.group,
                    "name": series.name,
                    "unit": series.unit,
                    "verdict": found.verdict if found else None,
                    "slope_per_hour": found.slope if found else None,
                    "error_per_hour": found.error if found else None,
                    "seen_from_per_hour": found.seen_from if found else None,
                    "times": series.times,
                    "values": series.values,
                }
                for series, found in self.series
            ],
        }

    def markdown(self, picture: Path | None) -> str:
        """Return the page."""
        o = self.options
        lines = [
            "<!-- made by `python -m benchmarks.soak --markdown docs/soak.md --picture docs/soak.svg`: don't edit -->",
            "# A soak, with evictions all the time",
            "",
            f"**{self.summary()[:1].upper()}{self.summary()[1:]}.**",
            "",
            f"`python -m benchmarks.soak --minutes {o['minutes']:g} --workers {o['workers']}` on {self.date}: "
            f"{self.subtitle()}. {HOT_SHARE:.0%} of the commands go to {HOT} busy accounts, of which one changes each "
            f"second, the others to any account: nearly each of those activates an actor, which is passivated soon "
            f"after. {self.commands:,} commands in all, embedded nats-server, SQLite; a sample each {o['every']:g} s.",
            "",
            "| what | start | end | slope per hour | of the mean | seen from, per hour | verdict |",
            "|---|--:|--:|--:|--:|--:|---|",
        ]
        for series, found in self.judged:
            verdict = f"**{found.verdict}**" if found.verdict == GROWING else found.verdict
            lines.append(f"| {_cells(series, found)} | {shown(found.seen_from)} | {verdict} |")
        lines += ["", NOTES, "", "Shown, not judged: the load itself, and the files, which keep what was written.", ""]
        lines += ["| what | start | end | slope per hour | of the mean |", "|---|--:|--:|--:|--:|"]
        lines += [f"| {_cells(series, found)} |" for series, found in self.shown]
        lines += ["", "| at the end | |", "|---|---|"]
        for check in self.checks:
            lines.append(f"| {check.name} | {'**' + check.finding + '**' if check.failed else check.finding} |")
        if picture is not None:
            lines += ["", f"![every series over time]({picture.name})"]
        for what in ("machine", "versions"):
            facts: dict[str, Any] = getattr(self, what)
            lines += ["", f"{what.title()}: " + ", ".join(f"{name} {value}" for name, value in facts.items())]
        return "\n".join(lines) + "\n"


def _cells(series: Series, found: Trend) -> str:
    return " | ".join(figures(series, found))


def figures(series: Series, found: Trend) -> list[str]:
    """Return name, start, end, slope and relative slope as they are shown."""
    # relative to a mean near zero, any change would look like a multiple
    relative = found.slope / found.mean if abs(found.mean) >= max(series.floor, 0.1) else None
    return [
        series.title,
        shown(found.start),
        shown(found.end),
        shown(found.slope, signed=True),
        "" if relative is None else f"{relative:+.1%}",
    ]


def shown(value: float, *, signed: bool = False) -> str:
    """Return a number with about three digits."""
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return "0" if not text.strip("+-0.") else text
