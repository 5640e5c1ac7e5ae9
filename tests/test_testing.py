"""The agent for other people's tests, and the pytest plugin, in real runs of pytest."""

from __future__ import annotations

import os
import socket as std_socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from unittest import mock

import gevent
import msgpack
import pytest
from gevent import subprocess
from helpers import eventually, mapping, message, once, record

from geventaudit import AuditType, Client, DomainSocket, Msg, TargetResource, ValidationError
from geventaudit.runtime import native
from geventaudit.testing import AuditAgent

SAMPLE = '''
import subprocess
import sys

import pytest
from helpers import message

import geventaudit

PROGRAM = """
import sys, geventaudit
from helpers import message
with geventaudit.Client(lambda: geventaudit.DomainSocket(sys.argv[1], require_ack=True)) as client:
    client.send(message(7))
    sys.exit(0 if client.flush(30) else 1)
"""


def test_arrives(audit_agent, audit_client):
    audit_client.send(message(1))
    (msg,) = audit_agent.wait_for(1)
    assert msg.record.custom_data == {"n": 1}
    assert audit_agent.assert_received(operation_name="CreateUser", custom_data={"n": 1}) == msg


def test_each_has_an_agent_of_its_own(audit_agent, audit_client):
    assert audit_agent.messages == []


def test_a_process_sends_while_the_test_waits_for_it(audit_agent):
    subprocess.run([sys.executable, "-c", PROGRAM, audit_agent.address], check=True, timeout=60)
    audit_agent.assert_received(custom_data={"n": 7})


def test_missing(audit_agent, audit_client):
    audit_client.send(message(1, operation_name="DeleteUser"))
    audit_agent.wait_for(1)
    audit_agent.assert_received(operation_name="CreateUser", custom_data={"n": 1}, timeout=0.1)
'''
MODES = """
import pytest
from helpers import message

from geventaudit.testing import AuditAgent

ALL = ["reads", "acks", "no_acks", "stalled", "away"]


@pytest.mark.parametrize("audit_agent", ALL, indirect=True)
def test_each_mode(audit_agent: AuditAgent, audit_client, request):
    mode = request.node.callspec.params["audit_agent"]
    audit_client.send(message(1))
    assert audit_client.flush(5.0 if mode in ("reads", "acks") else 0.1) is (mode in ("reads", "acks"))
    if mode in ("stalled", "away"):
        audit_agent.assert_not_received(operation_name="CreateUser")
        assert not audit_agent.received
        audit_agent.resume() if mode == "stalled" else audit_agent.start()
    if mode == "no_acks":
        audit_agent.assert_received(custom_data={"n": 1})
        assert not audit_client.flush(0.1)
        audit_agent.acknowledge(True)
        audit_agent.hang_up()
    assert audit_client.flush(10.0)
    audit_agent.assert_received(custom_data={"n": 1})


def test_without_a_mode(audit_agent, audit_client):
    audit_client.send(message(1))
    assert audit_client.flush(5.0)


def test_assert_not_received(audit_agent, audit_client):
    for number in range(100):
        audit_client.send(message(number))
    audit_agent.assert_not_received(custom_data={"n": 100})
    audit_agent.assert_not_received(timeout=0, custom_data={"n": 99})  # which waits for the own client


@pytest.mark.parametrize("audit_agent", ["stuck"], indirect=True)
def test_in_no_such_mode(audit_agent):
    pass
"""
LAZY = """
import sys

assert not {"gevent", "geventaudit", "ssl", "greenlet"} & set(sys.modules), "imported before the conftest"
"""


