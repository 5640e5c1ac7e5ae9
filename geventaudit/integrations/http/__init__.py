"""The parts of a record about an HTTP request, for the modules of the frameworks beside this folder.

Read ``text`` (bounded, printable texts), ``facts`` (the place where frameworks put their knowledge), ``paths`` (mounts,
exclusion, Azure targets), ``forwarding`` (caller's addresses), ``redaction`` (secrets), ``request`` (one request), then
``response`` (the end of a body), ``hub_watch`` and ``hooks``. Not imported by geventaudit itself.
"""
