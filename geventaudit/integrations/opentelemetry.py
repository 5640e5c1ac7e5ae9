"""A client's figures as OpenTelemetry metrics, and the trace that a record belongs to. Extra: ``opentelemetry``.

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

# A meter has an instrument once: whoever asks for it again is given the first, and its callbacks are ignored.
_published: WeakKeyDictionary[MeterProvider, _Clients] = WeakKeyDictionary()

# Before the application sets its global provider, OpenTelemetry has a stand-in in its place, and makes the stand-in's
# instruments again at the one that is set. These are its clients, whichever of the two it is now.
_published_globally: _Clients = []


def instrument(client: AuditClient, meter_provider: MeterProvider | None = None) -> None:
    """Publish the client's figures: those of :mod:`geventaudit.integrations.metrics`, asked for at each collection.

    Of several clients with the same provider, the sums are published. A client is published, closed or not, for as long
    as its provider exists: a sum that forgot one would fall.

    :param meter_provider: None for the global one.
    :raises TypeError: for parameters that cannot be.
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
    """For ``Client(before_send=...)``: put the current span into the record's ``custom_data``.

    As ``trace_id`` and ``span_id``, in hexadecimal, as W3C and OpenTelemetry's logs write them. Without a current span,
    or where the record has fields of these names, those stay as they are.
    """
    span = trace.get_current_span().get_span_context()
    if not span.is_valid or not isinstance(msg.record, Record):
        return msg  # what is no record is for validation to refuse
    custom_data = {} if msg.record.custom_data is None else msg.record.custom_data  # from null on the wire, or a caller
    if not isinstance(custom_data, Mapping):
        return msg
    if type(custom_data) is not dict:  # such as a MultiDict, of which ** takes one value for each key
        try:
            custom_data = _CUSTOM_DATA.deserialize(custom_data)
        except ValidationError:
            return msg
    found = {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    return Msg(msg.type, msg.record.replace(custom_data={**found, **custom_data}))
