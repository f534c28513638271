"""For every test, and every process a test starts."""

import os

# XLA spends most of a test's time on making code fast that runs for milliseconds. JAX reads this when first imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests run on the CPU, whatever else is installed; libtpu is, and would look for its chips.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
