"""What gevent, monkey-patching, native threads and forks do to a process, kept away from all other code.

It owns the unpatched originals, the hooks at a fork and the way in from other threads. It knows nothing of records.
Read ``native``, ``fork``, ``threads``.
"""
