"""Facts of gevent, monkey-patching, native threads, forks and the interpreter's exit, kept away from all other code.

It owns the unpatched originals, the hooks at a fork and at exit, and the way in from other threads. It knows no
clients: clients, connections and spools register with it. Read ``native``, ``clock``, ``copying``, ``forks``,
``exits``, ``signal``, ``workers``, ``hub_thread``.
"""
