"""The way out: messages to frames."""
