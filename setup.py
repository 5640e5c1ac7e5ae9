"""The compiled encoder. Without a compiler, and on PyPy, the package is installed without it."""

import os
import platform

from setuptools import Extension, setup

extensions = []
if platform.python_implementation() == "CPython" and not os.environ.get("PURE_PYTHON"):
    from Cython.Build import cythonize

    fast = Extension("geventaudit.encoder._fast", ["geventaudit/encoder/_fast.pyx"], optional=True)
    extensions = cythonize([fast])

setup(ext_modules=extensions)
