"""geventaudit where gevent services live: one module for each framework or tool, imported only by who uses it.

Each needs nothing of geventaudit but its public surface, and at most the extra of its own name.
"""
