"""Measure the speed of geventaudit against baselines of the same run: ``python -m benchmarks``.

``figures`` is the catalogue. ``throughput``, ``cost``, ``footprint`` and ``receivers`` take the figures: of the
``contenders``, with the records of ``records``, into the process of ``reader`` or into receivers that others wrote.
``measure`` makes ratios of the samples, ``report`` a table and JSON of the ratios, ``chart`` a picture. ``processes``
assigns the cores. ``chaos`` tests the promise while everything breaks. The package is not installed.
"""
