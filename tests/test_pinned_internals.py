"""The inner names of other libraries that the code leans on are listed here, pinned, and tested for what it needs.

nats-py's inner names are tested further in tests/kernel/transport/test_wire.py.
"""

from __future__ import annotations

import ast
import asyncio
import tomllib
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from thespian.actors import Actor, ActorSystem
from thespian.system.simpleSystemBase import ActorSystemBase

ROOT = Path(__file__).parent.parent
INNER_NAMES = {
    "nats-py": {
        "_attempt_reconnect",
        "_close",
        "_connect_command",
        "_current_server",
        "_error_cb",
        "_flush_pending",
        "_flush_queue",
        "_id",
        "_inbox_prefix",
        "_io_writer",
        "_pending",
        "_pending_data_size",
        "_process_connect_init",
        "_process_err",
        "_process_info",
        "_process_msg",
        "_process_op_err",
        "_ps",
        "_reading_task",
        "_reconnection_task",
        "_resp_map",
        "_server_info",
        "_sid",
        "_status",
        "_subs",
        "_transport",
    },
    "thespian": {"_realizeWakeups", "_receive", "_systemBase", "actorRegistry"},
    "prometheus-client": {"_buckets", "_documentation", "_labelnames", "_name", "_sum", "_upper_bounds"},
    "apscheduler": {"_process_jobs"},
    "pydantic": {"_copy"},
}
PINNED = ("nats-py", "thespian", "prometheus-client", "apscheduler")
"""What a running service leans on. The name of pydantic only helps `make docs`, whose pages are tested."""
PUBLIC = {"_exit", "_asdict", "_replace", "_fields", "_current_frames"}
"""Names of the standard library that begin with an underscore and are documented."""


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Return the private attributes that a source uses, and the names that it defines."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            mine = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (defined if mine and isinstance(node.ctx, ast.Store) else used).add(node.attr)
            if isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()":
                used.add(f"super().{node.attr}")
    return used, defined


def test_private_names_are_told_apart_by_who_defines_them() -> None:
    used, defined = private_names("class A:\n    def _f(self):\n        self._x = y._z\n        super()._f()\n")
    assert used == {"_z", "_f", "super()._f"}
    assert defined == {"_f", "_x"}


