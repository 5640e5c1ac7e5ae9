"""An independent receiver: the Forward server of the npm package @fluent-org/logger decodes what this library sends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess
from helpers import SERVICE_TREE_ID, mapping, message

from geventaudit import TCP, AuditType, Client, DomainSocket, Msg, OperationCategory

VERSION = "1.0.10"
pytestmark = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")), reason="needs node and npm to run @fluent-org/logger"
)


@pytest.fixture(scope="module")
def modules(pytestconfig: pytest.Config) -> Path:
    """The package, installed once and kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("fluent-org-logger-" + VERSION)
    if not (folder / "node_modules" / "@fluent-org" / "logger").is_dir():
        subprocess.check_call(
            ["npm", "install", "--silent", "--no-fund", "--no-audit", f"@fluent-org/logger@{VERSION}"],
            cwd=folder,
            timeout=300,
        )
    return folder / "node_modules"


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
