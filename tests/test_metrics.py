"""The figures of a client in OpenTelemetry's SDK and prometheus_client, while its agent comes and goes."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess
from helpers import eventually, import_old, mapping, message, once
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from test_client import client_of, records_of

from geventaudit import Client, NoOp, QueueFullError, Spool, ValidationError
from geventaudit.agent import Agent, Received
from geventaudit.integrations.opentelemetry import add_trace_context, instrument
from geventaudit.integrations.prometheus import PREFIX, AuditCollector

COUNTERS = {
    "messages_sent", "messages_requeued", "messages_dropped", "messages_errors", "heartbeat_dropped", "spool_failures",
}  # fmt: skip
GAUGES = {"messages_queued", "messages_spooled", "messages_in_flight", "connection_degraded"}


class Telemetry:
    """A meter provider of its own, and its current export."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])

    def metrics(self) -> list[Any]:
        data = self.reader.get_metrics_data()
        return list(data.resource_metrics[0].scope_metrics[0].metrics) if data else []

    def __call__(self) -> dict[str, Any]:
        return {each.name: each.data.data_points[0].value for each in self.metrics()}


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.provider.shutdown()


def scraped(text: str) -> dict[str, float]:
    """The figures of a scrape, by the names that OpenTelemetry knows."""
    families = text_string_to_metric_families(text)
    return {family.name.removeprefix(PREFIX): family.samples[0].value for family in families}


def test_the_figures_of_a_client_during_restarts_of_its_agent(socket_path: str, telemetry: Telemetry) -> None:
    client = client_of(socket_path, queue_size=5)
    registry = CollectorRegistry()
    registry.register(AuditCollector(client))
    instrument(client, telemetry.provider)

    def figures() -> dict[str, Any]:
        now = telemetry()
        assert scraped(generate_latest(registry).decode()) == now
        return {name: value for name, value in now.items() if value}

    assert set(telemetry()) == COUNTERS | GAUGES
    assert figures() == {}, "a client that has not begun is not degraded"
    for number in range(5):
        client.send(message(number))
    eventually(lambda: client.stats().connect_failures)
    with pytest.raises(QueueFullError):
        client.send(message(5))
    with pytest.raises(ValidationError):
        client.send({})
    assert figures() == {"messages_queued": 5, "messages_errors": 2, "connection_degraded": 1}
    with Agent(socket_path, lambda _: None) as agent:
        assert client.flush(timeout=30)
        eventually(lambda: client.stats().heartbeats)
        assert figures() == {"messages_sent": 5, "messages_errors": 2}
        agent.stop_reading()
        before = client.stats()
        agent.hang_up()
        eventually(lambda: client.stats().connects > before.connects)
        client.send(message(6))
        eventually(lambda: client.stats().in_flight == 1 and client.stats().heartbeats > before.heartbeats)
        assert figures() == {"messages_sent": 5, "messages_errors": 2, "messages_in_flight": 1}
    eventually(lambda: client.stats().degraded)
    now = figures()
    assert now.pop("heartbeat_dropped") >= 1
    assert now == {"messages_sent": 5, "messages_errors": 2, "messages_queued": 1, "connection_degraded": 1}
    assert len(client.close(timeout=0.0)) == 1
    now = figures()
    assert now.pop("heartbeat_dropped") >= 1
    assert now == {"messages_sent": 5, "messages_errors": 2, "messages_dropped": 1}


def test_resent_and_spooled_records_have_figures(socket_path: str, folder: Path, telemetry: Telemetry) -> None:
    client = client_of(socket_path, queue_size=2, spool=Spool(folder / "audit.db"))
    instrument(client, telemetry.provider)
    with Agent(socket_path, lambda _: None) as agent:
        client.connect()
        agent.stop_reading()
        client.send(message(0))
        eventually(lambda: client.stats().in_flight == 1)
        agent.stop()
        eventually(lambda: client.stats().degraded)
        for number in range(1, 10):
            client.send(message(number))
        eventually(lambda: telemetry()["messages_spooled"] > 0)
        now = telemetry()
        assert now["messages_queued"] + now["messages_spooled"] == 10
        agent.resume_reading()
        agent.start()
        assert client.flush(timeout=30)
    now = telemetry()
    assert (now["messages_sent"], now["messages_requeued"], now["messages_spooled"]) == (10, 1, 0)
    client.close()


def test_of_several_clients_the_sums(socket_path: str, telemetry: Telemetry, caplog: Any) -> None:
    with Agent(socket_path, lambda _: None):
        clients = [client_of(socket_path) for _ in range(3)]
        for client in [*clients, clients[0]]:
            instrument(client, telemetry.provider)
        for count, client in enumerate(clients):
            for number in range(count + 1):
                client.send(message(number))
            client.close()
    assert telemetry()["messages_sent"] == 6
    registry = CollectorRegistry()
    registry.register(AuditCollector(*clients, clients[0]))
    assert registry.get_sample_value("geventaudit_messages_sent_total") == 6
    assert not [each for each in caplog.records if each.name.startswith("opentelemetry")]
    with pytest.raises(TypeError, match="at least one client"):
        AuditCollector()
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(AuditCollector(*clients))


