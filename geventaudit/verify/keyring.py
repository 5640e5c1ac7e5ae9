"""The auditor's copies of key files, and the keys of streams that follow from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from ..trail.keys import StreamName, next_start
from ..trail.secret import Secret, hkdf_extract

__all__ = ["MAX_STEPS", "Allowance", "KeyCopy", "KeyRing"]

MAX_STEPS = 10_000_000
"""The most steps that keys are evolved for records that turn out to be forged: a few seconds."""


class Allowance:
    """The steps that may be spent on numbers that nothing has authenticated yet."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps

    def take(self, steps: int) -> bool:
        """Return True if so many steps may be made."""
        if steps > self.left:
            return False
        self.left -= steps
        return True

    def give_back(self, steps: int) -> None:
        """Note that the steps led to an authentic record."""
        self.left += steps


class _Chain:
    """A chain of secrets from one place on; places that were asked for are kept."""

    def __init__(self, first: int, secret: Secret, step: Callable[[Secret], Secret]) -> None:
        self._places = [first]
        self._secrets = [secret]
        self._step = step

    def steps_to(self, place: int) -> int | None:
        """Return the steps to *place*; None if the chain begins behind it."""
        index = bisect_right(self._places, place)
        return place - self._places[index - 1] if index else None

    def at(self, place: int) -> Secret:
        index = bisect_right(self._places, place)
        secret = self._secrets[index - 1]
        steps = place - self._places[index - 1]
        for _ in range(steps):
            secret = self._step(secret)
        if steps:
            self._places.insert(index, place)
            self._secrets.insert(index, secret)
        return secret


class KeyCopy:
    """A copy of a key file.

    :param name: for reports.
    :param start: the start that uses *master*; 0 for a static key.
    """

    def __init__(self, name: str, master: Secret, start: int) -> None:
        self.name = name
        self.start = start
        self._master = master
        self._starts = _Chain(start, master, next_start)
        self._children: dict[tuple[object, ...], _Chain] = {}

    def first_key(self, name: StreamName, allowance: Allowance) -> tuple[Secret, int] | None:
        """Return the first record key of a stream, and the steps that it took.

        :returns: None if the copy is of a later start, or if the allowance does not suffice.
        """
        taken = 0
        if name.start == 0:
            master = self._master
        else:
            steps = self._starts.steps_to(name.start) if self.start else None
            if steps is None or not allowance.take(steps):
                return None
            taken += steps
            master = self._starts.at(name.start)
        prefix: tuple[object, ...] = (name.salt, name.start)
        chain = self._children.get(prefix)
        if chain is None:
            chain = self._child_chain(prefix, hkdf_extract(bytes.fromhex(name.salt), master).derive(b"root"))
        for depth, number in enumerate(name.path):
            steps = chain.steps_to(number)
            if steps is None or not allowance.take(steps):
                allowance.give_back(taken)
                return None
            taken += steps
            child = chain.at(number).derive(b"child")
            if depth == len(name.path) - 1:
                return child.derive(b"stream"), taken
            prefix = (*prefix, number)
            chain = self._children.get(prefix) or self._child_chain(prefix, child.derive(b"process"))
        return None

    def _child_chain(self, prefix: tuple[object, ...], secret: Secret) -> _Chain:
        chain = self._children[prefix] = _Chain(1, secret, lambda each: each.derive(b"next"))
        return chain


@dataclass(slots=True)
class Candidate:
    """A copy that may be the one of a stream, and its key at the present number."""

    copy: KeyCopy
    key: Secret


class KeyRing:
    """All copies that the auditor has given."""

    def __init__(self, copies: list[KeyCopy], steps: int = MAX_STEPS) -> None:
        self.copies = copies
        self.allowance = Allowance(steps)

    def candidates(self, name: StreamName) -> tuple[list[Candidate], int]:
        """Return the first record keys of a stream under all copies, and the steps that they took."""
        found, taken = [], 0
        for copy in self.copies:
            first = copy.first_key(name, self.allowance)
            if first is not None:
                found.append(Candidate(copy, first[0]))
                taken += first[1]
        return found, taken
