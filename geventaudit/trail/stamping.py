"""Numbers and seals for the records of one client in one process.

A signal handler may send in the middle of another ``send()``. While one record gets its number, no other does: the
handler's record gets its number afterwards.
"""

from __future__ import annotations

import secrets
import time
from bisect import insort
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

from gevent.queue import Full

from ..encoder import engine
from ..encoder.draft import KEY, Draft
from ..encoder.encoding import Encoder
from ..errors import AuditError, ClientClosedError
from ..filling import UNKNOWN_ADDRESS
from ..records import (
    AuditType,
    CallerIdentity,
    CallerIdentityType,
    Msg,
    OperationCategory,
    OperationResult,
    OperationType,
    Record,
    TargetResource,
)
from ..version import __version__
from .chain import Chain
from .seal import Seal
from .stamp import draft_of, number_of, with_checkpoint, with_earlier, without_handed_back_stamp

__all__ = ["CheckpointKind", "Facts", "Stamper", "StamperBusyError", "Trail", "ranges"]

CheckpointKind: TypeAlias = Literal["open", "mark", "end"]
_T = TypeVar("_T")

_MAX_RANGES, _MAX_ADOPTED = 200, 50  # in one checkpoint; the others go into the next


class Trail:
    """The stamp and the seal of a client, as its user has set them.

    :param seal: None for a stamp alone.
    :param encoder: the client's.
    """

    def __init__(self, seal: Seal | None, encoder: Encoder) -> None:
        self._seal = seal
        self._encoder = encoder

    def stamper(self) -> Stamper:
        """Return the stamper of a new stream, which is not open yet."""
        return Stamper(self._seal, self._encoder)

    def without_old_stamp(self, msg: Any, shape: Callable[[Any], Msg]) -> tuple[Any, list[Any] | None]:
        """Return a message without the stamp of an earlier send, and the numbers that it had.

        :param shape: makes a message of a mapping.
        :raises ValidationError: custom data has the reserved key, and no stamp under it that a client has handed back.
        """
        if type(msg) is Msg:
            data = getattr(msg.record, "custom_data", None)
        elif isinstance(msg, Mapping) and isinstance(msg.get("Record"), Mapping):
            data = msg["Record"].get("CustomData")
        else:
            return msg, None
        if not isinstance(data, Mapping) or KEY not in data:
            return msg, None
        return without_handed_back_stamp(shape(msg)) or (msg, None)

    def draft_of(self, frame: bytes, unix_time: float, was: list[Any] | None) -> Draft:
        """Return a frame that is ready for its number.

        :raises ValidationError: custom data has the reserved key.
        """
        made = frame if isinstance(frame, Draft) else draft_of(frame, unix_time, is_sorted=self._seal is not None)
        return made if was is None else with_earlier(made, was)


class StamperBusyError(Exception):
    """No record can get its number now: the key is not there yet, or the caller has interrupted another record."""


class Facts(NamedTuple):
    """The parts of a checkpoint that the outbox and the counters know."""

    delivered: int
    """All numbers up to this one are settled."""
    refused: int
    left_out: int


