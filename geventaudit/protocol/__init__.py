"""The Forward protocol, except the encoding of frames. Pure: no I/O, no clock.

It owns decoding, acknowledgements, refusals and the handshake.
Read ``unpacking``, ``inflation``, ``messages``, ``decoding``, ``acks``, ``refusals``, ``handshake``.
"""
