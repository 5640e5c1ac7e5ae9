"""Typed uses of the public API: checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any
from uuid import UUID
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import geventaudit
from geventaudit import (
    TCP,
    AuditClient,
    AuditType,
    Backoff,
    BaseClient,
    CallerIdentity,
    CallerIdentityType,
    Client,
    Connection,
    ConnectionFailedError,
    DomainSocket,
    Msg,
    MsgSchema,
    NoOp,
    Notification,
    NotificationChannel,
    NotificationKind,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    RecordSchema,
    Rejection,
    Spool,
    Stats,
    TargetResource,
    ValidationError,
    WouldBlockError,
    fill_unknown,
)
from geventaudit.integrations.wsgi import AuditMiddleware, audited, facts_of, unaudited


def factory() -> DomainSocket:
    return DomainSocket()


def other_factory() -> Connection:
    return TCP(("127.0.0.1", 24224), timeout=5.0, write_timeout=None)


class MySchema(RecordSchema):
    pass


class MyConnection:
    name = "Mine"

    def write(self, frames: object) -> None:
        raise ConnectionFailedError("the agent hung up", agent_had_read=True)

    def delivered(self) -> int:
        return 0

    def wait_broken(self) -> None: ...
    def close(self) -> None: ...


@Client(NoOp).operation(operation_name="RotateKey")
def decorated(vault: str, *, depth: int = 0) -> str:
    return vault * depth


def mine() -> MyConnection:
    return MyConnection()


def before_send(msg: Msg) -> Msg | None:
    return None if msg.type is AuditType.DATA_PLANE else Msg(msg.type, msg.record.replace(caller_agent="x"))


def uses() -> None:
    record = Record(
        operation_name="CreateUser",
        operation_categories=[OperationCategory.USER_MANAGEMENT],
        operation_type=OperationType.CREATE,
        operation_result=OperationResult.SUCCESS,
        caller_ip_address=ip_address("192.0.2.7"),
        caller_identities={CallerIdentityType.UPN: [CallerIdentity("user@example.com", "the caller")]},
        caller_access_levels=("Reader",),
        target_resources={"SubscriptionId": [TargetResource("res1", region="westeurope")]},
        custom_data={"ticket": 4711},
    )
    with Client(
        factory,
        backoff=Backoff(initial=0.5),
        service_tree_id=UUID(int=1),
        schema=MySchema(),
        datetimes="text",
        json_safe=True,
        before_send=before_send,
    ) as client:
        client.connect(timeout=5)
        client.send(Msg(AuditType.CONTROL_PLANE, record))
        client.send({"Type": "ControlPlane", "Record": {"OperationName": "x"}}, timeout=1.0)
        with client.operation(record, audit_type=AuditType.DATA_PLANE, operation_name="x") as operation:
            operation.add(custom_data={"n": 1})
        refused: Exception | None = operation.error
        version: str = decorated("vault", depth=1)
        print(refused, version)
        delivered: bool = client.flush(timeout=5.0)
        stats: Stats = client.stats()
        count: int = stats.delivered + stats.rejected[Rejection.INVALID] + delivered
        count += stats.rejected[Rejection.QUEUE_FULL]
        channel: NotificationChannel = client.notify()
        for notification in channel:
            if notification.kind is NotificationKind.DROPPED:
                count += len(notification.undelivered)
        texts: list[str] = [f"{each.time:%H:%M} {each.error}" for each in channel]
        print(texts)
        left: list[Msg] = client.close(timeout=1.0)
        count += len(left)
    Client(other_factory)
    Client(mine)
    Client(NoOp)
    for each in geventaudit.live_clients():
        left += each.close(timeout=1.0) if each.spool is None else []
    base = BaseClient(NoOp(), queue_size=5)
    recovered: list[Msg] = base.recover()
    base.reset(NoOp())
    error: geventaudit.ConnectionFailedError | None = base.error
    try:
        MsgSchema().load({})
    except ValidationError as problem:
        print(problem.messages, recovered, error)


def any_client(client: AuditClient) -> list[Msg]:
    is_spooled: bool = client.spool is not None and not client.is_closed
    try:
        return client.close(timeout=5.0 if is_spooled else None)
    except WouldBlockError as error:
        client.report(error)
        client.call_soon(client.close)
        return []


def clients() -> list[AuditClient]:
    path = "/var/lib/app/audit-{pid}"
    return [
        Client(NoOp, spool=Spool(path, mode="always", synchronous="FULL")),
        BaseClient(NoOp()),
        *geventaudit.live_clients(),
    ]


def dropped(notifications: Iterator[Notification]) -> list[Msg]:
    return [message for each in notifications for message in each.undelivered]


def all_dropped(client: AuditClient) -> list[Msg]:
    return dropped(iter(client.notify()))


def describe(environ: Mapping[str, Any], status: int, record: Record) -> Record | None:
    facts = facts_of(environ)
    return fill_unknown(record) if status < 500 and facts is not None and facts.route else None


def application(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    return []


def roles(environ: Mapping[str, Any]) -> list[str]:
    return ["Reader"]


def key_of(environ: Mapping[str, Any]) -> dict[str, str | TargetResource]:
    return {"Key": TargetResource("db", region="eu")}


ROTATE = audited(
    "RotateKey",
    category=[OperationCategory.KEY_MANAGEMENT],
    type=OperationType.UPDATE,
    audit_type=AuditType.DATA_PLANE,
    access_level="Owner",
    target=key_of,
    redact=lambda name, text: text,
)


@ROTATE
def rotate(number: int) -> str:
    return str(number + 1)


@unaudited
def healthz() -> str:
    return rotate(1) + "x"


class Views:
    @audited("ReadKey", category=OperationCategory.KEY_MANAGEMENT, target={"Key": ("{name}", "x")})
    def get(self, name: str) -> str:
        return name.upper()


def declares(environ: Mapping[str, Any]) -> None:
    if (facts := facts_of(environ)) is not None:
        facts.declaration, facts.caller_access_levels = ROTATE, ["Reader"]


def serves(client: Client) -> WSGIApplication:
    served = AuditMiddleware(
        application,
        client,
        describe=describe,
        exclude=("/x",),
        trusted_proxies=["10.0.0.0/8"],
        category=OperationCategory.KEY_MANAGEMENT,
        caller_access_levels=roles,
        target={"Service": "vault"},
    )
    print(served.counts.recorded)
    return served
