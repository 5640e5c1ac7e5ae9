"""Records per second, end to end."""

from __future__ import annotations

from functools import partial

from .contenders import CONTENDERS, rate, why_not
from .measure import Bound, Row, Samples, Spread, interleave, ratios

__all__ = ["acks_tls_spool", "end_to_end", "many_callers"]

_UNIT = "records/s"


def end_to_end(rounds: int, records: int) -> list[Row]:
    """geventaudit over each of its peers; and the reading process, over geventaudit."""
    peers = ["fluent-async", "fluent-async-threads", "fluent", "opentelemetry-body", "opentelemetry", "logging"]
    samples = _rates(["geventaudit", "pure", *peers, "bare"], rounds, records)
    bounds = {
        "fluent-async": (Bound("at least", 3.5), Bound("at least", 4.5)),
        "opentelemetry": (Bound("at least", 8.0), Bound("at least", 10.0)),
        "opentelemetry-body": (Bound("at least", 4.0), Bound("at least", 5.0)),
    }
    rows = []
    for peer in peers:
        bar, aim = bounds.get(peer, (None, None))
        name = f"records/s over {CONTENDERS[peer].label}"
        rows.append(_row(name, samples, "geventaudit", peer, bar, aim))
    pure = Bound("at least", 1.0), Bound("at least", 1.4)
    rows.append(_row("records/s over fluent-logger asyncsender, plain Python", samples, "pure", "fluent-async", *pure))
    rows.append(_row("records/s that the reading process can take", samples, "bare", "geventaudit"))
    return rows


def many_callers(rounds: int, records: int) -> list[Row]:
    """geventaudit over fluent-logger's asyncsender, where no two records in a row have the same caller."""
    samples = _rates(["many-callers", "fluent-async-many"], rounds, records)
    name = f"records/s over {CONTENDERS['fluent-async-many'].label}"
    bounds = Bound("at least", 3.3), Bound("at least", 4.5)
    return [_row(name, samples, "many-callers", "fluent-async-many", *bounds)]


def acks_tls_spool(rounds: int, records: int) -> list[Row]:
    """geventaudit with something more, over geventaudit without it."""
    pairs = [
        ("acks", "geventaudit", "acknowledgements over none"),
        ("tls", "tcp", "TLS over plain TCP"),
        ("spool-overflow", "geventaudit", "a spool for what overflows over none"),
        ("spool-always", "geventaudit", "a spool for everything over none"),
        ("spool-always-greenlets", "greenlets", "a spool for everything over none, 200 greenlets"),
    ]
    bars = {"spool-always-greenlets": (Bound("at least", 0.5), Bound("at least", 0.6))}
    here = [pair for pair in pairs if not why_not(pair[0])]
    samples = _rates(list(dict.fromkeys(name for pair in here for name in pair[1::-1])), rounds, records)
    rows = []
    for with_it, without, title in pairs:
        name = f"records/s, {title}"
        reason = why_not(with_it)
        bounds = bars.get(with_it, ())
        rows.append(Row(name, None, note=reason) if reason else _row(name, samples, with_it, without, *bounds))
    return rows


def _rates(names: list[str], rounds: int, records: int) -> Samples:
    return interleave({name: partial(rate, name, records) for name in names}, rounds)


def _row(name: str, samples: Samples, over: str, under: str, bar: Bound | None = None, aim: Bound | None = None) -> Row:
    absolute = {f"{CONTENDERS[each].label}, {_UNIT}": Spread.of(samples[each]) for each in (over, under)}
    return Row(name, ratios(samples[over], samples[under]), bar=bar, aim=aim, absolute=absolute)
