"""Trails for tests: records that are stamped and sealed as a client does it, as JSON lines of several agents."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
from helpers import message

from geventaudit import Msg
from geventaudit.encoder import engine
from geventaudit.encoder.encoding import Encoder
from geventaudit.trail.keys import KeyNode, next_start, root_of
from geventaudit.trail.seal import Seal
from geventaudit.trail.secret import Secret
from geventaudit.trail.stamp import draft_of, with_checkpoint, with_earlier
from geventaudit.trail.stamping import Facts, Stamper
from geventaudit.verify.findings import TrailReport
from geventaudit.verify.keyring import KeyCopy
from geventaudit.verify.state import Remembered
from geventaudit.verify.trail import Verifier

MASTER = bytes(range(32))
SALT = bytes(range(16))
FIRST_TIME = 1_700_000_000.25


def copy_of_key(master: bytes = MASTER, start: int = 1) -> KeyCopy:
    return KeyCopy("app.key", Secret(master), start)


def key_file_in(folder: Path) -> str:
    """The path of the first copy of the key file."""
    path = folder / "app.key"
    path.write_text(f"geventaudit-seal-key 1 {MASTER.hex()} 1\n")
    return str(path)


def seal_at(node: KeyNode) -> Seal:
    """A seal that has read its key file."""
    seal = Seal(key=MASTER)
    seal._node = node
    return seal


class Writer:
    """One client of a process; its frames go to a list."""

    def __init__(self, seal: Seal | None) -> None:
        self.encoder = Encoder(is_sealed=seal is not None)
        self.stamper = Stamper(seal, self.encoder)
        with mock.patch.object(engine, "Chain", None):  # the plain one, so that a test can read and change the keys
            self.stamper.open()
        self.frames: list[bytes] = []
        self._now = FIRST_TIME

    @property
    def stream(self) -> str:
        return self.stamper.stream

    def send(self, msg: Msg | None = None, was: list[Any] | None = None, checkpoint: Any = None) -> bytes:
        self._now += 0.4
        frame = self.encoder.encode(message(len(self.frames)) if msg is None else msg, self._now)
        draft = draft_of(frame, self._now, is_sorted=self.stamper.seal is not None)
        if was is not None:
            draft = with_earlier(draft, was)
        if checkpoint is not None:
            draft = with_checkpoint(draft, checkpoint)
        return self.stamper.stamp(draft, self.frames.append)[0]

    def checkpoint(self, kind: Any = "mark", delivered: int = 0) -> bytes:
        self.stamper.stamp_checkpoint(kind, Facts(delivered, 0, 0), self.frames.append)
        return self.frames[-1]

    def bodies(self) -> list[dict[str, Any]]:
        return [body_of(frame) for frame in self.frames]


def writer(start: int = 1, salt: bytes = SALT, master: bytes = MASTER) -> Writer:
    secret = Secret(master)
    for _ in range(1, start):
        secret = next_start(secret)
    return Writer(seal_at(root_of(secret, salt, start)))


def body_of(frame: bytes) -> dict[str, Any]:
    (_, ((_, body),), _) = msgpack.unpackb(frame, timestamp=0, strict_map_key=False)
    return body  # type: ignore[no-any-return]


def stamp_of(body: dict[str, Any]) -> dict[str, Any]:
    return body["CustomData"]["geventaudit"]  # type: ignore[no-any-return]


def whole_trail(records: int = 20, every: int = 5) -> Writer:
    """One stream, from its open checkpoint to its end."""
    made = writer()
    made.checkpoint("open")
    for number in range(records):
        made.send()
        if number % every == every - 1:
            made.checkpoint(delivered=len(made.frames))
    made.checkpoint("end", delivered=len(made.frames))
    return made


# -- as agents write them ----------------------------------------------------------------------------------------------


def _moment(body: dict[str, Any]) -> int:
    return int(datetime.fromisoformat(stamp_of(body)["time"]).timestamp())


def _kind(body: dict[str, Any]) -> str:
    return {"AsmAuditCP": "ControlPlane", "AsmAuditDP": "DataPlane"}[stamp_of(body)["tag"]]


def as_listen(body: dict[str, Any]) -> str:
    record = {key: value for key, value in body.items() if key != "env_ikey"}
    own = {"env_ikey": body["env_ikey"]} if "env_ikey" in body else {}
    line = {"Time": _moment(body), **own, "Type": _kind(body), "Record": record}
    return json.dumps(line, ensure_ascii=False)


def as_fluent_bit_lines(body: dict[str, Any]) -> str:
    return json.dumps({"date": _moment(body) + 0.0, **body, "AuditType": _kind(body)}, separators=(",", ":"))


def as_fluent_bit_file(body: dict[str, Any]) -> str:
    return f"{stamp_of(body)['tag']}: [{_moment(body)}.000000000, {json.dumps(body, separators=(',', ':'))}]"


def as_fluentd_file(body: dict[str, Any]) -> str:
    moment = datetime.fromisoformat(stamp_of(body)["time"]).strftime("%Y-%m-%dT%H:%M:%S+00:00")
    return f"{moment}\t{stamp_of(body)['tag']}\t{json.dumps(body, separators=(',', ':'))}"


def as_fluentd_inject(body: dict[str, Any]) -> str:
    moment = datetime.fromisoformat(stamp_of(body)["time"]).strftime("%Y-%m-%dT%H:%M:%S+0000")
    return json.dumps({**body, "AuditTag": stamp_of(body)["tag"], "AuditTime": moment}, separators=(",", ":"))


def as_vector(body: dict[str, Any]) -> str:
    moment = datetime.fromisoformat(stamp_of(body)["time"]).strftime("%Y-%m-%dT%H:%M:%SZ")
    event = {**body, "host": "10.0.0.7", "source_type": "fluent", "tag": stamp_of(body)["tag"], "timestamp": moment}
    return json.dumps(event, sort_keys=True, separators=(",", ":"))


AGENTS: list[Callable[[dict[str, Any]], str]] = [
    *(as_listen, as_fluent_bit_lines, as_fluent_bit_file, as_fluentd_file, as_fluentd_inject, as_vector),
]


# -- verifying ---------------------------------------------------------------------------------------------------------


def verified(
    path: Path,
    bodies: Iterable[dict[str, Any] | str],
    agent: Callable[[dict[str, Any]], str] = as_fluent_bit_lines,
    copies: Iterable[KeyCopy] | None = None,
    state: dict[str, Remembered] | None = None,
    **options: Any,
) -> TrailReport:
    """The findings about these records, written by that agent."""
    lines = [each if isinstance(each, str) else agent(each) for each in bodies]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogatepass")
    verifier = Verifier([copy_of_key()] if copies is None else list(copies), state, **options)
    verifier.read(str(path))
    return verifier.check()


def changed(body: dict[str, Any], **stamp: Any) -> dict[str, Any]:
    """A copy with another stamp."""
    made = copy.deepcopy(body)
    stamp_of(made).update(stamp)
    return made
