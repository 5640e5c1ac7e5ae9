"""The Fluent Bit configurations of ``examples/agents`` as they are, but for paths, ports and the far ends."""

from __future__ import annotations

import signal
import stat
from functools import partial
from pathlib import Path
from typing import Any

import gevent
import pytest
from fluent_bit import KEY, QUICK, Certificates, FluentBit, fluent_bit, needs_fluent_bit
from helpers import eventually, message

from geventaudit import TCP, AuditType, Client, DomainSocket, Msg
from geventaudit.agent import Agent, Received

yaml = pytest.importorskip("yaml", reason="needs pyyaml, which the extra [test] brings")
pytestmark = [needs_fluent_bit, pytest.mark.slow]

AGENTS = Path(__file__).parent.parent.parent / "examples" / "agents"
FILES = ["fluent-bit.yaml", "kubernetes/sidecar.yaml", "kubernetes/daemonset.yaml"]
RECORDS = 20_000
KILLS = 10


def example(name: str) -> Any:
    """The configuration of Fluent Bit in a file, or in the manifest's ConfigMap."""
    for document in yaml.safe_load_all((AGENTS / name).read_text()):
        if "pipeline" in document:
            return document
        if document["kind"] == "ConfigMap":
            return yaml.safe_load(document["data"]["fluent-bit.yaml"])
    raise AssertionError(name)


def here(name: str, folder: Path, certificates: Certificates, agent: FluentBit) -> dict[str, Any]:
    """The example with the paths and ports of this test, and a file in place of its outputs."""
    config: dict[str, Any] = example(name)
    config["service"]["storage.path"] = str(folder / "storage")
    for each in config["pipeline"]["inputs"]:
        if "unix_path" in each:
            each["unix_path"] = agent.path
        else:
            each |= {"listen": "127.0.0.1", "port": agent.port}
            each |= {"tls.crt_file": certificates.certificate_file, "tls.key_file": certificates.key_file}
    config["pipeline"]["outputs"] = [agent.file_output]
    return config


@pytest.mark.parametrize("name", FILES)
def test_killed_ten_times_under_load(name: str, folder: Path) -> None:
    """Acknowledged records are on disk, and arrive after the next start."""
    certificates = Certificates(folder)
    options: dict[str, Any] = {
        "configuration": partial(here, name, folder, certificates),
        "environment": {"AUDIT_SHARED_KEY": KEY},
    }
    with fluent_bit(folder, **options) as agent:
        assert stat.S_IMODE(Path(agent.path).stat().st_mode) == 0o660
        with Client(lambda: agent.connect(require_ack=True), backoff=QUICK, json_safe=True) as client:

            def send() -> None:
                for number in range(RECORDS):
                    client.send(message(number), timeout=120.0)

            sending = gevent.spawn(send)

            def is_due(kill: int) -> bool:
                stats = client.stats()
                return stats.connected and stats.delivered >= kill * RECORDS // (KILLS + 1)

            for kill in range(1, KILLS + 1):
                eventually(partial(is_due, kill), timeout=120.0)
                agent.end(signal.SIGKILL)
                agent.start()
            sending.get(timeout=300)
            assert client.flush(120.0)
            assert client.stats().delivered == RECORDS
        assert set(agent.settled_numbers(10.0)) == set(range(RECORDS))
        assert "format check failed" not in agent.log()


def test_both_inputs_and_the_type_of_each_record(folder: Path) -> None:
    certificates = Certificates(folder)
    options: dict[str, Any] = {
        "configuration": partial(here, FILES[0], folder, certificates),
        "environment": {"AUDIT_SHARED_KEY": KEY},
    }
    with fluent_bit(folder, **options) as agent:

        def over_unix() -> DomainSocket:
            return DomainSocket(agent.path, require_ack=True)

        def over_tls() -> TCP:
            context = certificates.client()
            return TCP(("127.0.0.1", agent.port), ssl=context, shared_key=KEY, require_ack=True)

        for factory in (over_unix, over_tls):
            with Client(factory, backoff=QUICK, json_safe=True) as client:
                client.send(Msg(AuditType.DATA_PLANE, message(1).record))
                client.send(Msg(AuditType.CONTROL_PLANE, message(2).record))
                assert client.flush(10.0)
        eventually(lambda: len(agent.lines()) >= 6)
        records = agent.records()
    found = sorted((each["CustomData"]["n"], each["AuditType"]) for each in records)
    assert found == [(1, "DataPlane"), (1, "DataPlane"), (2, "ControlPlane"), (2, "ControlPlane")]


def test_its_records_passed_on_to_this_project_s_agent(folder: Path) -> None:
    """The type that the example's filters add is kept beside the record."""
    got: list[Received] = []
    with Agent(("127.0.0.1", 0), got.append) as receiver:

        def onward(agent: FluentBit) -> dict[str, Any]:
            config = here(FILES[0], folder, Certificates(folder), agent)
            assert isinstance(receiver.address, tuple)
            where = {"host": "127.0.0.1", "port": receiver.address[1], "require_ack_response": True}
            config["pipeline"]["outputs"] = [{"name": "forward", "match": "AsmAudit*", **where}]
            return config

        with fluent_bit(folder, configuration=onward, environment={"AUDIT_SHARED_KEY": KEY}) as agent:
            with Client(lambda: agent.connect(require_ack=True), backoff=QUICK, json_safe=True) as client:
                client.send(Msg(AuditType.DATA_PLANE, message(1).record))
                client.send(Msg(AuditType.CONTROL_PLANE, message(2).record))
                assert client.flush(10.0)
            eventually(lambda: len(got) >= 3, f"{receiver.counts}")
        assert receiver.counts.refused == 0
    assert {each.extra["AuditType"] for each in got} == {"DataPlane", "ControlPlane", "Heartbeat"}
    messages = [each.message for each in got if isinstance(each.message, Msg)]
    assert sorted(messages, key=lambda each: each.type) == [
        Msg(AuditType.CONTROL_PLANE, message(2).record),
        Msg(AuditType.DATA_PLANE, message(1).record),
    ]