class Stamper:
    """Gives the records of one stream their numbers. In the hub; may be entered again by a signal handler.

    :param seal: authenticates the records; None for a stamp alone.
    :param encoder: the client's, for checkpoints.
    """

    def __init__(self, seal: Seal | None, encoder: Encoder) -> None:
        self.seal = seal
        self.stream = ""
        """The name of the stream; empty before :meth:`open`."""
        self._encoder = encoder
        self.chain: Any = None
        """A :class:`~geventaudit.trail.chain.Chain`, compiled or not; None before :meth:`open`."""
        self._void: list[int] = []
        self._given_up: list[int] = []
        self._adopted: dict[str, int] = {}
        self._all_void: list[int] = []
        self.has_ended = False
        """True once the last checkpoint was put."""

    def open(self) -> None:
        """Begin the stream: take its name, and with a seal its first key.

        :raises SealError: the key of the seal was not read yet, or cannot be used.
        """
        name, key = (secrets.token_hex(16), None) if self.seal is None else self.seal.take_stream()
        self.stream = str(name)
        self.chain = (engine.Chain or Chain)(self.stream, key)

    @property
    def is_open(self) -> bool:
        """True if records can get their numbers."""
        return self.chain is not None

    def stamp(self, made: Draft | Callable[[], Draft], put: Callable[[bytes], _T]) -> tuple[bytes, int, _T]:
        """Give a draft the next number, seal it, and *put* the frame where it belongs.

        A number is used up if *put* returns, or if nobody can know whether it has put the frame.

        :param made: the draft, or a function that makes it once no other record can get a number.
        :returns: the frame, its number, and the result of *put*.
        :raises StamperBusyError: another record gets its number now, or the stream is not open.
        :raises Exception: the ones of *put*, which has put nothing.
        """
        # No function is called between the question and the assignment, so no signal handler comes in between.
        chain = self.chain
        if chain is None or chain.is_busy:
            raise StamperBusyError
        chain.is_busy = True
        try:
            if self.has_ended:
                raise ClientClosedError("the client is closed")
            draft = made if isinstance(made, Draft) else made()
            before, following, number = chain.state, chain.following(), chain.number + 1
            frame, digest = chain.frame_of(draft)
            try:
                chain.state = following
                result = put(frame)
                if digest:
                    chain.digest.update(digest)
            except (Full, AuditError):
                chain.state = before
                raise
            except BaseException:
                self.void(number)
                raise
            return frame, number, result
        finally:
            chain.is_busy = False

    def void(self, number: int) -> None:
        """Note that no accepted record has *number*."""
        self._void.append(number)
        insort(self._all_void, number)

    def delivered(self, settled: int) -> int:
        """Return the number up to which all records are settled, if so many are."""
        for number in self._all_void:
            if number > settled + 1:
                break
            settled += 1
        return settled

    def give_up(self, number: int) -> None:
        """Note that the record with *number* will not be delivered."""
        self._given_up.append(number)

    def adopt(self, frames: Iterable[bytes]) -> None:
        """Note the records of other streams that this client sends on."""
        for frame in frames:
            found = number_of(frame)
            if found is not None and found[0] != self.stream:
                self._adopted[found[0]] = max(found[1], self._adopted.get(found[0], 0))

    def forget(self) -> None:
        """Drop the keys, in a forked child: they are the parent's."""
        self.has_ended = True
        if self.chain is not None:
            self.chain.forget()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def stamp_checkpoint(self, kind: CheckpointKind, facts: Facts, put: Callable[[bytes], _T]) -> _T:
        """Put a record of the client's own about its stream, and return the result. With ``end``, no other follows.

        :raises StamperBusyError: another record gets its number now.
        :raises Exception: the ones of *put*, which has put nothing.
        """
        void, given_up = ranges(self._void)[:_MAX_RANGES], ranges(self._given_up)[:_MAX_RANGES]
        adopted = dict(sorted(self._adopted.items())[:_MAX_ADOPTED])

        def make() -> Draft:
            checkpoint: dict[str, Any] = {"delivered": facts.delivered, "kind": kind}
            checkpoint |= {"left_out": facts.left_out, "refused": facts.refused}
            if self.seal is not None:
                checkpoint |= {"children": self.seal.children, "digest": self.chain.digest.hexdigest()}
            for name, value in (("adopted", adopted), ("given_up", given_up), ("void", void)):
                if value:
                    checkpoint[name] = value
            now = time.time()
            frame = self._encoder.encode(_message(self.stream), now)
            return with_checkpoint(draft_of(frame, now, is_sorted=True), dict(sorted(checkpoint.items())))

        _, _, result = self.stamp(make, put)
        self.has_ended = kind == "end"
        self._void = _without(self._void, void)
        self._given_up = _without(self._given_up, given_up)
        for stream, number in adopted.items():
            if self._adopted.get(stream) == number:
                del self._adopted[stream]
        return result


def _without(numbers: list[int], noted: list[list[int]]) -> list[int]:
    return [number for number in numbers if not any(first <= number <= last for first, last in noted)]


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return *numbers* as ranges, each its first and last number."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found


def _message(stream: str) -> Msg:
    return Msg(
        AuditType.CONTROL_PLANE,
        Record(
            operation_name="AuditTrailCheckpoint",
            operation_categories=[OperationCategory.OTHER],
            operation_category_description="The audit client's own account of its trail",
            operation_type=OperationType.CREATE,
            operation_result=OperationResult.SUCCESS,
            operation_access_level="System",
            caller_agent=f"geventaudit/{__version__}",
            caller_ip_address=UNKNOWN_ADDRESS,
            caller_identities={CallerIdentityType.SYSTEM: [CallerIdentity("geventaudit", "the audit client")]},
            caller_access_levels=["System"],
            target_resources={"AuditTrail": [TargetResource(stream)]},
        ),
    )
