"""The receiving end, for development and tests, and the doctor, which examines the way to an agent.

It owns the listening sockets and the answers to senders. It uses the packages of the client; none of them uses it.
Read ``arrivals`` (messages), ``shown`` (as text), ``connections``, ``listening``, ``reception`` (the rules), ``server``
(the agent), ``doctor``.
"""

from .arrivals import AgentCounts, Received, Refused
from .server import Agent

__all__ = ["Agent", "AgentCounts", "Received", "Refused"]
