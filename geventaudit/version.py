"""The version of the library: what heartbeats report and what the wheel is called."""

__version__ = "0.1.0"
