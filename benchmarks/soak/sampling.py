"""Sampling everything that could grow: processes, the NATS server, the metrics page, the files."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.rounds import percentiles
from benchmarks.soak.load import Load
from benchmarks.soak.running import APP, Failed, Service
from benchmarks.soak.trend import Series
from kernel.errors import LogError
from kernel.partitions.leases import bucket_of
from kernel.transport.connection import NatsConnection
from kernel.transport.jetstream_api import call_api

_MIB = 2**20
STREAM = "files: the stream, MiB"
LOG_FACTOR = 4.0
"""How many bytes the nats-server's memory may grow for each byte of the log. It caches the blocks that were read
lately, loading an old aggregate reads many blocks, and its garbage collector needs room as well."""
GAUGES = {
    "eskernel_actors_live": ("actors live", 0.0),
    "eskernel_actor_shells": ("Thespian addresses", 20.0),
    "eskernel_commands_pending": ("commands pending", 10.0),
    "eskernel_appends_in_flight": ("appends in flight", 10.0),
    "eskernel_projection_lag_commits": ("commits not projected", 100.0),
}
"""Gauges of the metrics page that must not grow, and how much more is no growth yet (0: the swing). Those that this
version of the kernel does not have are left out."""
RATES = {
    "eskernel_activations_total": "activations",
    "eskernel_passivations_total": "passivations",
    "eskernel_aggregate_loads_total": "loads from the log",
}
NEVER = {
    "eskernel_kernel_bugs_total": "bugs in the kernel",
    "eskernel_leases_lost_total": "leases lost",
    "eskernel_fenced_batches_total": "batches fenced",
    "eskernel_dead_letters_total": "dead letters",
    "eskernel_append_read_backs": "appends read back",
}
"""Events that should not happen in normal operation; counted from the beginning of the measuring."""


class Sampler:
    """Takes a sample of everything at each call.

    Args:
        swing: actors that a worker activates between two sweeps: the number of live actors fluctuates by this much.

    Attributes:
        counts: each counter's values at the first and the latest sample.
    """

    def __init__(
        self, service: Service, load: Load, connection: NatsConnection, http: aiohttp.ClientSession, swing: float
    ) -> None:
        self._swing = swing
        self._service, self._load, self._connection, self._http = service, load, connection, http
        self._processes = service.processes | {"client": psutil.Process()}
        self._series: dict[tuple[str, str], Series] = {}
        self._began = time.monotonic()
        self._last: dict[tuple[str, str], tuple[float, float]] = {}
        self._at = 0.0
        self.counts: dict[str, tuple[float, float]] = {}
        self.missed = 0

    @property
    def series(self) -> list[Series]:
        """Return the series, sorted by group."""
        groups = list(dict.fromkeys(group for group, _ in self._series))
        return sorted(self._series.values(), key=lambda series: groups.index(series.group))

    async def sample(self) -> None:
        """Take one sample of everything.

        Raises:
            Failed: the service is gone, or one of its processes was replaced.
        """
        self._service.check()
        if gone := self._service.restarted():
            raise Failed(f"ended and perhaps started again: {', '.join(gone)}")
        self._at = time.monotonic() - self._began
        self._sample_processes()
        await self._sample_metrics()
        try:
            await self._sample_nats()
        except (LogError, TimeoutError):
            self.missed += 1
        self._sample_load()
        self._sample_files()

    def _note(self, group: str, name: str, value: float, unit: str = "", **more: Any) -> None:
        series = self._series.get((group, name))
        if series is None:
            series = self._series[group, name] = Series(group, name, unit, **more)
        series.times.append(round(self._at, 3))
        series.values.append(round(value, 4))

    def _note_rate(self, group: str, name: str, total: float, unit: str) -> None:
        before = self._last.get((group, name))
        self._last[group, name] = (self._at, total)
        if before is not None:
            self._note(group, name, (total - before[1]) / (self._at - before[0]), unit, judged=False)

    def _sample_processes(self) -> None:
        for name, process in self._processes.items():
            with process.oneshot():
                memory, times = process.memory_info().rss, process.cpu_times()
                follows = (STREAM, LOG_FACTOR) if name == "nats-server" else None
                self._note(name, "memory", memory / _MIB, "MiB", floor=1.0, follows=follows)
                self._note(name, "open files", process.num_fds(), floor=2.0)
                self._note(name, "threads", process.num_threads(), floor=2.0)
                self._note_rate(name, "processor", 100 * (times.user + times.system), "% of a core")

    async def _sample_metrics(self) -> None:
        try:
            async with self._http.get(f"{self._service.running.http}/metrics") as answer:
                page = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            self.missed += 1
            return
        gauges: dict[tuple[str, str], float] = {}
        totals: dict[tuple[str, str], float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                worker = f"worker {sample.labels['worker']}" if "worker" in sample.labels else "service"
                if sample.name in GAUGES:
                    gauges[worker, sample.name] = sample.value
                elif sample.name in RATES:
                    totals[worker, RATES[sample.name]] += sample.value
                elif sample.name in NEVER:
                    counts[NEVER[sample.name]] += sample.value
        for metric, (name, floor) in GAUGES.items():
            for worker in sorted({worker for worker, found in gauges if found == metric}):
                self._note(worker, name, gauges[worker, metric], floor=floor or self._swing)
        for (worker, name), total in sorted(totals.items()):
            self._note_rate(worker, name, total, "per second")
        for name, count in counts.items():
            self.counts[name] = (self.counts.get(name, (count, count))[0], count)

    async def _sample_nats(self) -> None:
        stream = (await call_api(self._connection, f"STREAM.INFO.{APP}", None))["state"]
        leases = (await call_api(self._connection, f"STREAM.INFO.KV_{bucket_of(APP)}", None))["state"]
        self._note("JetStream", "consumers of the stream", stream["consumer_count"], floor=2.0)
        self._note("JetStream", "lease keys", leases.get("num_subjects", 0), floor=2.0)
        account = orjson.loads((await self._connection.request("$SYS.REQ.ACCOUNT.PING.STATZ", timeout=2)).data)
        for entry in account["data"]["account_statz"]:
            if entry["acc"] == "$G":
                self._note("NATS", "connections", entry["conns"], floor=2.0)
                self._note("NATS", "subscriptions", entry["num_subscriptions"], floor=5.0)
        self._note("files", "the stream", stream["bytes"] / _MIB, "MiB", judged=False)

    def _sample_load(self) -> None:
        self._note_rate("client", "commands", self._load.answered, "per second")
        took = self._load.latencies()
        if len(took) > 10:
            for name, value in percentiles(took).items():
                if name in ("p50_ms", "p99_ms"):
                    self._note("client", f"answered in, {name[:3]}", value, "ms", judged=False)

    def _sample_files(self) -> None:
        database = Path(self._service.running.database.removeprefix("sqlite:///"))
        for name, path in (("SQLite", database), ("SQLite's WAL", database.with_name(f"{database.name}-wal"))):
            try:
                self._note("files", name, path.stat().st_size / _MIB, "MiB", judged=False)
            except FileNotFoundError:
                self._note("files", name, 0.0, "MiB", judged=False)
