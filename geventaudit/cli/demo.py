"""The main job in one process: greenlets send, the agent is restarted under them, nothing is lost."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import gevent

from ..agent import Agent, Received
from ..backoff import Backoff
from ..client import Client
from ..records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from ..runtime.clock import monotonic
from ..stats import Stats
from ..transport import DomainSocket
from ..version import __version__
from .terminal import LiveLine, Progress, coloured, table

__all__ = ["demo"]


_LIVE_SECONDS = 0.1  # between two looks of the live line


class _Arrivals:
    """The records that arrived at the agent, by their stamps."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        """The numbers of the records. Each record has one."""
        self.times: Counter[tuple[str, int]] = Counter()
        """The number of times that each ``(stream, seq)`` arrived."""
        self.samples: dict[str, list[str]] = {}
        """The first record of each operation: a row of a table."""

    def __call__(self, received: Received) -> None:
        if not isinstance(received.message, Msg):
            return
        record = received.message.record
        stamp = record.custom_data["geventaudit"]
        self.numbers.add(record.custom_data["number"])
        self.times[stamp["stream"], stamp["seq"]] += 1
        if record.operation_name not in self.samples:
            ((kind, targets),) = record.target_resources.items()
            ((identity,),) = record.caller_identities.values()
            self.samples[record.operation_name] = [
                record.operation_name,
                record.operation_result,
                identity.identity,
                f"{kind}/{targets[0].name}",
                str(stamp["seq"]),
                record.operation_result_description,
            ]

    @property
    def duplicates(self) -> int:
        return sum(self.times.values()) - len(self.times)


def demo(records: int) -> bool:
    """Send *records* records, and print how many arrived. Return True if all did."""
    arrivals = _Arrivals()
    with tempfile.TemporaryDirectory(prefix="geventaudit-") as folder, LiveLine() as live:
        path = os.path.join(folder, "agent.sock")
        agent = Agent(path, arrivals).start()
        backoff = Backoff(initial=0.05, maximum=0.5)
        client = Client(lambda: DomainSocket(path), backoff=backoff, queue_size=4096, stamp=True)
        began = monotonic()
        count = min(300, records)
        Progress.say(f"{count} greenlets send {records} records to an agent that is restarted twice ...", sys.stdout)
        senders = [gevent.spawn(_send, client, range(first, records, count)) for first in range(count)]
        try:
            restarts, looked = 0, began - _LIVE_SECONDS
            while restarts < 2 or not _all_done(senders):
                gevent.sleep(0.02)
                now = monotonic()
                if now - looked >= _LIVE_SECONDS:
                    looked, arrived = now, len(arrivals.times)
                    rate = arrived / (now - began)
                    live.show(f"  {arrived:,} of {records:,} arrived, {rate:,.0f} records/s, restarts: {restarts}")
                if restarts < 2 and len(arrivals.times) >= records * (restarts + 1) // 3:
                    # The data that it had not read is gone, as after a crash.
                    agent.restart(timeout=0)
                    restarts += 1
                    Progress.say(f"  {len(arrivals.times)} arrived; the agent was restarted", sys.stdout)
            delivered = client.flush(timeout=30)
            seconds = monotonic() - began
        finally:
            # After Ctrl-C: no waiting, and no errors of the greenlets that send.
            gevent.killall(senders)
            client.close(timeout=0)
            agent.stop()
    lost = records - len(arrivals.numbers)
    print("  all delivered\n" if delivered else "  not all was delivered in time\n")
    _print_figures(client.stats(), arrivals, lost, seconds)
    print("\nThe first record of each operation, as it arrived:\n")
    for line in table(
        [["operation", "result", "caller", "target", "seq", "reason"], *arrivals.samples.values()], right=[4]
    ):
        print(f"  {line}")
    return delivered and not lost


def _print_figures(stats: Stats, arrivals: _Arrivals, lost: int, seconds: float) -> None:
    unread = max(stats.resent - arrivals.duplicates, 0)
    rows = [
        ["accepted", str(stats.accepted), "send() returned"],
        ["delivered", str(stats.delivered), "the agent has read them, as far as the client can know"],
        ["lost", str(lost), "accepted, and never arrived"],
        ["resent", str(stats.resent), "written again: a restart hid whether the agent had read them"],
        ["  unread", str(unread), "the agent had not read them, so that the first copy was gone"],
        ["  duplicates", str(arrivals.duplicates), "the agent had read them, so that they arrived twice"],
        ["distinct", str(len(arrivals.times)), "after dropping duplicates by the stream and the seq of the stamp"],
        ["records/s", str(round(stats.delivered / seconds)), "validated on both sides"],
    ]
    for (name, *_), line in zip(rows, table(rows, right=[1]), strict=True):
        print(f"  {coloured(line, 'red' if lost else 'green', sys.stdout) if name == 'lost' else line}")


def _all_done(greenlets: Sequence[Any]) -> bool:
    """Return True if all have ended. Raise the error of one of them."""
    for greenlet in greenlets:
        if greenlet.exception is not None:
            raise greenlet.exception
    return all(greenlet.ready() for greenlet in greenlets)


def _send(client: Client, numbers: range) -> None:
    templates = _templates()
    for number in numbers:
        record = templates[number % len(templates)].replace(custom_data={"number": number})
        client.send(Msg(AuditType.CONTROL_PLANE, record), timeout=30.0)


def _templates() -> list[Record]:
    """Return records of five operations on a vault."""
    rotation = Record(
        operation_name="RotateKey",
        operation_categories=[OperationCategory.KEY_MANAGEMENT],
        operation_type=OperationType.UPDATE,
        operation_result=OperationResult.SUCCESS,
        operation_access_level="Contributor",
        caller_agent=f"geventaudit-demo/{__version__}",
        caller_ip_address="192.0.2.7",
        caller_identities={CallerIdentityType.UPN: [CallerIdentity("ann@example.com", "the caller")]},
        caller_access_levels=["Contributor"],
        target_resources={"Key": [TargetResource("signing", region="westeurope")]},
    )
    job = {CallerIdentityType.APPLICATION_ID: [CallerIdentity("backup-job", "the caller")]}
    return [
        rotation,
        rotation.replace(operation_name="CreateVault", operation_type=OperationType.CREATE).replace(
            target_resources={"Vault": [TargetResource("payments", region="westeurope")]}
        ),
        rotation.replace(operation_name="ReadSecret", operation_type=OperationType.READ, caller_identities=job).replace(
            target_resources={"Secret": [TargetResource("database", region="northeurope")]}
        ),
        rotation.replace(operation_name="DeleteVault", operation_type=OperationType.DELETE)
        .replace(target_resources={"Vault": [TargetResource("archive", region="westeurope")]})
        .replace(operation_result=OperationResult.FAILURE, operation_result_description="not an owner"),
        rotation.replace(operation_name="GrantRole", operation_categories=[OperationCategory.ROLE_MANAGEMENT]).replace(
            target_resources={"User": [TargetResource("bob@example.com")]}
        ),
    ]
