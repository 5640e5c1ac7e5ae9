"""A trail that proves itself: numbers for records, seals over them, and the keys of the seals.

Nothing here writes to a connection or a queue. Where the order of the records becomes final, the outbox calls
:class:`~geventaudit.trail.stamping.Stamper`, or the compiled gate gives the number itself.

Read ``secret`` (keys that no error report shows), ``keys`` (the key tree), ``key_file``, ``canonical`` (the bytes that
a seal covers), ``stamp`` (the layout of a stamp), ``chain`` (the next number and key), ``seal`` (the settings), then
``stamping``.
"""