def test_invalid_clients_and_providers_are_refused(telemetry: Telemetry) -> None:
    client: Any = Client(NoOp)
    provider: Any = telemetry.provider
    wrong: list[tuple[Any, str]] = [
        (lambda: instrument("x", provider), "client must be a Client or a BaseClient, got 'x'"),  # type: ignore[arg-type]
        (lambda: instrument(provider, client), "got <opentelemetry.*: write instrument.client, meter_provider."),
        (lambda: instrument(client, "x"), "meter_provider must be a MeterProvider of OpenTelemetry, got 'x'"),  # type: ignore[arg-type]
        (lambda: AuditCollector("x"), "each client must be a Client or a BaseClient, got 'x'"),  # type: ignore[arg-type]
        (lambda: AuditCollector([client]), r"got \[<Client new>\]: write AuditCollector\(\*clients\)"),  # type: ignore[arg-type]
    ]
    for call, problem in wrong:
        with pytest.raises(TypeError, match=problem):
            call()


GLOBAL = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from geventaudit import Client, NoOp
from geventaudit.integrations.opentelemetry import instrument
from helpers import message

reader = InMemoryMetricReader()
provider = MeterProvider([reader])
clients = [Client(NoOp) for _ in range(3)]
instrument(clients[0])
metrics.set_meter_provider(provider)
instrument(clients[1])
instrument(clients[2], provider)
for client in clients:
    client.send(message(1))
    client.flush()
for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
    print(metric.name, *(point.value for point in metric.data.data_points))
provider.shutdown()
"""


@once
def test_the_global_provider_may_be_set_between_two_clients() -> None:
    """OpenTelemetry has a stand-in before that, which is another object and has the same instruments in the end."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", GLOBAL],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "messages_sent 3" in done.stdout.decode().splitlines()


def test_counters_are_counters(telemetry: Telemetry) -> None:
    client = Client(lambda: None)  # type: ignore[arg-type, return-value]
    instrument(client, telemetry.provider)
    for metric in telemetry.metrics():
        assert getattr(metric.data, "is_monotonic", False) == (metric.name in COUNTERS), metric.name
        assert metric.description
    text = generate_latest(_registry_of(client)).decode()
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    expected = dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(GAUGES, "gauge")
    assert kinds == {f"geventaudit_{name}": kind for name, kind in expected.items()}


def _registry_of(client: Client) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(AuditCollector(client))
    return registry


def test_a_scrape_over_http(socket_path: str) -> None:
    """prometheus_client serves in a thread of its own."""
    with Agent(socket_path, lambda _: None), client_of(socket_path) as client:
        server, serving = start_http_server(0, "127.0.0.1", _registry_of(client))
        client.send(message(1))
        assert client.flush(timeout=30)

        def fetch() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=30) as response:
                return str(response.read().decode())

        pool = gevent.get_hub().threadpool
        try:
            assert scraped(pool.apply(fetch))["messages_sent"] == 1
        finally:
            server.shutdown()
            server.server_close()
            serving.join(30)
            pool.kill()


def test_the_trace_of_a_record(socket_path: str) -> None:
    got: list[Received] = []
    tracer = TracerProvider().get_tracer("test")
    with (
        Agent(socket_path, got.append),
        client_of(socket_path, before_send=add_trace_context) as client,
    ):
        client.send(message(0))
        with tracer.start_as_current_span("work") as span:
            original = message(1)
            client.send(original)
            client.send({"Type": "ControlPlane", "Record": mapping(CustomData=None)})
            client.send(message(custom_data={"n": 3, "trace_id": "mine"}))
            client.send(message(custom_data=None))
            client.send(message(custom_data=import_old("webob.multidict").MultiDict([("a", 1), ("a", 2)])))
            client.send({"Type": "ControlPlane", "Record": {**mapping(), "CustomData": None}})
            for wrong in (message(custom_data=5), {"Type": "ControlPlane", "Record": 5}, 5):
                with pytest.raises(ValidationError) as caught:
                    client.send(wrong)  # type: ignore[arg-type]
                assert "raised" not in str(caught.value)
        context = span.get_span_context()
        client.flush(timeout=30)
    ids = {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
    assert len(ids["trace_id"]) == 32
    assert [each.custom_data for each in records_of(got)] == [
        {"n": 0},
        {"n": 1, **ids},
        ids,
        {"n": 3, **ids, "trace_id": "mine"},
        ids,
        {"a": [1, 2], **ids},
        ids,
    ]
    assert original == message(1), "the caller's record is as it was"


def test_greenlets_have_spans_of_their_own(socket_path: str) -> None:
    got: list[Received] = []
    tracer = TracerProvider().get_tracer("test")

    def work(number: int) -> str:
        with tracer.start_as_current_span("work") as span:
            gevent.sleep(0)
            client.send(message(number))
            return trace.format_span_id(span.get_span_context().span_id)

    with Agent(socket_path, got.append), client_of(socket_path, before_send=add_trace_context) as client:
        working = [gevent.spawn(work, number) for number in range(20)]
        gevent.joinall(working, raise_error=True)
    assert {each.custom_data["n"]: each.custom_data["span_id"] for each in records_of(got)} == {
        number: each.value for number, each in enumerate(working)
    }
