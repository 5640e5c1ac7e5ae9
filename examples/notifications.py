"""A service that knows how its audit trail is doing: a greenlet reads the client's notifications.

python examples/notifications.py
"""

import os
import tempfile

import gevent

import geventaudit
from geventaudit import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record
from geventaudit.agent import Agent

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


def watch(client: geventaudit.Client) -> None:
    for notification in client.notify():
        print(notification.kind, "-", notification.error or "")
        for message in notification.undelivered:
            print("  not delivered:", message)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "agent.sock")
        agent = Agent(path, print)
        client = geventaudit.Client(lambda: geventaudit.DomainSocket(path), stamp=True)
        watching = gevent.spawn(watch, client)
        client.send(Msg(AuditType.DATA_PLANE, RECORD))  # the agent does not exist yet: that is no reason to wait
        gevent.sleep(0.05)
        agent.start()
        client.flush(timeout=5.0)
        agent.restart()
        client.send(Msg(AuditType.DATA_PLANE, RECORD))
        client.flush(timeout=5.0)
        client.close()
        watching.join()
        agent.stop()


if __name__ == "__main__":
    main()
