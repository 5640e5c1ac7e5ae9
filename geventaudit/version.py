"""The version of the library, for heartbeats and the wheel."""

__version__ = "0.1.0"
