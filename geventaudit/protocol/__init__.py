"""The answers of the other side of the Forward protocol, and the bytes beside frames. Pure: no I/O, no clock.

It owns the way in from bytes, acknowledgements, refusals and the handshake.
Read ``unpacking``, ``inflation``, ``messages``, ``decoding``, ``acks``, ``refusals``, ``handshake``.
"""
