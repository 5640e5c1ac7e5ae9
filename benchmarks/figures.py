"""The catalogue of the figures, by name, in a long and in a quick form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from . import cost, footprint, receivers, throughput
from .measure import Row

__all__ = ["FIGURES", "Figure"]


class Figure(NamedTuple):
    """A function that returns rows of the table, and its arguments: the rounds, then the amount of each."""

    take: Callable[..., list[Row]]
    full: tuple[Any, ...]
    quick: tuple[Any, ...]

    @property
    def summary(self) -> str:
        """The first sentence of the docstring of the function."""
        return " ".join((self.take.__doc__ or "").split()).partition(". ")[0].rstrip(".")


FIGURES = {
    "end-to-end": Figure(throughput.end_to_end, (5, 20_000), (5, 4_000)),
    "callers": Figure(throughput.many_callers, (5, 20_000), (5, 4_000)),
    "send": Figure(cost.valid_record, (9, 10), (5, 2)),
    "invalid": Figure(cost.invalid_record, (9, 8), (5, 2)),
    "greenlets": Figure(cost.greenlets, (5, 20_000), (5, 10_000)),
    "size": Figure(cost.record_size, (9, 4_000), (5, 1_000)),
    "kinds": Figure(cost.record_kinds, (9, 20), (5, 2)),
    "building": Figure(cost.records_and_clients, (9, 2_000), (5, 500)),
    "hub": Figure(footprint.hub_hold, (7, 2.0), (5, 0.5)),
    "disk": Figure(footprint.disk_hold, (5, 3.0), (5, 0.5)),
    "memory": Figure(footprint.queue_memory, (5, 5_000), (5, 1_000)),
    "import": Figure(footprint.import_time, (11,), (7,)),
    "options": Figure(throughput.acks_tls_spool, (5, 10_000), (5, 4_000)),
    "fluent-logger-js": Figure(receivers.fluent_logger_js, (5, 50_000), (5, 30_000)),
    "fluent-bit": Figure(receivers.fluent_bit, (5, 200_000), (5, 10_000)),
}
