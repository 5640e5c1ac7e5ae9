"""What a message must be, and what MessagePack can carry in its custom data.

It owns the rules: whatever else checks them (``encoder.compiled``, ``json_schema``) is derived from them.
Read ``values``, ``rules``, ``json_schema``.
"""
