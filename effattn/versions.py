"""Versions of everything that a run's numbers hang on."""

import platform
from importlib import metadata

PACKAGES = ("effattn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python's and every package's; imports none of them."""
    return {
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
    }
