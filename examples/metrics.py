"""A client's figures for OpenTelemetry and for Prometheus, and the trace in each record.

pip install 'geventaudit[opentelemetry,prometheus]' opentelemetry-sdk
python examples/metrics.py
"""

import os
import tempfile

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, generate_latest

import geventaudit
from geventaudit import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record
from geventaudit.agent import Agent
from geventaudit.integrations.opentelemetry import add_trace_context, instrument
from geventaudit.integrations.prometheus import AuditCollector

RECORD = Record(
    operation_name="ReadSecret",
    operation_categories=[OperationCategory.KEY_MANAGEMENT],
    operation_access_level="Reader",
    caller_agent="example/1.0",
    caller_ip_address="192.0.2.7",
    caller_identities={CallerIdentityType.USERNAME: [CallerIdentity("operator", "on the host")]},
    caller_access_levels=["Reader"],
    target_resources={"Secret": []},
)


def main() -> None:
    trace.set_tracer_provider(TracerProvider())
    reader = InMemoryMetricReader()  # a service has an exporter here
    registry = CollectorRegistry()  # and prometheus_client.REGISTRY here
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "agent.sock")
        with (
            Agent(path, lambda received: print("arrived:", received.message)),
            geventaudit.Client(
                lambda: geventaudit.DomainSocket(path), before_send=add_trace_context, stamp=True
            ) as client,
        ):
            instrument(client, MeterProvider([reader]))
            registry.register(AuditCollector(client))
            with trace.get_tracer("example").start_as_current_span("read a secret"):
                client.send(Msg(AuditType.DATA_PLANE, RECORD))
            client.flush(timeout=5.0)
            data = reader.get_metrics_data()
            for metric in data.resource_metrics[0].scope_metrics[0].metrics if data else ():
                print(f"OpenTelemetry: {metric.name} {metric.data.data_points[0].value}")
            print(generate_latest(registry).decode())


if __name__ == "__main__":
    main()
