"""How fast geventaudit is, against baselines taken in the same run: ``python -m benchmarks``.

``figures`` is the catalogue. ``throughput``, ``cost``, ``footprint`` and ``receivers`` take the figures: of the
``contenders``, with the records of ``records``, into the process of ``reader`` or into receivers that others wrote.
``measure`` makes ratios of the samples, ``report`` a table and JSON of the ratios, ``chart`` a picture; ``processes``
says who runs on which core. ``chaos`` asks another question: what is left of the promise when everything breaks. Not
part of what is installed.
"""
