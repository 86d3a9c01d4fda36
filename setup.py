"""The native data path, which pyproject.toml has no words for.

It is left out where it can't be built, or by XBD_NATIVE=0: then disks are served in Python.
"""

import os
import sys

from setuptools import setup

if sys.platform == "linux" and os.environ.get("XBD_NATIVE", "1") != "0":
    setup(
        cffi_modules=["xbd/core/datapath/native/build.py:builder"],
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
else:
    setup()
