"""The delivery: from a frame that is accepted to a frame that is delivered.

It owns the undelivered frames in memory and the greenlet that writes them. Read ``inbox``, ``outbox``, ``quarantine``,
``connector``, ``heartbeats``, ``sender``.
"""
