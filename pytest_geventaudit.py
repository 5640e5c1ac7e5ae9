"""The pytest plugin of geventaudit: the fixtures ``audit_agent`` and ``audit_client``.

pytest imports this before any ``conftest.py``, in every run of every project that has geventaudit installed. So nothing
of geventaudit or gevent is imported here: a ``conftest.py`` can still monkey-patch, and a project without the fixtures
pays nothing. All else is in ``geventaudit.testing``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from geventaudit import Client
    from geventaudit.testing import AuditAgent


@pytest.fixture
def audit_agent(request: pytest.FixtureRequest) -> Iterator[AuditAgent]:
    """A real audit agent on a temporary Unix socket; see geventaudit.testing.AuditAgent.

    Its indirect parameter is a mode (reads, acks, no_acks, stalled, away):
    @pytest.mark.parametrize("audit_agent", ["acks", "stalled"], indirect=True)
    """
    from geventaudit.testing import AuditAgent

    with AuditAgent(mode=getattr(request, "param", "reads")) as agent:
        yield agent


@pytest.fixture
def audit_client(audit_agent: AuditAgent) -> Client:
    """A geventaudit client of audit_agent, closed after the test. It asks for acks in the modes acks and no_acks."""
    return audit_agent.make_client()
