"""Each kind of connection to Fluent Bit: TLS, client certificates, shared keys, users; accepted and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fluent_bit import KEY, QUICK, Certificates, FluentBit, fluent_bit, needs_fluent_bit
from helpers import eventually, message

from geventaudit import Client, NotificationKind

pytestmark = [needs_fluent_bit, pytest.mark.slow]

RECORDS = 500
USER = {"username": "ada", "password": "secret"}
KEYED = {"shared_key": KEY, "self_hostname": "agent"}
USERS = {**KEYED, "security__users": "ada secret"}


@pytest.fixture
def certificates(folder: Path) -> Certificates:
    return Certificates(folder)


def tls_options(certificates: Certificates, *, mutual: bool = False) -> dict[str, Any]:
    options = {key.replace(".", "__"): value for key, value in certificates.options.items()}
    if mutual:
        options |= {"tls__verify": "on", "tls__verify_client_cert": "on", "tls__ca_file": certificates.authority_file}
    return options


ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unix": ({}, {}, ""),
    "tcp": ({}, {}, ""),
    "tls": ({}, {}, "tls"),
    "mutual tls": ({}, {}, "mutual"),
    "key": (KEYED, {"shared_key": KEY}, ""),
    "key, users unasked": (KEYED, {"shared_key": KEY, **USER}, ""),
    "users": (USERS, {"shared_key": KEY, **USER}, ""),
    "key over tls": (KEYED, {"shared_key": KEY}, "tls"),
    "users over mutual tls": (USERS, {"shared_key": KEY, **USER}, "mutual"),
}


@pytest.mark.parametrize("acks", [False, True], ids=["", "acks"])
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, acks: bool, folder: Path, certificates: Certificates) -> None:
    inputs, options, tls = ACCEPTED[name]
    if tls:
        inputs = inputs | tls_options(certificates, mutual=tls == "mutual")
        options = options | {"ssl": certificates.client(with_certificate=tls == "mutual")}
    with fluent_bit(folder, "unix" if name == "unix" else "tcp", **inputs) as agent:
        with Client(lambda: agent.connect(require_ack=acks, **options), backoff=QUICK) as client:
            client.connect(10.0)
            for number in range(RECORDS):
                client.send(message(number), timeout=30.0)
            assert client.flush(30.0)
            stats = client.stats()
            assert (stats.connects, stats.delivered, stats.resent) == (1, RECORDS, 0)
        eventually(lambda: len(agent.numbers()) >= RECORDS)
        assert agent.numbers() == list(range(RECORDS))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    # name: the input's options, the client's, TLS of input and client
    "plain at a tls port": ({}, {}, "tls", ""),
    "tls at a plain port": ({}, {}, "", "tls"),
    "no client certificate": ({}, {}, "mutual", "tls"),
    "unknown authority": ({}, {}, "tls", "stranger"),
    "no key": (KEYED, {}, "", ""),
    "no key over tls": (KEYED, {}, "tls", "tls"),
    "wrong key": (KEYED, {"shared_key": "another"}, "", ""),
    "key at a plain port": ({}, {"shared_key": KEY}, "", ""),
    "key without tls at a tls port": (KEYED, {"shared_key": KEY}, "tls", ""),
    "no user": (USERS, {"shared_key": KEY}, "", ""),
    "wrong password": (USERS, {"shared_key": KEY, "username": "ada", "password": "x"}, "", ""),
    "unknown user": (USERS, {"shared_key": KEY, "username": "bob", "password": "secret"}, "", ""),
}


@pytest.mark.parametrize("acks", [False, True], ids=["", "acks"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, acks: bool, folder: Path, certificates: Certificates, tmp_path: Path) -> None:
    """Nothing counts as delivered, nothing arrives, and closing hands back every record."""
    inputs, options, agent_tls, client_tls = REFUSED[name]
    if agent_tls:
        inputs = inputs | tls_options(certificates, mutual=agent_tls == "mutual")
    if client_tls:
        authority = Certificates(tmp_path) if client_tls == "stranger" else certificates
        options = options | {"ssl": authority.client()}
    with fluent_bit(folder, "tcp", **inputs) as agent:
        with Client(lambda: agent.connect(require_ack=acks, timeout=2.0, **options), backoff=QUICK) as client:
            channel = client.notify()
            for number in range(200):
                client.send(message(number))
            assert not client.flush(3.0)
            assert client.stats().delivered == 0
            left = client.close(timeout=0.5)
            assert [each.record.custom_data["n"] for each in left] == list(range(200))
            kinds = {each.kind for each in channel}
        assert kinds & {NotificationKind.CONNECT_FAILED, NotificationKind.CONNECTION_LOST}
        assert NotificationKind.DROPPED in kinds
        assert agent.lines() == []


@pytest.mark.parametrize("acks", [False, True], ids=["", "acks"])
def test_a_certificate_that_is_replaced(acks: bool, folder: Path, certificates: Certificates) -> None:
    """The factory makes a new context for each connection, as after a rotation of certificates."""
    inputs = tls_options(certificates)
    agent = FluentBit(folder, "tcp", **inputs)
    current = [certificates]
    try:
        agent.start()
        with Client(lambda: agent.connect(require_ack=acks, ssl=current[0].client()), backoff=QUICK) as client:
            client.send(message(0))
            assert client.flush(30.0)
            agent.end(15)
            current[0] = Certificates(folder)  # the same files, another authority
            agent.start()
            client.send(message(1))
            assert client.flush(30.0)
        eventually(lambda: sorted(set(agent.numbers())) == [0, 1])
    finally:
        agent.kill()
