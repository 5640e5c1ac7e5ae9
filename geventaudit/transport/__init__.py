"""Connections to the agent, each with its own knowledge of deliveries.

It owns the sockets. ``delivery`` decides when to connect, and handles a lost connection.
Read ``connection`` (the protocol), ``kernel``, ``sockets`` (the common part), ``unix``, ``connecting``, ``tcp``,
``noop``.
"""

from .connection import Connection, check_connection
from .noop import NoOp
from .sockets import release
from .tcp import TCP
from .unix import DomainSocket, usual_path

__all__ = ["TCP", "Connection", "DomainSocket", "NoOp", "check_connection", "release", "usual_path"]
