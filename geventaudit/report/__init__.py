"""A summary of a trail for people who must sign it: counts by operation, caller and time, and its completeness.

It reads the files twice, by the reader of :mod:`geventaudit.verify`, in bounded memory. ``geventaudit report`` is its
command. The page needs the extra ``report``.

Read ``counting`` (bounded counts), ``fields`` (values of a record, for counting), ``summary``, ``reading`` (the files,
twice), ``controls`` (the requirements that it shows something about), ``text``, ``charts``, then ``page``.
"""
