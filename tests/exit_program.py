"""A service with processes that end without close(), as a process of its own; see test_lifecycle.py.

    python exit_program.py SCENARIO SOCKET

Each process prints the numbers of the records that were accepted, and "refused" for each that was refused.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import multiprocessing
import os
import sys
from typing import Any

from helpers import message

from geventaudit import Client, ClientClosedError, DomainSocket

scenario, path = sys.argv[1:3] if sys.argv[2:] else (os.environ["SCENARIO"], os.environ["SOCKET"])
os.environ["SCENARIO"], os.environ["SOCKET"] = scenario, path  # for children that import this anew


def make() -> Client:
    return Client(lambda: DomainSocket(path))


if scenario == "exit_after_the_hook":  # handlers run in the reverse order, and the client registers the hook
    atexit.register(lambda: send(2))
client = make()


def send(number: int, to: Client = client) -> None:
    try:
        to.send(message(number))
        said = str(number)
    except ClientClosedError:
        said = "refused"
    os.write(1, f"{said}\n".encode())


# -- atexit ------------------------------------------------------------------------------------------------------------


def exit_first_use() -> None:
    atexit.register(send, 1)


def exit_used_before() -> None:
    send(1)
    atexit.register(send, 2)


def exit_after_the_drain_of_another() -> None:
    """The drain of the other one in the handler leaves a hub, and connections, behind."""
    other = make()
    send(1, other)

    @atexit.register
    def last() -> None:
        other.close()
        send(2)


def exit_after_the_hook() -> None:
    """Another send() comes when all clients are closed; see above."""
    send(1)


def exit_new_client() -> None:
    """A client that is constructed in a handler: its hook cannot be registered any more, but another one's was."""
    atexit.register(lambda: send(1, make()))


def exit_other_thread() -> None:
    """The own thread never uses the client; the records of another one wait for the exit."""
    import threading

    thread = threading.Thread(target=send, args=(1,))
    thread.start()
    thread.join()


def exit_other_thread_in_a_handler() -> None:
    import threading

    @atexit.register
    def last() -> None:
        started = []
        import _thread

        _thread.start_new_thread(lambda: (send(1), started.append(True)), ())
        while not started:
            threading.Event().wait(0.001)


# -- children ----------------------------------------------------------------------------------------------------------


def work(number: int) -> int:
    send(number)
    return os.getpid()


def wait(*children: Any) -> None:
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0, child.exitcode


def processes(package: Any, method: str) -> None:
    context = package.get_context(method)
    wait(*[context.Process(target=work, args=(number,)) for number in (1, 2)])


def pool(package: Any, method: str) -> None:
    made = package.get_context(method).Pool(2)
    assert os.getpid() not in made.map(work, range(1, 11))
    made.close()
    made.join()


def executor(method: str) -> None:
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context(method)) as made:
        assert os.getpid() not in list(made.map(work, range(1, 11)))


def recycled() -> None:
    """Workers that end after each task."""
    made = multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1)
    assert os.getpid() not in made.map(work, range(1, 6), chunksize=1)
    made.close()
    made.join()


def nested(number: int) -> None:
    send(number)
    if number > 1:
        wait(multiprocessing.get_context("fork").Process(target=nested, args=(number - 1,)))


def raising(number: int) -> None:
    send(number)
    sys.exit(0)


def main() -> None:
    if scenario.startswith("exit_"):
        globals()[scenario]()
        return
    kind, _, method = scenario.partition("-")
    if kind in ("used", "unused"):
        if kind == "used":
            send(100)
            assert client.flush(30)
        processes(multiprocessing, method)
    elif kind == "pool":
        pool(multiprocessing, method)
    elif kind == "executor":
        executor(method)
    elif kind == "recycled":
        recycled()
    elif kind == "nested":
        wait(multiprocessing.get_context("fork").Process(target=nested, args=(3,)))
    elif kind == "sysexit":
        wait(multiprocessing.get_context("fork").Process(target=raising, args=(1,)))
    else:
        import billiard

        {"billiard": processes, "billiardpool": pool}[kind](billiard, method)


if __name__ == "__main__":
    main()
