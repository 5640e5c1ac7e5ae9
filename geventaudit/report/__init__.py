"""A summary of a trail for people who must sign it: counts by operation, caller and time, and its completeness.

It reads the files once, by the reader of :mod:`geventaudit.verify`, in bounded memory. ``geventaudit report`` is its
command. The page needs the extra ``report``.

Read ``counting`` (bounded counts), ``fields`` (values of a record, for counting), ``summary``, ``controls`` (what it
is evidence for), ``text``, ``charts``, then ``page``.
"""
