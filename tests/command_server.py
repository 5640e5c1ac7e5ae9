"""A process that has imported the command line, and forks a new process for each command; see commands.py.

    python command_server.py CONTROL

CONTROL is the number of a socket's descriptor. A request is a JSON object (arguments, folder, environment) and four
descriptors: the command's standard streams, and the socket for its process id and, when it ends, its wait status.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import socket
import sys

import gevent._hub_local

import geventaudit.cli


def serve(control: socket.socket) -> list[str]:
    """Serve until *control* ends. Return the arguments of a command in its process only."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not request:
            os._exit(0)
        if not os.fork():
            control.close()
            return watch(json.loads(request), *descriptors)
        for each in descriptors:
            os.close(each)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def watch(request: dict[str, object], stdin: int, stdout: int, stderr: int, result: int) -> list[str]:
    """Fork the command. Wait for it and send its wait status, as its parent."""
    pid = os.fork()
    if pid:
        for each in (0, 1, 2, stdin, stdout, stderr):
            os.close(each)
        os.write(result, b"%d" % pid)
        os.write(result, b"%d" % os.waitpid(pid, 0)[1])
        os._exit(0)
    os.close(result)
    for number, each in enumerate((stdin, stdout, stderr)):
        os.dup2(each, number)
        os.close(each)
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    return list(request["arguments"])  # type: ignore[call-overload]


if __name__ == "__main__":
    assert geventaudit.cli.main
    assert gevent._hub_local.get_hub_if_exists() is None, "the import of the command line has made a hub"
    assert len(os.listdir("/proc/self/task")) == 1, "the import of the command line has started a thread"
    gc.freeze()  # what is imported is looked through by none of the commands
    sys.argv[1:] = serve(socket.socket(fileno=int(sys.argv[1])))
    # From here on as python -m geventaudit.
    runpy.run_module("geventaudit", run_name="__main__", alter_sys=True)