def run_pytest(folder: Path, conftest: str, *launcher: str, sample: str = SAMPLE) -> str:
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_sample.py").write_text(sample)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = once: of helpers.py\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        # The plugins of Locust and Hypothesis take a second to import, and are not tested here.
        [
            *(sys.executable, "-X", "dev", "-W", "error", *launcher),
            *("-p", "no:cacheprovider", "-p", "no:locust", "-p", "no:hypothesispytest", str(folder)),
        ],
        capture_output=True,
        timeout=120,
        check=False,
        env={**environment, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.stderr == b""
    return str(done.stdout.decode())


@once
@pytest.mark.parametrize(
    ("conftest", "launcher"),
    [
        (LAZY, ["-m", "pytest"]),
        (LAZY + "from gevent import monkey\nmonkey.patch_all()\n", ["-m", "pytest"]),
        ("from gevent import monkey\nassert monkey.saved\n", ["-m", "gevent.monkey", "--module", "pytest"]),
    ],
    ids=["unpatched", "patched in conftest", "patched before pytest"],
)
def test_the_plugin(folder: Path, conftest: str, launcher: list[str]) -> None:
    out = run_pytest(folder, conftest, *launcher)
    assert "1 failed, 3 passed" in out, out
    assert "geventaudit-" in out, "pytest names it among its plugins"
    complaint = [line.removeprefix("E").strip() for line in out.splitlines() if line.startswith("E ")]
    assert complaint[:5] == [
        "AssertionError: no record with operation_name='CreateUser', custom_data={'n': 1} arrived within 0.1 s",
        "the nearest of 1, 'DeleteUser', differs:",
        "operation_name:",
        "expected 'CreateUser'",
        "got      'DeleteUser'",
    ]
    assert ">       audit_agent.assert_received(" in out, "the line of the test is shown, and none of this library"
    assert "testing.py" not in out


@once
@pytest.mark.parametrize("launcher", [["-m", "pytest"], ["-m", "gevent.monkey", "--module", "pytest"]], ids=str)
def test_modes_and_assert_not_received_of_the_plugin(folder: Path, launcher: list[str]) -> None:
    out = run_pytest(folder, "", *launcher, sample=MODES)
    assert "1 failed, 6 passed, 1 error" in out, out
    assert "ValueError: mode must be one of reads, acks, no_acks, stalled, away, got 'stuck'" in out
    complaint = [line.removeprefix("E").strip() for line in out.splitlines() if line.startswith("E ")]
    assert "AssertionError: a record with custom_data={'n': 99} arrived:" in complaint
    assert "operation_name='CreateUser'" in complaint, "it is shown"
    assert ">       audit_agent.assert_not_received(timeout=0" in out, "the line of the test is shown"


# -- arrived records ---------------------------------------------------------------------------------------------------


def complaint_of(agent: AuditAgent, **fields: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        agent.assert_received(timeout=0.05, **fields)
    return str(caught.value)


def test_the_nearest_is_shown() -> None:
    with AuditAgent() as agent:
        assert complaint_of(agent, operation_name="x") == "no record with operation_name='x' arrived within 0.05 s"
        client = agent.make_client()
        client.send(message(1, operation_name="CreateUser"))
        client.send(message(2, operation_name="DeleteUsers", caller_agent="other"))
        client.send(message(3, operation_name="RotateKey"))
        agent.wait_for(3)
        text = complaint_of(agent, operation_name="DeleteUser", caller_agent="agent/1.0")
        assert "'CreateUser', differs:\n  operation_name:" in text, "one field off is nearer than two"
        text = complaint_of(agent, operation_name="DeleteUser")
        assert "'DeleteUsers', differs:" in text, "of those with one field off, the one most alike"
        text = complaint_of(agent, operation_name="RotateKey", custom_data={"n": 4, "more": [1]})
        assert "\n  custom_data['n']:\n    expected 4\n    got      3\n" in text
        assert "\n  custom_data['more']:\n    expected [1]\n    got      nothing\n" in text
        assert text.count("expected") == 2
        assert "\n  caller_agent='agent/1.0'\n" in text, "in full"
        assert text.endswith("arrived: CreateUser, DeleteUsers, RotateKey")


def test_how_fields_are_compared() -> None:
    with AuditAgent() as agent, agent.make_client(service_tree_id="e6c9fcb1-7f08-4c1d-9e7a-123456789abc") as client:
        client.send(message(1, caller_access_levels=["b", "a"], caller_ip_address="::ffff:1.2.3.4"))
        msg = agent.assert_received(
            audit_type=AuditType.CONTROL_PLANE,
            operation_name=mock.ANY,
            operation_categories=("UserManagement",),
            operation_result="Success",
            caller_access_levels={"a", "b"},
            caller_ip_address=ip_address("::ffff:102:304"),
            caller_identities={"UPN": [{"Identity": "user@example.com", "Description": "the caller"}]},
            target_resources={"SubscriptionId": [TargetResource("res1", region="westeurope")]},
            custom_data={},
        )
        assert msg == agent.messages[0] == agent.assert_received()
        assert agent.records == [msg.record]
        assert agent.received[0].service_tree_id == "e6c9fcb1-7f08-4c1d-9e7a-123456789abc"
        assert "got      ['a', 'b']" in complaint_of(agent, caller_access_levels=["a"])
        assert "expected None" in complaint_of(agent, operation_name=None)
        assert "audit_type:" in complaint_of(agent, audit_type=AuditType.DATA_PLANE)
        assert "got      [TargetResource" in complaint_of(agent, target_resources={"SubscriptionId": []})
        with pytest.raises(TypeError, match="operation_nam: must be audit_type or one of operation_name, "):
            agent.assert_received(operation_nam="typo")


def test_received_records_can_be_filtered() -> None:
    with AuditAgent() as agent, agent.make_client(heartbeat_interval=0.01) as client:
        for number in range(4):
            client.send(message(number, operation_name=f"Op{number % 2}"))
        eventually(lambda: len(agent.received) > len(agent.messages) == 4, "a heartbeat too")
        odd = agent.received.filter(operation_name="Op1")
        assert [each.custom_data["n"] for each in odd.records] == [1, 3]
        assert odd.messages == [agent.messages[1], agent.messages[3]]
        assert odd.filter(custom_data={"n": 3}).records == [agent.records[3]]
        assert agent.received.filter().records == agent.records
        assert agent.received.filter(audit_type="AsmAuditDP") == []
        assert agent.received.filter(custom_data={"missing": mock.ANY}) == []
        with pytest.raises(TypeError, match="operation_nam: must be audit_type or one of operation_name, "):
            agent.received.filter(operation_nam="typo")
        agent.received.clear()
        assert agent.received.filter() == []


def test_records_that_must_not_be_received() -> None:
    with AuditAgent() as agent:
        agent.assert_not_received(timeout=0)
        client = agent.make_client()
        client.send(message(1))
        with pytest.raises(AssertionError, match=r"^a record arrived:\n  audit_type="):
            agent.assert_not_received(timeout=0)
        agent.assert_not_received(timeout=0, operation_name="DeleteUser")
        with pytest.raises(TypeError, match="operation_nam: must be"):
            agent.assert_not_received(operation_nam="typo")
        with pytest.raises(TypeError, match="timeout must be a number"):
            agent.assert_not_received(timeout=None)  # type: ignore[arg-type]
        # Of another process, a record comes within the time.
        later = gevent.spawn_later(0.05, client.send, message(2, operation_name="DeleteUser"))
        with pytest.raises(AssertionError, match="a record with operation_name='DeleteUser' arrived:"):
            agent.assert_not_received(timeout=30, operation_name="DeleteUser")
        later.join()


def test_no_such_mode() -> None:
    with pytest.raises(ValueError, match=r"^mode must be one of reads, acks, .*, got 'ack'$"):
        AuditAgent(mode="ack")  # type: ignore[arg-type]


def test_the_error_of_waiting_lists_the_received_records() -> None:
    with AuditAgent() as agent:
        client = agent.make_client(queue_size=100)
        for number in range(25):
            client.send(message(number, operation_name=f"Op{number}"))
        assert len(agent.wait_for(25)) == 25
        with pytest.raises(ValidationError):
            client.send(message(operation_name=""))
        with std_socket.socket(std_socket.AF_UNIX) as sock:
            sock.connect(agent.address)
            sock.sendall(msgpack.packb(["AsmAuditCP", [[5, mapping(OperationName="")]]]))
        eventually(lambda: agent.refused)
        agent.stall()
        client.send(message())
        with pytest.raises(AssertionError) as caught:
            agent.wait_for(26, timeout=0.05)
        first, names, *rest = str(caught.value).splitlines()
        assert first == "25 of 26 records arrived within 0.05 s"
        assert names == f"arrived: {', '.join(f'Op{number}' for number in range(5, 25))} (the last 20)"
        assert rest == [
            "refused by the agent: 'AsmAuditCP': OperationName: must not be empty",
            "refused by the client: {'invalid': 1}",
            "accepted by the client and not delivered: 1",
        ]
        assert "25 records, 1 refused" in repr(agent)
        agent.received.clear()
        assert agent.messages == []


# -- faults of the agent -----------------------------------------------------------------------------------------------


def test_stalled_and_resumed() -> None:
    with AuditAgent() as agent:
        client = agent.make_client()
        client.send(message(1))
        agent.wait_for(1)
        agent.stall()
        client.send(message(2))
        assert not client.flush(0.05)
        agent.resume()
        assert client.flush(10)
        agent.wait_for(2)


def test_away_restarted_and_hung_up_on() -> None:
    with AuditAgent() as agent:
        client = agent.make_client()
        for number, act in enumerate((agent.restart, agent.hang_up, agent.stop)):
            client.send(message(number))
            agent.wait_for(number + 1)
            act()
        assert not os.path.exists(agent.address)
        client.send(message(3))
        assert not client.flush(0.05)
        agent.start()
        assert client.flush(10)
        agent.assert_received(custom_data={"n": 3})
        assert client.stats().connects >= 3


def test_acknowledging_or_not() -> None:
    with AuditAgent() as agent:
        client = agent.make_client(require_ack=True)
        client.send(message(1))
        assert client.flush(10)
        agent.acknowledge(False)
        client.send(message(2))
        agent.wait_for(2)
        assert not client.flush(0.05), "it has it, and does not say so"
        agent.acknowledge(True)
        agent.hang_up()
        assert client.flush(10), "sent once more, and acknowledged"
        assert [each.custom_data["n"] for each in agent.records] == [1, 2, 2]


def test_an_error_of_the_agent_is_raised_where_it_was_asked() -> None:
    with AuditAgent() as agent:
        with pytest.raises(RuntimeError, match="already running"):
            agent.start()
        address = agent.address
    with pytest.raises(RuntimeError, match="does not run any more"):
        agent.stall()
    with pytest.raises(RuntimeError, match="in a with statement"):
        AuditAgent().stall()
    assert not os.path.exists(os.path.dirname(address))


def test_counts_and_times_that_are_none(audit_agent: AuditAgent) -> None:
    for count in ("2", 2.0, True, None):
        with pytest.raises(TypeError, match=f"^count must be a whole number of records, got {count!r}$"):
            audit_agent.wait_for(count)  # type: ignore[arg-type]
    for timeout in ("2", None):
        with pytest.raises(TypeError, match=f"^timeout must be a number of seconds, got {timeout!r}$"):
            audit_agent.wait_for(1, timeout)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^timeout must be a number of seconds, got nan$"):
        audit_agent.assert_received(timeout=float("nan"))
    assert audit_agent.wait_for(0, timeout=0) == []


def test_it_needs_a_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import tempfile

    long = folder / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(OSError, match="too long"), AuditAgent():
        pass
    assert list(long.iterdir()) == []


def test_a_test_that_is_killed_leaves_nothing() -> None:
    def test() -> None:
        with AuditAgent() as agent:
            agent.make_client().send(message())
            agent.wait_for(1)
            entered.append(agent)
            gevent.sleep(60)

    entered: list[AuditAgent] = []
    greenlet = gevent.spawn(test)
    eventually(lambda: entered)
    greenlet.kill()
    assert not os.path.exists(entered[0].address)


def test_another_client_of_its_own() -> None:
    with AuditAgent() as agent, Client(lambda: DomainSocket(agent.address, batch_records=1)) as client:
        client.send(Msg(AuditType.DATA_PLANE, record()))
        agent.assert_received(audit_type="AsmAuditDP")


# -- when the block ends -----------------------------------------------------------------------------------------------

SENDER = """
import os, socket, sys
from helpers import message
from geventaudit import Client, DomainSocket
from geventaudit.encoder.encoding import bundle, encode

sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
for number in range(5):
    frame = encode(message(number), 0)
    sock.sendall(bundle([frame], str(number)) if sys.argv[2] == "acks" else frame)
os._exit(0)
"""


@contextmanager
def busy(agent: AuditAgent) -> Iterator[None]:
    """Keep the agent's thread from reading, until a moment after the block around this one has ended."""
    gate = native.allocate_lock()
    gate.acquire()

    def open_soon() -> None:
        native.sleep(0.1)
        gate.release()

    agent._do(lambda _: gevent.get_hub().loop.run_callback(gate.acquire))  # in its thread, before its sockets
    yield
    native.start_new_thread(open_soon, ())


@pytest.mark.parametrize("acks", ["acks", "no acks"])
@pytest.mark.parametrize("sender", ["client", "clients of its own", "process"])
def test_messages_sent_just_before_the_block_ends_are_received(acks: str, sender: str) -> None:
    clients: list[Client] = []

    def send(number: int, client: Client) -> None:
        clients.append(client)
        client.send(message(number))
        eventually(lambda: client.stats().queued == 0)

    with AuditAgent() as agent, busy(agent):
        options: Any = {"require_ack": acks == "acks"}
        if sender == "process":
            program = [sys.executable, "-c", SENDER, agent.address, acks]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
            subprocess.run(program, check=True, timeout=60, env=environment)
        for number in range(0 if sender == "process" else 5):
            if sender == "client":
                send(number, Client(lambda: DomainSocket(agent.address, **options)))
            else:
                send(number, agent.make_client(**options))
    assert sorted(each.custom_data["n"] for each in agent.records) == list(range(5))
    for client in clients:
        # Without acknowledgements, a client that did not look between the reading and the end sends once more.
        assert sender != "client" or acks != "acks" or client.flush(10)
        client.close(0.0)


def test_a_stalled_agent_reads_nothing_at_the_end_either() -> None:
    with AuditAgent() as agent:
        client = agent.make_client()
        client.send(message(1))
        agent.wait_for(1)
        agent.stall()
        client.send(message(2))
        assert not client.flush(0.05)
    assert len(agent.records) == 1


def test_a_client_that_cannot_be_closed_leaves_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unclosable:
        def close(self, timeout: float) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), AuditAgent() as agent:
        agent._clients.append(Unclosable())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not run any more"):
        agent.stall()
