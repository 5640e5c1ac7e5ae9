"""The rules for messages, and the values that custom data can hold.

It owns the rules. All other checks of a message (``encoder.plan``, ``json_schema``) are derived from them.
Read ``values``, ``rules``, ``json_schema``.
"""
