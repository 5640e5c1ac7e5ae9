"""The metrics of clients: one list of names and meanings for OpenTelemetry and Prometheus.

The names of the first five counters are those of Microsoft's OTEL Audit for Go v1.0.0, so that dashboards serve both.
Two are counted differently. There, ``messages_sent`` counts writes without an error, those of heartbeats too; here it
counts deliveries of records. There, ``messages_errors`` counts failed writes; here it counts records that ``send()``
refused, and ``messages_requeued`` counts the records of a failed write, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from geventaudit import Stats

__all__ = ["COUNTERS", "GAUGES", "Metric"]


class Metric(NamedTuple):
    """One metric of a client; of several clients, their sum."""

    name: str
    """The name for OpenTelemetry, without the prefix for Prometheus."""
    description: str
    """The meaning, in one line."""
    unit: str
    """The counted thing, as an annotation of UCUM: ``{message}``."""
    value: Callable[[Stats], int]
    """Returns the value from a snapshot of one client."""


def _refused(stats: Stats) -> int:
    return sum(count for reason, count in stats.rejected.items() if reason != "left_out")


COUNTERS = (
    Metric("messages_sent", "Audit records known to be taken by the agent", "{message}", lambda s: s.delivered),
    Metric(
        "messages_requeued", "Audit records written again after a connection broke", "{message}", lambda s: s.resent
    ),
    Metric("messages_dropped", "Audit records accepted and given up", "{message}", lambda s: s.dropped),
    Metric("messages_errors", "Audit records that send() refused", "{message}", _refused),
    Metric(
        "heartbeat_dropped",
        "Heartbeats not known to be delivered when their connection broke",
        "{message}",
        lambda s: s.heartbeats_dropped,
    ),
    Metric(
        "spool_failures",
        "Times that the spool could not be used, or that files in it were damaged, removed or cut",
        "{failure}",
        lambda s: s.spool_failures,
    ),
)
"""Metrics that only grow, until the process ends."""

GAUGES = (
    Metric("messages_queued", "Audit records that wait in memory to be written", "{message}", lambda s: s.queued),
    Metric("messages_spooled", "Audit records that wait on disk", "{message}", lambda s: s.spooled),
    Metric(
        "messages_in_flight",
        "Audit records written and not known to be taken by the agent",
        "{message}",
        lambda s: s.in_flight,
    ),
    Metric("connection_degraded", "Audit clients at work without a connection", "{client}", lambda s: int(s.degraded)),
)
"""Metrics of the moment."""
