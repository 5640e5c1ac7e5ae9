"""The quick start, complete: an agent of its own on a temporary socket, one record, and its arrival.

python examples/quickstart.py
"""

from gevent import monkey

monkey.patch_all()

import os
import tempfile

import geventaudit
from geventaudit import (
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
from geventaudit.agent import Agent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "agent.sock")
        with (
            Agent(path, lambda received: print("arrived:", received.message)),
            geventaudit.Client(
                lambda: geventaudit.DomainSocket(path),
                service_tree_id="e6c9fcb1-7f08-4c1d-9e7a-123456789abc",
                stamp=True,  # number the records, so that a gap is seen
            ) as client,
        ):
            client.send(
                Msg(
                    AuditType.CONTROL_PLANE,
                    Record(
                        operation_name="CreateUser",
                        operation_categories=[OperationCategory.USER_MANAGEMENT],
                        operation_type=OperationType.CREATE,
                        operation_result=OperationResult.SUCCESS,
                        operation_access_level="Contributor",
                        caller_agent="agent/1.0",
                        caller_ip_address="192.0.2.7",
                        caller_identities={CallerIdentityType.UPN: [CallerIdentity("user@example.com", "the caller")]},
                        caller_access_levels=["Reader"],
                        target_resources={"SubscriptionId": [TargetResource("res1", region="westeurope")]},
                        custom_data={"ticket": 4711},
                    ),
                )
            )
            print("delivered:", client.flush(timeout=5.0))


if __name__ == "__main__":
    main()
