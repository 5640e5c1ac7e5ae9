"""OpenTelemetry metrics of a client, and trace ids in records. Extra: ``opentelemetry``.

::

    client = Client(factory, before_send=add_trace_context)
    instrument(client)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from weakref import WeakKeyDictionary

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
except ModuleNotFoundError as error:
    needs = "geventaudit.integrations.opentelemetry needs opentelemetry: pip install 'geventaudit[opentelemetry]'"
    raise ModuleNotFoundError(needs) from error

from geventaudit import AuditClient, Msg, Record, RecordSchema, ValidationError, __version__
from geventaudit.integrations.metrics import COUNTERS, GAUGES, Metric

__all__ = ["add_trace_context", "instrument"]

_Clients = list[AuditClient]

# A meter makes an instrument once. It returns the same instrument for a second request, and ignores its callbacks.
_published: WeakKeyDictionary[MeterProvider, _Clients] = WeakKeyDictionary()

# Before the application sets its global provider, OpenTelemetry uses a proxy, and makes the proxy's instruments again
# with the provider that is set. These are the clients of the global provider, proxy or not.
_published_globally: _Clients = []


def instrument(client: AuditClient, meter_provider: MeterProvider | None = None) -> None:
    """Publish the metrics of :mod:`geventaudit.integrations.metrics`, read from the client at each collection.

    For several clients with the same provider, the sums are published. A closed client stays in the sums while its
    provider exists, since counters must not fall.

    :param meter_provider: the provider; None for the global one.
    :raises TypeError: an argument is invalid.
    """
    if not isinstance(client, AuditClient):
        hint = ": write instrument(client, meter_provider)" if isinstance(client, MeterProvider) else ""
        raise TypeError(f"client must be a Client or a BaseClient, got {client!r}{hint}")
    if not isinstance(meter_provider, MeterProvider | None):
        raise TypeError(f"meter_provider must be a MeterProvider of OpenTelemetry, got {meter_provider!r}")
    the_global = metrics.get_meter_provider()
    provider = the_global if meter_provider is None else meter_provider
    clients = _published.get(provider)
    if clients is None:
        clients = _published[provider] = _published_globally if provider is the_global else []
        if not clients:
            _create_instruments(provider.get_meter("geventaudit", __version__), clients)
    if client not in clients:
        clients.append(client)


def _create_instruments(meter: Meter, clients: _Clients) -> None:
    for metric in COUNTERS:
        meter.create_observable_counter(
            metric.name, [_observing(metric, clients)], unit=metric.unit, description=metric.description
        )
    for metric in GAUGES:
        meter.create_observable_gauge(
            metric.name, [_observing(metric, clients)], unit=metric.unit, description=metric.description
        )


def _observing(metric: Metric, clients: _Clients) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observe(_: CallbackOptions) -> Iterable[Observation]:
        return [Observation(sum(metric.value(client.stats()) for client in clients))]

    return observe


_CUSTOM_DATA = RecordSchema().fields["custom_data"]


def add_trace_context(msg: Msg) -> Msg:
    """Add the current span to the record's ``custom_data``. For ``Client(before_send=...)``.

    The keys are ``trace_id`` and ``span_id``, the values hexadecimal, as in W3C and in OpenTelemetry's logs. Without a
    current span, nothing is added. Existing values of these keys stay unchanged.
    """
    span = trace.get_current_span().get_span_context()
    if not span.is_valid or not isinstance(msg.record, Record):
        return msg  # validation refuses a record of another type
    # None is null on the wire, or the value of a caller.
    custom_data = {} if msg.record.custom_data is None else msg.record.custom_data
    if not isinstance(custom_data, Mapping):
        return msg
    if type(custom_data) is not dict:  # such as a MultiDict: ** would take one value for each key
        try:
            custom_data = _CUSTOM_DATA.deserialize(custom_data)
        except ValidationError:
            return msg
    found = {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    return Msg(msg.type, msg.record.replace(custom_data={**found, **custom_data}))
