"""The tasks of a service, for a worker of Celery that a test starts, and for the test that queues them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Celery, chain
from celery.exceptions import Ignore, Reject

from geventaudit import Client, DomainSocket, OperationCategory, OperationType, Record, Spool
from geventaudit.integrations.celery import Audit

app = Celery("shop", broker=os.environ.get("TEST_BROKER", "memory://"), set_as_current=False)
app.conf.task_ignore_result = True
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_proc_alive_timeout = 60.0
app.conf.worker_prefetch_multiplier = 1


def make_client() -> Client:
    spool = os.environ.get("TEST_SPOOL")
    return Client(
        lambda: DomainSocket(os.environ["TEST_AGENT"], require_ack=True),
        spool=Spool(os.path.join(spool, "{pid}"), mode="always") if spool else None,
    )


audit = Audit(
    make_client,
    app,
    template=Record(
        operation_categories=[OperationCategory.CUSTOMER_FACING],
        operation_access_level="Contributor",
        caller_access_levels=["Buyer"],
    ),
    close_timeout=30.0,
)


@app.task(audit={"operation_type": OperationType.CREATE})
def order(number: int) -> int:
    return number


@app.task
def fail(mail: str) -> None:
    raise ValueError(f"no such customer: {mail}")


@app.task(bind=True, max_retries=1)
def unsteady(self: Any) -> None:
    if self.request.retries == 0:
        raise self.retry(exc=ConnectionError("try later"), countdown=0)


@app.task
def reject() -> None:
    raise Reject("not mine", requeue=False)


@app.task
def ignore() -> None:
    raise Ignore


@app.task(audit=None)
def unaudited() -> None:
    pass


@app.task
def outer(number: int) -> None:
    chain(order.si(number), order.si(number + 1)).apply_async()


@app.task
def leave(code: int) -> None:
    raise SystemExit(code)


@app.task
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def wait(path: str) -> None:
    Path(path).touch()
    time.sleep(600)
