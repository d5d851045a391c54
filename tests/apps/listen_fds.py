"""Socket activation by hand: takes LISTEN_FDS, tells NOTIFY_SOCKET, answers HTTP.

One thread, one request per connection. Follows sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
READY_DELAY (seconds) puts off READY=1; STUCK=1 stops the watchdog messages while it goes on serving.
"""

import json
import os
import select
import signal
import socket
import sys
import time

FIRST = 3  # SD_LISTEN_FDS_START


def inherited():
    """The listening sockets with their names; none if they were meant for another process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        sys.exit("listen_fds.py: LISTEN_PID is not mine")
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    names += [""] * (count - len(names))
    return {socket.socket(fileno=FIRST + i): names[i] for i in range(count)}


def notify(text):
    """One datagram to the supervisor; a leading @ means the abstract namespace."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(text.encode(), "\0" + path[1:] if path[0] == "@" else path)


def answer(connection, name, n):
    """Reads one request head and answers with who we are."""
    connection.settimeout(5)
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(4096)
        if not part:
            return
        head += part
    if head.startswith(b"GET /crash"):
        os._exit(9)
    body = json.dumps({"pid": os.getpid(), "worker": None, "n": n, "name": name}).encode()
    top = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    connection.sendall(top.encode() + body)


def main():
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    listeners = inherited()
    for listener in listeners:
        listener.setblocking(False)
    time.sleep(float(os.environ.get("READY_DELAY", "0")))
    notify(f"READY=1\nSTATUS=serving {len(listeners)} sockets\nMAINPID={os.getpid()}")
    beat = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
    n = 0
    while not stopping:
        if beat and not os.environ.get("STUCK"):
            notify("WATCHDOG=1")
        # A bounded wait, so that a signal that came just before it is not missed for long.
        for listener in select.select(list(listeners), [], [], min(beat or 0.2, 0.2))[0]:
            try:
                connection, _ = listener.accept()
            except OSError:  # a sibling was faster, or the client is gone
                continue
            n += 1
            with connection:
                try:
                    answer(connection, listeners[listener], n)
                except OSError:
                    pass  # the client is gone
    notify("STOPPING=1")


main()
