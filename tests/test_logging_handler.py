"""AuditHandler under the standard library's logging: audit records go to the agent, and all others pass by."""

from __future__ import annotations

import logging
import logging.config
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from helpers import eventually, mapping, message
from test_client import client_of, numbers_of
from test_threads import NativeThread

from geventaudit import Client, Spool
from geventaudit.agent import Agent, Received
from geventaudit.integrations.logging import AuditHandler


class Handler(AuditHandler):
    """A handler that keeps the errors that logging would print."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self.failed: list[logging.LogRecord] = []

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        self.failed.append(record)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("geventaudit-test.audited")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield logger
    logger.handlers.clear()
    logger.filters.clear()


@pytest.fixture
def got(socket_path: str) -> Iterator[list[Received]]:
    got: list[Received] = []
    with Agent(socket_path, got.append):
        yield got


def test_only_log_records_with_an_audit_are_sent(
    socket_path: str, got: list[Received], logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of(socket_path) as client:
        handler = Handler(client)
        logger.addHandler(handler)
        logger.addHandler(caplog.handler)
        logger.info("a message", extra={"audit": message(1)})
        logger.info("for the log alone")
        logger.info("nothing to audit", extra={"audit": None})
        logger.debug("below the logger's level", extra={"audit": message(2)})
        logger.info("a mapping", extra={"audit": {"Type": "ControlPlane", "Record": mapping(CustomData={"n": 3})}})
        handler.setLevel(logging.ERROR)
        logger.info("below the handler's level", extra={"audit": message(4)})
        assert client.flush(timeout=30)
        assert client.stats().accepted == 2
        assert not handler.failed
    assert numbers_of(got) == [1, 3]
    texts = [each.message for each in caplog.records if each.name == logger.name]
    assert texts == ["a message", "for the log alone", "nothing to audit", "a mapping", "below the handler's level"]


@pytest.mark.parametrize("wrong", [message(operation_name=""), {}, "text", 0, object()])
def test_an_unacceptable_one_goes_to_handle_error(socket_path: str, logger: logging.Logger, wrong: Any) -> None:
    with client_of(socket_path) as client:
        handler = Handler(client)
        logger.addHandler(handler)
        logger.info("wrong", extra={"audit": wrong})
        assert [record.audit for record in handler.failed] == [wrong]  # type: ignore[attr-defined]
        assert client.stats().rejected == {"invalid": 1}


def test_loggings_own_way_with_errors(
    socket_path: str, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_of(socket_path)
    client.close()
    logger.addHandler(AuditHandler(client))
    logger.warning("too late", extra={"audit": message(1)})
    printed = capsys.readouterr().err
    assert "ClientClosedError: the client is closed" in printed
    assert "too late" in printed


def test_filters_hold_for_it(socket_path: str, got: list[Received], logger: logging.Logger) -> None:
    with client_of(socket_path) as client:
        handler = Handler(client)
        handler.addFilter(lambda record: "secret" not in record.getMessage())
        logger.addHandler(handler)
        logger.info("a secret", extra={"audit": message(1)})
        logger.info("no more", extra={"audit": message(2)})
    assert numbers_of(got) == [2]


def test_by_a_configuration(socket_path: str, got: list[Received], logger: logging.Logger) -> None:
    with client_of(socket_path) as client:
        logging.config.dictConfig(
            {
                "version": 1,
                "disable_existing_loggers": False,
                "handlers": {
                    "audit": {
                        "class": "geventaudit.integrations.logging.AuditHandler",
                        "level": "WARNING",
                        "client": client,
                    }
                },
                "loggers": {logger.name: {"handlers": ["audit"]}},
            }
        )
        logger.info("below", extra={"audit": message(1)})
        logger.warning("above", extra={"audit": message(2)})
    assert numbers_of(got) == [2]


@pytest.mark.parametrize(("wrong", "hint"), [("app.client", "ext://app.client in a configuration"), (None, "got None")])
def test_an_invalid_client_is_refused_at_once(wrong: Any, hint: str) -> None:
    """A configuration that forgets ``ext://`` gives the name, which is no client."""
    with pytest.raises(TypeError, match=hint):
        AuditHandler(wrong)


def test_threads_that_log_at_once_do_not_wait_for_each_other(
    socket_path: str, folder: Path, got: list[Received], logger: logging.Logger
) -> None:
    """With a spool, a send from another thread asks the client's, which may be logging at that moment."""
    with client_of(socket_path, spool=Spool(folder / "audit.db")) as client:
        handler = Handler(client)
        logger.addHandler(handler)

        def log(first: int) -> None:
            for number in range(first, first + 200):
                logger.info("one of many", extra={"audit": message(number)})

        threads = [NativeThread(lambda first=first: log(first)) for first in (200, 400)]  # type: ignore[misc]
        for number in range(200):
            logger.info("one of many", extra={"audit": message(number)})
            gevent.sleep(0)
        for thread in threads:
            thread.get()
        assert [record.audit for record in handler.failed] == []  # type: ignore[attr-defined]
        assert client.flush(timeout=30)
        eventually(lambda: sorted(numbers_of(got)) == list(range(600)))
