"""Which platform a function is being traced for."""

from __future__ import annotations

import jax


def platform() -> str:
    """One of cpu, gpu and tpu: that of the mesh in context, and where there is none, that of the default device.

    Asked while tracing, so that only the kernels of one platform are traced at all. A mesh of abstract devices counts:
    that is how a program is compiled for a chip that is not there.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform
