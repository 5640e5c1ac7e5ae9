"""Encoding of messages to frames.

It owns the layout of a frame; ``schema`` owns the rules. Read ``draft`` (a frame with an empty stamp), ``encoding``
(a loaded message to a frame), ``plan`` (the rules and the layout as data), ``fallback`` and ``_fast.pyx`` (both execute
the plan), ``engine`` (chooses one of them).
"""
