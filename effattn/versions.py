"""Versions of everything that a run's numbers hang on."""

import os
import platform
import time
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


def provenance(command: str) -> str:
    """What a page of measured numbers says of its making, in Markdown: command, machine, day."""
    found = versions()
    names = ("effattn", "python", "jax", "flax", "optax", "numpy")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"Command: `{command}`. Machine: {cores} {platform.machine()} CPU cores, shared with other "
        f"work. Date: {time.strftime('%Y-%m-%d')}. Versions: "
        + ", ".join(f"{name} {found[name]}" for name in names)
        + "."
    )
