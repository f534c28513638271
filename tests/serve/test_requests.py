"""What a client imports."""

import subprocess
import sys


def test_a_client_loads_neither_jax_nor_transformers():
    script = "import sys, brewjax.serve.requests, brewjax.serve.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"jax", "transformers", "tokenizers"} & set(done.stdout.split())
