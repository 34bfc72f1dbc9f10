"""Reports for the reader of many runs."""

from __future__ import annotations

from collections.abc import Sequence

from tests.faults.ending import Result


def describe(result: Result) -> list[str]:
    """Return the lines about one run."""
    commands = result.commands
    lines = [
        f"seed {result.seed} on {result.database}, {result.workers or 'no'} workers, {result.seconds:.0f} s",
        "  faults    " + ", ".join(f"{count} {kind}" for kind, count in sorted(result.faults.items())),
        "  kills     " + ", ".join(f"{count} {victim}" for victim, count in sorted(result.kills.items())),
        "  injected  " + ", ".join(f"{count} {what}" for what, count in sorted(result.injected.items())),
        f"  commands  {sum(commands.values())} in {result.sendings} sendings: {commands['acknowledged']} acknowledged, "
        f"{commands['refused']} refused, {commands['unknown']} unknown",
        f"  events    {result.events}; {result.letters} dead letters, {result.garbage} pieces of garbage; "
        f"{result.snapshots} snapshots, {result.deadlocks} deadlocks",
    ]
    lines += [f"  gap       {line}" for line in result.gaps]
    lines += [f"  note      {note}" for note in result.notes]
    lines += [f"  WRONG     {violation}" for violation in result.violations]
    if result.logs:
        lines.append(f"  kept      {result.logs}")
    return [*lines, f"  verdict   {'all holds' if result.ok else f'{len(result.violations)} VIOLATIONS'}"]


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table over all runs, with totals."""
    rows = [
        "| seed | database | faults | kills | commands | acknowledged | refused | unknown | events | dead letters "
        "| seconds | verdict |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    sums = [0] * 8
    for result in results:
        commands = result.commands
        numbers = [
            sum(result.faults.values()),
            sum(result.kills.values()),
            sum(commands.values()),
            commands["acknowledged"],
            commands["refused"],
            commands["unknown"],
            result.events,
            result.letters,
        ]
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
        verdict = "holds" if result.ok else f"**{len(result.violations)} violations**"
        rows.append(f"| {result.seed} | {result.database} | {_cells(numbers)} | {result.seconds:.0f} | {verdict} |")
    wrong = sum(not result.ok for result in results)
    seconds = sum(result.seconds for result in results)
    rows.append(
        f"| {len(results)} runs | | {_cells(sums)} | {seconds:.0f} | {f'{wrong} wrong' if wrong else 'holds'} |"
    )
    return "\n".join(rows)


def _cells(numbers: Sequence[int]) -> str:
    return " | ".join(f"{number:,}" for number in numbers)
