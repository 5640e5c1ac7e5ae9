"""The way out: messages to frames.

It owns the layout of a frame; the rules are those of ``schema``. Read ``encoding`` (a frame of a message that was
loaded), ``plan`` (the rules and the layout as data), ``fallback`` and ``_fast.pyx`` (both execute the plan), ``engine``
(chooses one of them).
"""
