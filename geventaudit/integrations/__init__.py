"""Integrations: one module for each framework or tool. geventaudit itself imports none of them.

Each uses only the public names of geventaudit, and needs at most the extra of its own name.
"""
