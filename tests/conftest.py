"""For every test, and every process a test starts."""

import atexit
import os
import shutil
import tempfile

# XLA spends most of a test's time on making code fast that runs for milliseconds. JAX reads this when first imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests run on the CPU, whatever else is installed; libtpu is, and would look for its chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one process has compiled the others need not; the workers of a run and all that they start share a folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
