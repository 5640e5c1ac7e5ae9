"""The spool: a disk behind the queue, for records that cannot be delivered yet.

It owns the files. Read ``settings``; the files, from below: ``format``, ``segment``, ``folder``; the part in the hub:
``stream``, ``pending``, ``backlog``, ``disk``, ``jobs``, ``adoption``, ``store``. The command line uses
``inspection``.
"""

from .settings import Spool

__all__ = ["Spool"]
