"""The time series drawn as plain SVG."""

from __future__ import annotations

from typing import Any

_WIDTH, _HEIGHT, _LEFT, _GAP = 860, 150, 70, 34
_SHADES = {"warm-up": "#f2f2f2", "capacity": "#e8f1fb", "overload": "#fdeaea", "drain": "#eaf7ea"}
_CHARTS = [
    ("commands in each second", [("offered", "#999999"), ("accepted", "#1f77b4"), ("refused", "#d62728")]),
    ("time to answer of the accepted, ms", [("p50_ms", "#1f77b4"), ("p99_ms", "#ff7f0e")]),
    ("commits not yet projected", [("behind", "#9467bd")]),
    ("memory of the service, MiB", [("memory_mib", "#2ca02c")]),
]


def draw(seconds: list[dict[str, Any]]) -> str:
    """Return an SVG with a chart for each group of series, the phases shaded."""
    height = len(_CHARTS) * (_HEIGHT + _GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
    ]
    step = (_WIDTH - _LEFT - 20) / max(len(seconds) - 1, 1)
    for number, (title, series) in enumerate(_CHARTS):
        top = 24 + number * (_HEIGHT + _GAP)
        highest = max(max(second[name] for second in seconds) for name, _ in series) * 1.05 or 1.0
        for place, second in enumerate(seconds):
            x = _LEFT + place * step
            box = f'x="{x:.1f}" y="{top}" width="{step + 0.5:.1f}" height="{_HEIGHT}"'
            parts.append(f'<rect {box} fill="{_SHADES[second["phase"]]}"/>')
        parts.append(f'<text x="{_LEFT}" y="{top - 6}" font-weight="bold">{title}</text>')
        for share in (0.0, 0.5, 1.0):
            y = top + _HEIGHT * (1 - share)
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{highest * share:,.0f}</text>')
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#cccccc"/>')
        for place, (name, color) in enumerate(series):
            points = " ".join(
                f"{_LEFT + n * step:.1f},{top + _HEIGHT * (1 - second[name] / highest):.1f}"
                for n, second in enumerate(seconds)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts.append(
                f'<text x="{_WIDTH - 24}" y="{top + 14 + 15 * place}" text-anchor="end" fill="{color}">{name}</text>'
            )
    x, y = _LEFT, height - 12
    for phase, shade in _SHADES.items():
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{shade}" stroke="#999999"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{phase}</text>')
        x += 110
    return "\n".join([*parts, "</svg>"]) + "\n"
