"""Metrics of clients for Prometheus. Extra: ``prometheus``.

::

    REGISTRY.register(AuditCollector(client))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.prometheus needs prometheus_client: pip install 'geventaudit[prometheus]'"
    raise ModuleNotFoundError(needs) from error

from geventaudit import AuditClient
from geventaudit.integrations.metrics import COUNTERS, GAUGES

__all__ = ["PREFIX", "AuditCollector"]

PREFIX = "geventaudit_"
"""The start of every metric's name, as Prometheus's rules for names ask."""


class AuditCollector(Collector):
    """The metrics of :mod:`geventaudit.integrations.metrics`, read from the clients at each scrape.

    Each name has :data:`PREFIX`, and a counter ends in ``_total``: ``geventaudit_messages_sent_total``.

    A registry takes one such collector. The multi-process mode of ``prometheus_client`` (several workers of gunicorn
    behind one address) ignores collectors: give each worker an address of its own, or use OpenTelemetry.

    :param clients: one or more; the metrics are their sums. A client that is given twice counts once.
    :raises TypeError: no client is given, or an argument is not a client.
    """

    def __init__(self, *clients: AuditClient) -> None:
        if not clients:
            raise TypeError("at least one client is needed: AuditCollector(client)")
        for each in clients:
            if not isinstance(each, AuditClient):
                hint = ": write AuditCollector(*clients)" if isinstance(each, list | tuple) else ""
                raise TypeError(f"each client must be a Client or a BaseClient, got {each!r}{hint}")
        self._clients = list(dict.fromkeys(clients))

    def describe(self) -> Iterable[Metric]:
        """Yield the metrics. A registry compares their names, to refuse a second collector."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their values of this moment."""
        snapshots = [client.stats() for client in self._clients]
        for each in COUNTERS:
            yield CounterMetricFamily(PREFIX + each.name, each.description, value=sum(map(each.value, snapshots)))
        for each in GAUGES:
            yield GaugeMetricFamily(PREFIX + each.name, each.description, value=sum(map(each.value, snapshots)))
