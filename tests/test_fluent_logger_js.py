"""The Forward server of the npm package @fluent-org/logger decodes the frames of this library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess
from helpers import SERVICE_TREE_ID, mapping, message

from geventaudit import (
    TCP,
    AuditType,
    Backoff,
    Client,
    ConnectionFailedError,
    DomainSocket,
    Msg,
    NotificationKind,
    OperationCategory,
)
from geventaudit.agent import Agent

pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm to run @fluent-org/logger"
)


@pytest.fixture
def modules(node_modules: Callable[[], Path]) -> Path:
    return node_modules()


@contextmanager
def serving(modules: Path, **options: Any) -> Iterator[Any]:
    process = subprocess.Popen(
        ["node", str(Path(__file__).parent / "fluent_server.js"), str(modules), json.dumps(options)],
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            yield process, json.loads(process.stdout.readline())["port"]
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_it_receives_and_decodes_the_same_records(modules: Path, kind: str, socket_path: str) -> None:
    listen = {"path": socket_path} if kind == "unix" else {"host": "127.0.0.1", "port": 0}
    with serving(modules, listenOptions=listen) as (server, port):

        def factory() -> DomainSocket | TCP:
            return DomainSocket(socket_path) if kind == "unix" else TCP(("127.0.0.1", port))

        with Client(factory, service_tree_id=SERVICE_TREE_ID) as client:
            for number in range(500):
                client.send(message(number))
            client.send(
                Msg(
                    AuditType.DATA_PLANE,
                    message(
                        operation_categories=[OperationCategory.EUII, OperationCategory.USER_MANAGEMENT],
                        operation_name="Größe 😀",
                        custom_data={"deep": [1, {"b": None}], "text": "x" * 70_000, "f": 0.5, "t": True},
                    ).record,
                )
            )
            assert client.flush(30)
            entries = [json.loads(server.stdout.readline()) for _ in range(502)]
    records = [each for each in entries if each["tag"] != "AsmAuditHB"]
    (beat,) = (each for each in entries if each["tag"] == "AsmAuditHB")
    assert beat["record"]["AsmAuditServiceId"] == SERVICE_TREE_ID
    assert [each["record"]["CustomData"].get("n") for each in records] == [*range(500), None]
    expected = mapping(
        env_ikey=SERVICE_TREE_ID,
        CustomData={"n": 0},
        OperationResultDescription="",
        OperationCategoryDescription="",
        TargetResources={"SubscriptionId": [{"Name": "res1", "Cluster": "", "DataCenter": "", "Region": "westeurope"}]},
    )
    expected["OperationResultDescription"] = expected["OperationCategoryDescription"] = ""
    assert records[0]["record"] == expected
    assert records[0]["tag"] == "AsmAuditCP"
    assert records[-1]["tag"] == "AsmAuditDP"
    assert records[-1]["record"]["OperationName"] == "Größe 😀"
    assert records[-1]["record"]["OperationCategories"] == ["UserManagement", "EUII"]
    assert records[-1]["record"]["CustomData"]["text"] == "x" * 70_000


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_it_acknowledges(modules: Path, kind: str, socket_path: str) -> None:
    listen = {"path": socket_path} if kind == "unix" else {"host": "127.0.0.1", "port": 0}
    with serving(modules, listenOptions=listen) as (server, port):

        def factory() -> DomainSocket | TCP:
            if kind == "unix":
                return DomainSocket(socket_path, require_ack=True)
            return TCP(("127.0.0.1", port), require_ack=True)

        with Client(factory) as client:
            for number in range(500):
                client.send(message(number))
            assert client.flush(30)
            assert client.stats().delivered == 500
            assert client.stats().connects == 1
        entries = [json.loads(server.stdout.readline()) for _ in range(501)]
    assert [each["record"]["CustomData"]["n"] for each in entries if each["tag"] == "AsmAuditCP"] == list(range(500))


SECURITY = {
    "serverHostname": "the-agent", "sharedKey": "geheim", "authorize": True, "userDict": {"alice": "rabbit"},
}  # fmt: skip


@pytest.mark.parametrize("authorize", [False, True], ids=["key", "key and user"])
def test_our_client_shakes_hands_with_its_server(modules: Path, authorize: bool) -> None:
    security = {**SECURITY, "authorize": authorize}
    listen = {"host": "127.0.0.1", "port": 0}
    with serving(modules, listenOptions=listen, security=security) as (server, port):

        def factory(shared_key: str = "geheim", password: str = "rabbit") -> TCP:
            return TCP(
                ("127.0.0.1", port), shared_key=shared_key, username="alice", password=password, require_ack=True
            )

        with Client(factory) as client:
            client.send(message(1))
            assert client.flush(30)
            assert json.loads(server.stdout.readline())["record"]["CustomData"] == {"n": 1}
        with pytest.raises(ConnectionFailedError, match=r"refuse|hung up"):
            factory(shared_key="wrong")
        if authorize:
            with pytest.raises(ConnectionFailedError, match=r"refuse|hung up"):
                factory(password="wrong")
        with Client(lambda: TCP(("127.0.0.1", port)), backoff=Backoff(initial=0.05)) as client:
            client.send(message(2))
            lost = next(each for each in client.notify() if each.kind is NotificationKind.CONNECTION_LOST)
            assert "asks for a shared key" in str(lost.error)
            client.close(timeout=0)


@pytest.mark.parametrize("users", [None, {"alice": "rabbit"}], ids=["key", "key and user"])
@pytest.mark.parametrize("key", ["geheim", "wrong"])
def test_its_client_shakes_hands_with_our_agent(modules: Path, users: Any, key: str) -> None:
    got: list[Any] = []
    record = mapping(OperationResultDescription="x", OperationCategoryDescription="y", CustomData=None)
    with Agent(("127.0.0.1", 0), got.append, shared_key="geheim", users=users) as agent:
        options = {
            "socket": {"host": agent.address[0], "port": agent.address[1], "reconnectEnabled": False},
            "security": {"clientHostname": "a-client", "sharedKey": key, "username": "alice", "password": "rabbit"},
            "ack": {"ackTimeout": 5000},
            "eventMode": "Forward",
        }
        script = str(Path(__file__).parent / "fluent_client.js")
        process = subprocess.Popen(
            ["node", script, str(modules), json.dumps(options), "AsmAuditCP", json.dumps(record), "100"],
            stderr=subprocess.PIPE,
        )
        with process:
            errors = process.communicate(timeout=60)[1]
        if key == "geheim":
            assert process.returncode == 0, errors
            assert sorted(each.message.record.custom_data["n"] for each in got) == list(range(100))
            assert agent.counts.acks >= 1
        else:
            assert not got
            assert agent.counts.turned_away >= 1
