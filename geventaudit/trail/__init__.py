"""A trail that proves itself: numbers for records, seals over them, and the keys of the seals.

It owns the reserved key ``geventaudit`` of custom data. Nothing here writes to a connection or a queue: the outbox
calls :class:`~geventaudit.trail.stamping.Stamper` where the order of the records becomes final.

Read ``secret`` (keys that no error report shows), ``keys`` (the key tree), ``key_file``, ``canonical`` (the bytes that
a seal covers), ``stamp`` (the layout of a stamp), ``chain`` (the next number and key), ``seal`` (the settings), then
``stamping``.
"""
