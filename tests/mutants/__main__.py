"""`python -m tests.mutants`: put each deliberate bug into a copy of the project, and see a test fail there.

Exit codes: 0 if every mutant is caught, 1 if one survives, 2 if there is no verdict: the catalogue is out of date, a
selection fails without any mutant, or pytest itself failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Lock
from xml.etree import ElementTree

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("aggregates", "projections", "kernel", "migrations", "examples")
TEST_TIMEOUT_S = 60
"""Seconds for one test; a test that hangs because of a mutant has caught it."""
RUN_TIMEOUT_S = 300
GRACE_S = 20.0
"""Seconds for an interrupted pytest to stop its servers."""


class OutOfDate(Exception):
    """The catalogue does not fit the code."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A run of pytest.

    Attributes:
        code: its exit code, or None if it did not end.
        failed: tests that failed, in order, each with its message.
        output: the end of its output.
    """

    code: int | None
    failed: list[tuple[str, str]]
    output: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one mutant.

    Attributes:
        outcome: `caught`, `survived`, or `error`.
        by: the first test that failed.
        why: its message: a mutant may be caught for a reason that has nothing to do with its promise.
        output: the end of pytest's output if the outcome is `error`.
    """

    name: str
    promise: str
    file: str
    outcome: str
    by: str
    why: str
    seconds: float
    output: str = ""


class Runner:
    """Runs pytest in copies of the project, several at once, and leaves nothing behind.

    Args:
        place: an empty directory for the copies.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._count = 0
        self.stopping = Event()

    def run(self, copy: Path, tests: Sequence[str], *more: str) -> Ran:
        """Run tests in a copy of the project."""
        with self._lock:
            self._count += 1
            # short, because the paths of sockets begin with it
            scratch = self._place / f"t{self._count}"
        scratch.mkdir()
        report, output = scratch / "report.xml", scratch / "output"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}"]
        command += ["--tb=short", f"--junitxml={report}", *more, *tests]
        began = time.monotonic()
        with output.open("wb") as out, self._lock:
            if self.stopping.is_set():
                return Ran(None, [], "interrupted", 0.0)
            process = subprocess.Popen(
                command,
                cwd=copy,
                env=environment(copy, scratch),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            code: int | None = process.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self._end(process)
            end_leftovers(scratch)
        text = output.read_text(errors="replace")
        ran = Ran(code, failures(report), text[-4_000:], time.monotonic() - began)
        shutil.rmtree(scratch, ignore_errors=True)
        return ran

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        if process.poll() is None:
            process.kill()
            process.wait()
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """Interrupt all runs: pytest then stops the servers that it started."""
        with self._lock:
            self.stopping.set()
            for process in self._running:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)


def environment(copy: Path, scratch: Path) -> dict[str, str]:
    """Return variables by which every process of a run imports the copy, and keeps its files in a removable place."""
    return {**os.environ, "PYTHONPATH": str(copy), "TMPDIR": str(scratch)}


def end_leftovers(scratch: Path) -> None:
    """End processes that a run left behind; they are recognized by the run's directory in their environment."""
    for number in (signal.SIGINT, signal.SIGKILL):
        deadline = time.monotonic() + 5
        sent: set[int] = set()
        while (left := started_with(scratch)) and time.monotonic() < deadline:
            for pid in left - sent:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            sent |= left
            time.sleep(0.05)


def started_with(scratch: Path) -> set[int]:
    """Return processes whose temporary directory this is; none where there is no /proc."""
    mark = f"TMPDIR={scratch}".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found


def failures(report: Path) -> list[tuple[str, str]]:
    """Return the failed tests with their messages; a test whose fixture failed has caught nothing."""
    try:
        cases = ElementTree.parse(report).iter("testcase")
    except (OSError, ElementTree.ParseError):
        return []
    return [
        (f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}", failure.get("message", ""))
        for case in cases
        if (failure := case.find("failure")) is not None
    ]


def copy_project(to: Path) -> None:
    """Copy the files that the tests need; the servers of the present environment are used."""

    def unwanted(_folder: str, names: list[str]) -> list[str]:
        drop = ("__pycache__", "build", "dist", "out")
        return [name for name in names if name.startswith(".") or name in drop or name.endswith(".egg-info")]

    shutil.copytree(ROOT, to, ignore=unwanted)
    if (ROOT / ".venv").exists():
        (to / ".venv").symlink_to(ROOT / ".venv")


def mutate(copy: Path, mutant: Mutant) -> None:
    """Apply the mutation.

    Raises:
        OutOfDate: the text to replace is not found exactly once.
    """
    path = copy / mutant.file
    source = path.read_text() if path.exists() else ""
    if (found := source.count(mutant.old)) != 1:
        raise OutOfDate(
            f"{mutant.name}: the text to replace is found {found} times in {mutant.file}, not once:\n{mutant.old}"
        )
    changed = source.replace(mutant.old, mutant.new)
    try:
        compile(changed, str(path), "exec")
    except SyntaxError as error:
        raise OutOfDate(f"{mutant.name}: {mutant.file} is no Python any more: {error}") from error
    path.write_text(changed)
    for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
        cached.unlink()


