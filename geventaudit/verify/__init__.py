"""The auditor's side: proves a trail of stamped and sealed records, from the JSON lines that agents write.

It changes nothing, needs no hub, and holds a bounded part of the trail in memory. :class:`.trail.Verifier` is the whole
of it; ``geventaudit verify`` is its command.

Read ``lines`` (files to blocks), ``parsing`` (a line to a record), ``packing``, ``records`` (to its stamp), ``rows``
(sorting on disk), ``keyring``, ``state``, ``findings``, ``streams`` (the checks of one stream), then ``trail``.
"""
