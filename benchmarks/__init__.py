"""How fast geventaudit is, against baselines taken in the same run: ``python -m benchmarks``.

``figures`` is the catalogue. ``throughput``, ``cost`` and ``footprint`` take the figures, with the records of
``records``, against the ``peers``, into the processes of ``reader`` and ``receivers``; ``measure`` makes ratios of the
samples, ``report`` a table and JSON of the ratios, ``chart`` a picture. Not part of what is installed.
"""
