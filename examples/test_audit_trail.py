"""Tests of a service's audit trail, with the fixtures that geventaudit brings to pytest.

cd examples && python -m pytest test_audit_trail.py
"""

from wsgiref.util import setup_testing_defaults

import gunicorn_app
import pytest

from geventaudit import Client, TargetResource
from geventaudit.testing import AuditAgent


@pytest.fixture(autouse=True)
def _audited_by_the_fixture(audit_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gunicorn_app, "client", audit_client)


def get(path: str) -> None:
    environ = {"PATH_INFO": path, "HTTP_USER_AGENT": "tests/1.0"}
    setup_testing_defaults(environ)
    assert gunicorn_app.application(environ, lambda status, headers: None) == [b"done\n"]


def test_a_request_is_on_record(audit_agent: AuditAgent) -> None:
    get("/things/7")
    audit_agent.assert_received(
        operation_name="GetThing", caller_agent="tests/1.0", target_resources={"Thing": [TargetResource("/things/7")]}
    )


def test_no_request_is_lost_when_the_agent_restarts(audit_agent: AuditAgent) -> None:
    get("/before")
    audit_agent.restart()
    get("/after")
    arrived = audit_agent.wait_for(2)
    assert {"/before", "/after"} == {msg.record.target_resources["Thing"][0].name for msg in arrived}
