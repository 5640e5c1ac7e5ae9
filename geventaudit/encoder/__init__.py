"""The way out: messages to frames.

It owns the layout of a frame; the rules are those of ``schema``. Read ``encoding`` (a frame of a message that was
loaded), then ``compiled`` (both in one pass, where a message is plainly good).
"""