def test_every_inner_name_of_another_library_is_listed() -> None:
    used, defined = set(), set()
    for folder in ("aggregates", "projections", "kernel", "migrations", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            here = private_names(path.read_text())
            used |= here[0]
            defined |= here[1]
    foreign = {name.removeprefix("super().") for name in used if name not in defined} - PUBLIC
    assert foreign - set().union(*INNER_NAMES.values()) == set(), "pin the library, and list and test the name here"


@pytest.mark.parametrize("library", PINNED)
def test_the_pinned_version_is_installed(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [line.replace("[nkeys]", "") for line in project["dependencies"] if line.startswith(library)]
    assert pins == [f"{library}=={version(library)}"]


# nats-py: kernel/transport/connection.py


def test_nats_py_has_the_inner_names() -> None:
    client = Client()
    of_others = {"_id", "_io_writer"}  # a subscription's, and the transport's
    assert {name for name in INNER_NAMES["nats-py"] - of_others if not hasattr(client, name)} == set()
    assert Subscription(client, id=7)._id == 7
    assert TcpTransport()._io_writer is None
    assert client._resp_map == {}
    assert client._subs == {}
    assert client._server_info == {}
    assert client._reading_task is client._reconnection_task is client._transport is None
    assert list(signature(client._process_info).parameters) == ["info", "initial_connection"]
    assert list(signature(client._close).parameters) == ["status", "do_cbs"]


# Thespian: kernel/actors


class Echo(Actor):  # type: ignore[misc]
    """Keeps what it is sent."""

    def receiveMessage(self, message: Any, sender: Any) -> None:
        self.last = message


class Direct(Echo):
    """Gives Thespian a receiver of its own."""

    received: list[Any] = []
    _receive = property(lambda self: lambda message, _sender: self.received.append(message), lambda *_: None)


@pytest.fixture
def system() -> Any:
    system = ActorSystem("simpleSystemBase", logDefs=False, transientUnique=True)
    yield system
    system.shutdown()


def test_thespian_gives_every_actor_a_receiver_and_calls_it(system: Any) -> None:
    address = system.createActor(Echo)
    instance = system._systemBase.actorRegistry[address.actorAddressString].instance
    assert type(instance) is Echo
    assert isinstance(instance._receive, MethodType)  # what kernel/actors replaces
    system.tell(system.createActor(Direct), "straight")
    assert Direct.received == ["straight"]


def test_thespian_registers_every_actor_under_its_address(system: Any) -> None:
    base = system._systemBase
    assert isinstance(base, ActorSystemBase)
    before = len(base.actorRegistry)
    address = system.createActor(Echo)
    system.tell(address, "hello")
    assert len(base.actorRegistry) == before + 1
    assert base.actorRegistry[address.actorAddressString].instance.last == "hello"


def test_thespian_looks_for_wakeups_through_one_method_that_can_be_replaced(system: Any) -> None:
    looked = []
    assert list(signature(system._systemBase._realizeWakeups).parameters) == []
    system._systemBase._realizeWakeups = lambda: looked.append(True)
    address = system.createActor(Echo)
    system.tell(address, "hello")
    assert looked
    assert system._systemBase.actorRegistry[address.actorAddressString].instance.last == "hello"


# prometheus-client: kernel/telemetry and docs/metrics.py


def test_a_histogram_counts_each_sample_in_one_bucket_and_adds_it_to_the_sum() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("waits", "Waits.", buckets=(1.0, 2.0), registry=registry)
    assert histogram._upper_bounds == [1.0, 2.0, float("inf")]
    histogram.observe(1.0)  # a bound belongs to the bucket below
    assert [bucket.get() for bucket in histogram._buckets] == [1.0, 0.0, 0.0]
    assert histogram._sum.get() == 1.0
    histogram._buckets[1].inc(2)
    histogram._sum.inc(3.0)
    page = generate_latest(registry).decode()
    assert 'waits_bucket{le="2.0"} 3.0' in page
    assert 'waits_bucket{le="+Inf"} 3.0' in page
    assert "waits_count 3.0" in page
    assert "waits_sum 4.0" in page


@pytest.mark.parametrize("kind", [Counter, Gauge, Histogram])
def test_a_metric_knows_its_name_labels_and_meaning(kind: type[Counter | Gauge | Histogram]) -> None:
    metric = kind("jobs_total", "Jobs that ran.", ["job", "outcome"], registry=None)
    assert metric._name == ("jobs" if kind is Counter else "jobs_total")
    assert tuple(metric._labelnames) == ("job", "outcome")
    assert metric._documentation == "Jobs that ran."


# APScheduler: kernel/runtime/scheduler.py


async def test_apscheduler_asks_one_method_for_what_is_due_and_how_long_to_wait() -> None:
    waits: asyncio.Queue[float | None] = asyncio.Queue()

    class Watched(AsyncIOScheduler):  # type: ignore[misc]
        def _process_jobs(self) -> float | None:
            wait: float | None = super()._process_jobs()
            waits.put_nowait(wait)
            return wait

    scheduler = Watched()
    scheduler.add_job(lambda: None, "interval", seconds=60)
    scheduler.start()
    async with asyncio.timeout(10):
        wait = await waits.get()
    assert wait is not None
    assert 0 < wait <= 60
    scheduler.shutdown(wait=False)


# pydantic: docs/configuration.py


def test_a_copied_field_is_described_apart_from_the_original() -> None:
    class Model(BaseModel):
        size: int = Field(1, description="Bytes.")

    field = Model.model_fields["size"]
    copied = field._copy()
    copied.description = "Mail. Bytes."
    assert (field.description, copied.default) == ("Bytes.", 1)
