"""The counts of a whole trail."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from ..records import OperationResult
from ..schema.fields import SENDABLE
from ..verify.parsing import Parsed
from ..verify.records import TIME_KEYS, kind_of, seconds_of
from .counting import BoundedCounts, SeenNumbers, Timeline
from .fields import FIELDS, callers_of, has_unknown, name_of, names_of, status_of

__all__ = ["FAILED", "NO_SERVICE", "OUTCOMES", "Summary", "moment"]

OUTCOMES = ("Success", "Failure", "Unknown")
"""The results that are counted over time."""

FAILED = OUTCOMES.index("Failure")

NO_SERVICE = "(none: its client has no service_tree_id)"

_FAILURE = OperationResult.FAILURE.value
_OUTCOME_PLACES = {OperationResult.SUCCESS.value: 0, _FAILURE: FAILED}
_TYPES = {kind.value: name for name, kind in SENDABLE.items()}
_MAX_SECOND = 253_402_300_799  # the last one that a datetime can show
_MAX_ROUTES = 1000


class Summary:
    """Counts each record once: the first copy of each number of a stream. Feed it the records of the trail."""

    def __init__(self) -> None:
        self.records = 0
        """Different records, without those that the clients write about their streams."""
        self.checkpoints = 0
        self.duplicates = 0
        """Copies of records that were counted before."""
        self.left_out = 0
        """Records that are not counted, since no key authenticates them."""
        self.undated = 0
        """Records without a time."""
        self.first: int | None = None
        """The earliest second, since 1970."""
        self.last: int | None = None
        self.services = BoundedCounts()
        self.types = BoundedCounts()
        self.operation_types = BoundedCounts()
        self.results = BoundedCounts()
        self.categories = BoundedCounts()
        self.operations = BoundedCounts()
        self.callers = BoundedCounts()
        self.statuses = BoundedCounts()
        """HTTP status codes of failures."""
        self.unknown = {field: BoundedCounts(_MAX_ROUTES) for field in FIELDS}
        """By field: the operations whose records do not know it."""
        self.timeline = Timeline(len(OUTCOMES))
        self.seen = SeenNumbers()

    def add(self, record: Parsed) -> None:
        """Count one record."""
        body, envelope, stamp, _, before = record
        if stamp is not None:
            stream, seq = stamp.get("stream"), stamp.get("seq")
            if type(stream) is str and type(seq) is int and not self.seen.add(stream, seq):
                self.duplicates += 1
                return
            if "checkpoint" in stamp:
                self.checkpoints += 1
                return
        self._count(body, {**before, **envelope}, stamp)

    def _count(self, body: dict[str, Any], envelope: dict[str, Any], stamp: dict[str, Any] | None) -> None:
        self.records += 1
        operation, result = name_of(body.get("OperationName")), body.get("OperationResult")
        failures = 1 if result == _FAILURE else 0
        tag = stamp.get("tag") if stamp is not None else kind_of(envelope)
        service = body.get("env_ikey")
        self.services.add(NO_SERVICE if service is None else name_of(service), failures)
        self.types.add(_TYPES.get(tag, "(unknown)") if type(tag) is str else "(unknown)", failures)
        self.operation_types.add(name_of(body.get("OperationType")), failures)
        self.results.add(name_of(result), failures)
        self.operations.add(operation, failures)
        for name in names_of(body.get("OperationCategories")):
            self.categories.add(name, failures)
        for name in callers_of(body.get("CallerIdentities")):
            self.callers.add(name, failures)
        if failures and (status := status_of(body)):
            self.statuses.add(status, failures)
        for field, routes in self.unknown.items():
            if has_unknown(body.get(field)):
                routes.add(operation, failures)
        self._count_time(_second_of(stamp, envelope), _OUTCOME_PLACES.get(result, 2) if type(result) is str else 2)

    def _count_time(self, second: int | None, outcome: int) -> None:
        if second is None:
            self.undated += 1
            return
        self.first = second if self.first is None or second < self.first else self.first
        self.last = second if self.last is None or second > self.last else self.last
        self.timeline.add(second, outcome)

    def unknown_share(self, field: str) -> float:
        """Return the share of records that do not know a field, from 0 to 1."""
        return self.unknown[field].total / self.records if self.records else 0.0

    def approximations(self) -> list[str]:
        """Return the reasons for which some counts may be wrong; none if all are exact."""
        counters = {f"operations with an unknown {field}": routes for field, routes in self.unknown.items()}
        counters |= {"services": self.services, "operations": self.operations, "categories": self.categories}
        counters |= {"callers": self.callers, "operation types": self.operation_types, "results": self.results}
        found = [
            f"{name}: too many different ones to hold; each count may be up to {counts.error} too low"
            for name, counts in counters.items()
            if counts.error
        ]
        if not self.seen.is_exact:
            found.append("duplicates: too many gaps to hold; some records may be counted twice")
        return found


def moment(second: int | None) -> str:
    """Return a time for people, in UTC."""
    return "unknown" if second is None else datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _second_of(stamp: dict[str, Any] | None, envelope: dict[str, Any]) -> int | None:
    """Return the time of a record in seconds since 1970; None if it has none that a datetime can show."""
    if stamp is not None and type(time := stamp.get("time")) is str:
        return _parsed_second(f"{time[:19]}Z")
    for key in TIME_KEYS:
        if key in envelope:
            seconds = seconds_of(envelope[key])
            return int(seconds) if seconds is not None and 0 <= seconds <= _MAX_SECOND else None
    return None


@lru_cache(4096)
def _parsed_second(text: str) -> int | None:
    seconds = seconds_of(text)
    return int(seconds) if seconds is not None and 0 <= seconds <= _MAX_SECOND else None
