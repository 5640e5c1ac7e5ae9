"""Open ways to the agent, and what each can know about what it delivered.

It owns the sockets; when to connect and what a loss means is the clients'.
Read ``connection`` (what one is), ``sockets`` (what the next two share), ``unix``, ``tcp``, ``noop``.
"""

from .connection import Connection, check_connection
from .noop import NoOp
from .sockets import release
from .tcp import TCP
from .unix import DomainSocket, usual_path

__all__ = ["TCP", "Connection", "DomainSocket", "NoOp", "check_connection", "release", "usual_path"]
