"""What the other side of the Forward protocol says, and what is said beside frames. Pure: no I/O, no clock.

It owns the way in from bytes, acknowledgements and the handshake.
Read ``unpacking``, ``inflation``, ``messages``, ``decoding``, ``acks``, ``handshake``.
"""
