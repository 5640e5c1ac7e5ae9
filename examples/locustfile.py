"""A load test of an agent: each user is a service that sends ten records a second.

locust -f examples/locustfile.py --headless --users 20 --spawn-rate 20 --run-time 30s --host unix:///run/agent.sock

Without --headless, the same on the page http://localhost:8089. For an agent to try it with: geventaudit listen.
"""

from locust import constant_throughput, task

from geventaudit import AuditType, CallerIdentity, CallerIdentityType, Msg, OperationCategory, Record
from geventaudit.integrations.locust import AuditUser

RECORD = Record(
    operation_name="ReadSecret",
    operation_categories=[OperationCategory.KEY_MANAGEMENT],
    operation_access_level="Reader",
    caller_agent="locust",
    caller_ip_address="192.0.2.7",
    caller_identities={CallerIdentityType.USERNAME: [CallerIdentity("operator", "on the host")]},
    caller_access_levels=["Reader"],
    target_resources={"Secret": []},
)


class Service(AuditUser):
    client_options = {"stamp": True}  # noqa: RUF012  (as Locust's own attributes)
    wait_time = constant_throughput(10)

    @task
    def read_secret(self) -> None:
        self.client.send(Msg(AuditType.DATA_PLANE, RECORD))
