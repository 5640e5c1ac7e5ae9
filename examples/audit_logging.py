"""Audit records by way of logging: one log call, read by people in the log and by the agent as a record.

python examples/audit_logging.py
"""

import logging
import os
import tempfile

import geventaudit
from geventaudit import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record
from geventaudit.agent import Agent
from geventaudit.integrations.logging import AuditHandler

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

logger = logging.getLogger("app")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "agent.sock")
        with (
            Agent(path, lambda received: print("arrived:", received.message)),
            geventaudit.Client(lambda: geventaudit.DomainSocket(path), stamp=True) as client,
        ):
            logger.addHandler(AuditHandler(client))
            logger.info("a secret was read", extra={"audit": Msg(AuditType.DATA_PLANE, RECORD)})
            logger.info("this is for the log alone")


if __name__ == "__main__":
    main()
