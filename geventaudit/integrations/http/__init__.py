"""The parts of a record about an HTTP request, for the modules of the frameworks beside this folder.

Read ``text`` (bounded, printable texts), ``declarations``, ``marking`` and ``views`` (``@audited``), ``asking`` and
``facts`` (the place where frameworks put their knowledge), ``paths`` (mounts, exclusion, Azure targets), ``forwarding``
(caller's addresses), ``tracing``, ``redaction`` (secrets), ``request`` (one request), ``current`` (the one that is
being served), then ``response`` (the end of a body), ``hub_watch``, ``hooks`` and ``frameworks``. ``routes``, with
``flask_routes`` and ``django_routes``, is for ``geventaudit routes``. Not imported by geventaudit itself.
"""
