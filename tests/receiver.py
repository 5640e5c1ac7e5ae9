"""An independent audit agent, as a process of its own: plain sockets and msgpack, nothing of geventaudit or gevent.

    python receiver.py unix PATH OUT        python receiver.py tcp PORT OUT

Appends the number (CustomData.n) of each record that it read to OUT, a line each, a write for each read; then
acknowledges messages that have a chunk. Signals:

- SIGUSR1: read and accept nothing more; says "paused" on standard output when all read records are stored.
- SIGUSR2: read again.
- SIGALRM: a crash loop: for the next 8 records, read one, store and acknowledge nothing, and hang up on it; go on
  acknowledging heartbeats.
- SIGHUP: read a few bytes of each connection, store the records that are whole, and hang up on it.
- SIGTERM over a Unix socket: exit at once, with unread data in the socket. Over TCP: shut down its writing, read
  everything to the end of each stream, then exit.
"""

import os
import random
import selectors
import signal
import socket
import sys

import msgpack

kind, where, out = sys.argv[1:]
flags = set()
crashes = []
wakeup, wakeup_writer = socket.socketpair()
wakeup.setblocking(False)
wakeup_writer.setblocking(False)
signal.set_wakeup_fd(wakeup_writer.fileno())
signal.signal(signal.SIGUSR1, lambda *_: flags.add("pause"))
signal.signal(signal.SIGUSR2, lambda *_: flags.discard("pause"))
signal.signal(signal.SIGALRM, lambda *_: crashes.extend(range(8)))
signal.signal(signal.SIGHUP, lambda *_: flags.add("hang up"))
signal.signal(signal.SIGTERM, lambda *_: flags.add("stop"))

if kind == "unix":
    if os.path.exists(where):
        os.unlink(where)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(where)
else:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(where)))
listener.listen(64)
store = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
selector = selectors.DefaultSelector()
selector.register(wakeup, selectors.EVENT_READ, "wakeup")
selector.register(listener, selectors.EVENT_READ, "listener")
print("ready", flush=True)


def accept():
    sock, _ = listener.accept()
    sock.setblocking(True)
    selector.register(sock, selectors.EVENT_READ, msgpack.Unpacker(raw=False, strict_map_key=False))


def take(sock, unpacker, size=65536):
    data = sock.recv(size)
    if not data:
        selector.unregister(sock)
        sock.close()
        return
    unpacker.feed(data)
    frames = list(unpacker)
    numbers = [
        entry[1]["CustomData"]["n"]
        for frame in frames
        for entry in frame[1]
        if frame[0] in ("AsmAuditCP", "AsmAuditDP")
    ]
    if numbers and crashes:
        crashes.pop()
        selector.unregister(sock)
        sock.close()
        return
    chunks = [frame[2]["chunk"] for frame in frames if "chunk" in frame[2]]
    if numbers:
        os.write(store, "".join(f"{number}\n" for number in numbers).encode())
    if chunks:
        sock.sendall(b"".join(msgpack.packb({"ack": chunk}) for chunk in chunks))


draining = paused = False
while True:
    if ("pause" in flags) != paused:
        paused = not paused
        print("paused" if paused else "reading", flush=True)
    if draining and not any(key.data not in ("wakeup", "listener") for key in selector.get_map().values()):
        sys.exit(0)
    ready = selector.select()
    if "hang up" in flags:
        flags.discard("hang up")
        for key in [key for key in selector.get_map().values() if key.data not in ("wakeup", "listener")]:
            key.fileobj.setblocking(False)
            try:
                take(key.fileobj, key.data, random.randrange(1, 1500))
            except OSError:
                pass
            if key.fileobj.fileno() >= 0:
                selector.unregister(key.fileobj)
                key.fileobj.close()
        continue
    if "stop" in flags and not draining:
        if kind == "unix":
            sys.exit(0)
        draining = True
        flags.discard("pause")
        selector.unregister(listener)
        listener.setblocking(False)
        while True:  # connections that are not accepted yet have data here too, acknowledged by the kernel
            try:
                accept()
            except BlockingIOError:
                break
        listener.close()
        for key in list(selector.get_map().values()):
            if key.data != "wakeup":
                key.fileobj.shutdown(socket.SHUT_WR)
        continue
    for key, _ in ready:
        if key.data == "wakeup":
            try:
                wakeup.recv(64)
            except BlockingIOError:
                pass
        elif "pause" in flags:
            selector.select(0.01)
        elif key.data == "listener":
            accept()
        else:
            try:
                take(key.fileobj, key.data)
            except OSError:
                selector.unregister(key.fileobj)
                key.fileobj.close()
            if flags:
                break
