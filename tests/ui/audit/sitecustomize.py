"""Put on ``PYTHONPATH`` of a process, this notes every address that it and its children ask for or connect to.

One JSON line each goes to the file named by ``PARETO_STUDIO_AUDIT``: process id, command, event, address.
The hook is below every library: whatever opens a socket in Python passes it.
"""

import json
import os
import sys

FILE = os.environ.get("PARETO_STUDIO_AUDIT")
WATCHED = (
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.sendto",
    "socket.sendmsg",
)


def note(event: str, address: object) -> None:
    """Append one line; a single write, so that lines of several processes do not mix."""
    command = " ".join(sys.orig_argv)
    line = json.dumps({"pid": os.getpid(), "command": command, "event": event, "address": address}, default=repr)
    with open(str(FILE), "ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


def hook(event: str, args: tuple[object, ...]) -> None:
    """Note what goes out; ``connect`` and the like have the socket in front of the address."""
    if event in WATCHED:
        first = args[0]
        note(event, args[-1] if event in ("socket.connect", "socket.sendto", "socket.sendmsg") else first)


if FILE:
    note("start", None)
    sys.addaudithook(hook)
