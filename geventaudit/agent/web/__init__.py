"""A page in the browser that shows the records of an agent as they arrive, and makes the agent misbehave.

It owns the records that are kept for the page, the rules for requests, and the HTTP server. Nothing is encoded for a
page that is not open. Read ``log`` (the records that are kept), ``rendering`` (their text), ``guard`` (which requests
are answered), ``page`` (the server), and ``page.js``, the first of the scripts.
"""

from .page import DEFAULT_ADDRESS, Page

__all__ = ["DEFAULT_ADDRESS", "Page"]
