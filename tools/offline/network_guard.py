"""Importing this module cuts the process off from all machines but its own and notes attempts.

An audit hook sees every connection that Python code makes, whatever library makes it, and cannot
be taken out again. Attempts are appended to the file that PEFT_LESSONS_NETWORK_LOG names, because
a library may swallow the error that the attempt gets.
"""

import ipaddress
import os
import socket
import sys

_ADDRESS_EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_LOOKUP_EVENTS = {"socket.getaddrinfo", "socket.gethostbyname"}


def is_local(host):
    """Return whether a host, as a name or a number, means this machine."""
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode(errors="replace")
    if host in {None, "", "localhost", socket.gethostname()}:
        return True
    try:
        number = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return number.is_loopback or number.is_unspecified


def _hook(event, args):
    if event in _LOOKUP_EVENTS:
        host = args[0]
    elif event in _ADDRESS_EVENTS and isinstance(args[1], tuple):  # a path is a local socket
        host = args[1][0]
    else:
        return
    if is_local(host):
        return
    log = os.environ.get("PEFT_LESSONS_NETWORK_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{event} {host} by {' '.join(sys.argv)[:200]}\n")
    raise OSError(f"no network in the tests: {event} to {host!r} refused")


sys.addaudithook(_hook)
