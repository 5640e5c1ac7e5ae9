"""The receiving end, for development and tests, and what the command line has for who looks after an agent.

It owns what is listened on and what is answered; it uses the client's packages and none of them uses it.
Read ``arrivals`` (messages), ``shown`` (as text), ``connections``, ``listening``, ``reception`` (the rules), ``server``
(the agent), ``doctor`` (what keeps messages from an agent).
"""

from .arrivals import AgentCounts, Received, Refused
from .server import Agent

__all__ = ["Agent", "AgentCounts", "Received", "Refused"]
