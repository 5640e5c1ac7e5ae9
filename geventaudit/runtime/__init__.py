"""The code for gevent, monkey-patching, native threads, forks and interpreter exit, in one place.

It owns the unpatched originals, the hooks at a fork and at exit, and calls from other threads. It does not know
clients: clients, connections and spools register with it. Read ``native``, ``clock``, ``copying``, ``forks``,
``exits``, ``signal``, ``workers``, ``hub_thread``.
"""
