"""The compiled modules. They are left out without a compiler, on PyPy, and with PURE_PYTHON in the environment."""

import os
import platform

from setuptools import Extension, setup

extensions = []
if platform.python_implementation() == "CPython" and not os.environ.get("PURE_PYTHON"):
    from Cython.Build import cythonize

    modules = {
        "geventaudit._records": "geventaudit/_records.pyx",
        "geventaudit.encoder._fast": "geventaudit/encoder/_fast.pyx",
        "geventaudit.verify._packing": "geventaudit/verify/_packing.pyx",
    }
    extensions = cythonize(
        [Extension(name, [path], extra_compile_args=["-g0"], optional=True) for name, path in modules.items()]
    )

setup(ext_modules=extensions)
