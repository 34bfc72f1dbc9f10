"""The picture: a small panel for each series, as plain SVG."""

from __future__ import annotations

from html import escape
from math import floor, log10

from benchmarks.soak.trend import FLAT, FOLLOWING, GROWING, SHOWN, Series, Trend

COLUMNS, WIDTH, HEIGHT = 4, 300, 150
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 30, 26
HEAD = 64
COLOURS = {FLAT: "#1f6fb4", GROWING: "#c62828", FOLLOWING: "#b26a00", SHOWN: "#6b7280"}
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;fill:#222}.h{font-size:18px;font-weight:bold}.s{font-size:12px}"
    ".t{font-size:11px;font-weight:bold}.a{font-size:9px;fill:#555}.e{text-anchor:end}.m{text-anchor:middle}"
)


def draw(title: str, subtitle: str, found: list[tuple[Series, Trend | None]]) -> str:
    """Return the picture as SVG."""
    rows = -(-len(found) // COLUMNS)
    width, height = COLUMNS * WIDTH + 20, HEAD + rows * HEIGHT + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text class="h" x="16" y="26">{escape(title)}</text>',
        f'<text class="s" x="16" y="45">{escape(subtitle)}</text>',
    ]
    for number, (series, line) in enumerate(found):
        x, y = 10 + number % COLUMNS * WIDTH, HEAD + number // COLUMNS * HEIGHT
        parts += [f'<g transform="translate({x},{y})">', *_panel(series, line), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(series: Series, found: Trend | None) -> list[str]:
    colour = COLOURS[found.verdict if found else SHOWN]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    begin, end = series.times[0], max(series.times[-1], series.times[0] + 1.0)
    ticks = _ticks(max(*series.values, *([found.line[1][1]] if found else []), 0.0))
    top = ticks[-1]

    def across(seconds: float) -> float:
        return LEFT + (seconds - begin) / (end - begin) * (right - LEFT)

    def down(value: float) -> float:
        return bottom - max(value, 0.0) / top * (bottom - TOP)

    parts = [f'<text class="t" x="{LEFT - 38}" y="18">{escape(series.title)}</text>']
    if found and found.verdict != SHOWN:
        parts.append(f'<text class="a e" x="{right}" y="18" style="fill:{colour}">{found.verdict}</text>')
    for tick in ticks:
        y = down(tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#e3e6ea"/>')
        parts.append(f'<text class="a e" x="{LEFT - 5}" y="{y + 3:.1f}">{tick:,.10g}</text>')
    minutes = end / 60
    step = _step(minutes, 4)
    at = 0.0
    while at <= minutes + 1e-9:
        x = across(max(at * 60, begin))
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 3}" stroke="#888"/>')
        unit = " min" if at + step > minutes + 1e-9 else ""
        parts.append(f'<text class="a m" x="{x:.1f}" y="{bottom + 13}">{at:.10g}{unit}</text>')
        at += step
    parts.append(f'<line x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#888"/>')
    points = " ".join(
        f"{across(at):.1f},{down(value):.1f}" for at, value in zip(series.times, series.values, strict=True)
    )
    parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
    if found is not None and found.verdict != SHOWN:
        (x1, y1), (x2, y2) = found.line
        parts.append(
            f'<line x1="{across(x1):.1f}" y1="{down(y1):.1f}" x2="{across(x2):.1f}" y2="{down(y2):.1f}" '
            'stroke="#111" stroke-width="1" stroke-dasharray="4 3"/>'
        )
    return parts


def _ticks(highest: float) -> list[float]:
    """Return round values from 0 to just above the highest."""
    step = _step(highest or 1.0, 3)
    count = 1
    while count * step < highest * 1.04:
        count += 1
    return [round(number * step, 10) for number in range(count + 1)]


def _step(extent: float, parts: int) -> float:
    rough = extent / parts
    power = 10.0 ** floor(log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
