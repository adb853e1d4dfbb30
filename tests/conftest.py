"""Settings that must be in the environment before jax is first imported."""

import os
from pathlib import Path

import pytest

_CACHE = Path(__file__).resolve().parent.parent / ".cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("EFFATTN_CACHE", str(_CACHE / "effattn"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false"
    " intra_op_parallelism_threads=1"
    # Most of the time goes to the compiler: this spares a seventh of it.
    " --xla_backend_optimization_level=1",
)


@pytest.fixture(autouse=True, scope="session")
def programs_of_several_devices_are_compiled_afresh():
    """As in `effattn.parallel.mesh.compile_afresh`, but by program: most have one device."""
    from jax._src import compilation_cache

    read = compilation_cache.get_executable_and_time

    def read_of_one_device(key, options, backend, devices, *rest):
        several = len(devices) > 1 and backend.platform == "cpu"
        return (None, None) if several else read(key, options, backend, devices, *rest)

    compilation_cache.get_executable_and_time = read_of_one_device
    yield
    compilation_cache.get_executable_and_time = read


@pytest.fixture(autouse=True)
def the_compile_cache_is_on_again():
    yield
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
