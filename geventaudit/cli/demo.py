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
from ..agent.shown import line_of
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
from ..transport import DomainSocket
from ..version import __version__
from .terminal import Progress

__all__ = ["demo"]


def demo(records: int) -> bool:
    """Send *records* records, and print how many arrived. Return True if all did."""
    arrived: Counter[int] = Counter()
    samples: list[str] = []

    def receive(received: Received) -> None:
        if isinstance(received.message, Msg):
            arrived[received.message.record.custom_data["number"]] += 1
            progress.advance(1)
            if len(samples) < 3:
                samples.append(line_of(received))

    with tempfile.TemporaryDirectory(prefix="geventaudit-") as folder, Progress(records, " records") as progress:
        path = os.path.join(folder, "agent.sock")
        agent = Agent(path, receive).start()
        client = Client(lambda: DomainSocket(path), backoff=Backoff(initial=0.05, maximum=0.5), queue_size=4096)
        began = monotonic()
        count = min(300, records)
        progress.say(f"{count} greenlets send {records} records to an agent that is restarted twice ...", sys.stdout)
        senders = [gevent.spawn(_send, client, range(first, records, count)) for first in range(count)]
        try:
            restarts = 0
            while restarts < 2 or not _all_done(senders):
                gevent.sleep(0.02)
                if restarts < 2 and len(arrived) >= records * (restarts + 1) // 3:
                    # The data that it had not read is gone, as after a crash.
                    agent.restart(timeout=0)
                    restarts += 1
                    progress.say(f"  {len(arrived)} arrived; the agent was restarted", sys.stdout)
            delivered = client.flush(timeout=30)
            seconds = monotonic() - began
        finally:
            # After Ctrl-C: no waiting, and no errors of the greenlets that send.
            gevent.killall(senders)
            client.close(timeout=0)
            agent.stop()
        stats = client.stats()
    lost = records - len(arrived)
    print("  all delivered\n" if delivered else "  not all was delivered in time\n")
    for name, value in (
        ("accepted", stats.accepted),
        ("delivered", stats.delivered),
        ("resent", stats.resent),
        ("lost", lost),
        ("duplicates", sum(arrived.values()) - len(arrived)),
        ("records/s, validated on both sides", round(stats.delivered / seconds)),
    ):
        print(f"  {name:<36}{value:>8}")
    print("\nSome of them, as they arrived:")
    for line in samples:
        print(f"  {line}")
    return delivered and not lost


def _all_done(greenlets: Sequence[Any]) -> bool:
    """Return True if all have ended. Raise the error of one of them."""
    for greenlet in greenlets:
        if greenlet.exception is not None:
            raise greenlet.exception
    return all(greenlet.ready() for greenlet in greenlets)


def _send(client: Client, numbers: range) -> None:
    template = Record(
        operation_name="RotateKey",
        operation_categories=[OperationCategory.KEY_MANAGEMENT],
        operation_type=OperationType.UPDATE,
        operation_result=OperationResult.SUCCESS,
        operation_access_level="Contributor",
        caller_agent=f"geventaudit-demo/{__version__}",
        caller_ip_address="192.0.2.7",
        caller_identities={CallerIdentityType.UPN: [CallerIdentity("user@example.com", "the caller")]},
        caller_access_levels=["Contributor"],
        target_resources={"Vault": [TargetResource("demo-vault", region="westeurope")]},
    )
    for number in numbers:
        client.send(Msg(AuditType.CONTROL_PLANE, template.replace(custom_data={"number": number})), timeout=30.0)
