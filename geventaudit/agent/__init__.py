"""The receiving end, for development and tests, and what the command line has for who looks after an agent.

It owns what is listened on and what is answered; it uses the client's packages and none of them uses it.
Read ``server`` (the agent), ``doctor`` (what keeps messages from an agent), ``shown`` (those that arrived, as text).
"""

from .server import Agent, AgentCounts, Received, Refused

__all__ = ["Agent", "AgentCounts", "Received", "Refused"]
