"""The delivery of accepted frames.

It owns the undelivered frames in memory and the greenlet that writes them. Read ``inbox``, ``outbox``, ``key_reader``
and ``stamped_outbox``, ``quarantine``, ``connector``, ``heartbeats``, ``sender``.
"""