def check_catalogue(copy: Path, chosen: Sequence[Mutant]) -> None:
    """Check that every mutant's text is found exactly once.

    Raises:
        OutOfDate: a text is not.
    """
    problems = []
    for mutant in chosen:
        path = copy / mutant.file
        source = path.read_text() if path.exists() else ""
        if (found := source.count(mutant.old)) != 1:
            problems.append(f"{mutant.name}: the text to replace is found {found} times in {mutant.file}, not once")
    if problems:
        raise OutOfDate("\n".join(problems))


def check_imports(copy: Path, scratch: Path) -> None:
    """Check that a process in a copy imports the copy, and not the installed project.

    Raises:
        OutOfDate: it imports something else; then no mutant would be tested.
    """
    program = f"import importlib\nfor name in {PACKAGES}: print(importlib.import_module(name).__file__)"
    output = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=copy,
        env=environment(copy, scratch),
        capture_output=True,
        text=True,
    )
    wrong = [path for path in output.stdout.split() if not path.startswith(str(copy))]
    if output.returncode or wrong:
        raise OutOfDate(f"a copy does not import itself: {wrong or output.stderr}")


def check_tests(runner: Runner, pool: Executor, copy: Path, chosen: Sequence[Mutant], jobs: int) -> float:
    """Run every selection without a mutant; return the seconds it took.

    Raises:
        OutOfDate: a test fails without a mutant too, or does not exist.
    """
    began = time.monotonic()
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    shares = [share for n in range(jobs) if (share := tests[n * len(tests) // jobs : (n + 1) * len(tests) // jobs])]
    for ran in pool.map(lambda share: runner.run(copy, share), shares):
        if ran.code != 0:
            raise OutOfDate(f"without any mutant pytest ends with {ran.code}:\n{ran.output}")
    return time.monotonic() - began


def try_out(runner: Runner, pristine: Path, place: Path, mutant: Mutant) -> Result:
    """Apply the mutant to a separate copy, and run its tests there."""
    copy = place / mutant.name
    shutil.copytree(pristine, copy, symlinks=True, ignore=shutil.ignore_patterns(".hypothesis", ".pytest_cache"))
    try:
        mutate(copy, mutant)
        ran = runner.run(copy, mutant.tests, "-x")
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    if ran.code == 1 and ran.failed:
        outcome, output = "caught", ""
    elif ran.code == 0:
        outcome, output = "survived", ""
    else:
        outcome, output = "error", f"pytest ended with {ran.code}\n{ran.output}"
    by, why = ran.failed[0] if ran.failed else ("", "")
    return Result(mutant.name, mutant.promise, mutant.file, outcome, by, why, round(ran.seconds, 1), output)


def table(results: Sequence[Result]) -> str:
    """Return the results as a table for people."""
    head = ("mutant", "promise", "caught by", "seconds")
    rows = [
        (
            result.name,
            result.promise,
            result.by if result.outcome == "caught" else result.outcome.upper(),
            f"{result.seconds:.1f}",
        )
        for result in results
    ]
    widths = [max(len(row[n]) for row in [head, *rows]) for n in range(4)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="try this mutant; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="how many are tried at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    chosen = parser.parse_args()
    if unknown := set(chosen.only or ()) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}; --list shows what there is")
    if chosen.jobs < 1:
        parser.error("--jobs must be at least 1")
    return chosen


def run_all(chosen: Sequence[Mutant], jobs: int) -> list[Result]:
    """Try out the mutants.

    Raises:
        OutOfDate: the catalogue does not fit the code.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as directory:
        place = Path(directory).resolve()
        place.chmod(0o755)  # under root, PostgreSQL runs as another user
        runner = Runner(place)
        pristine = place / "unchanged"
        copy_project(pristine)
        check_catalogue(pristine, chosen)
        check_imports(pristine, place)
        results: list[Result] = []
        with ThreadPoolExecutor(jobs) as pool:
            try:
                seconds = check_tests(runner, pool, pristine, chosen, jobs)
                print(f"without mutants all tests pass, in {seconds:.0f} s", flush=True)
                for result in pool.map(lambda mutant: try_out(runner, pristine, place, mutant), chosen):
                    results.append(result)
                    print(f"{result.outcome:8}  {result.name}  {result.seconds:.1f} s  {result.by}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                runner.stop()
                raise
        return results


def interrupted(_number: int, _frame: object) -> None:
    """End as after Ctrl-C, but only once: a second signal must not interrupt the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    given = arguments()
    chosen = [mutant for mutant in MUTANTS if not given.only or mutant.name in given.only]
    if given.list:
        width = max(len(mutant.name) for mutant in chosen)
        print("\n".join(f"{mutant.name.ljust(width)}  {mutant.promise}  ({mutant.file})" for mutant in chosen))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    began = time.monotonic()
    try:
        results = run_all(chosen, given.jobs)
    except OutOfDate as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    print("\n" + table(results))
    for result in results:
        if result.outcome == "error":
            print(f"\n{result.name}: {result.output}")
    counts = {
        outcome: sum(result.outcome == outcome for result in results) for outcome in ("caught", "survived", "error")
    }
    print(f"\n{', '.join(f'{count} {outcome}' for outcome, count in counts.items())}; {time.monotonic() - began:.0f} s")
    return 2 if counts["error"] else 1 if counts["survived"] else 0


if __name__ == "__main__":
    sys.exit(main())
