"""Parameters and the logical axis names they carry.

A name says what an axis means ("embed", "heads", "mlp", "vocab", ...), never where it lives:
sharding rules and optimizer groups read the names. Parameters are float32 whatever the compute
dtype. Everything is made with eager sharding off, so that a layer needs no mesh.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.parallel.mesh import outer_part, sequence_ways

Axes = tuple[str | None, ...]
Initializer = Callable[..., jax.Array]


def normal(std: float) -> Initializer:
    """An initializer of N(0, std^2)."""
    return jax.nn.initializers.normal(std)


def uniform(bound: float) -> Initializer:
    """An initializer of U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def log_uniform(low: float, high: float) -> Initializer:
    """An initializer of log U(low, high): the logarithms of rates of decay."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def step_bias(low: float, high: float, floor: float) -> Initializer:
    """An initializer of what softplus turns into a step exp(U(log low, log high)), floor at least.

    Source: Gu and Dao 2023, Mamba.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        step = jnp.maximum(step, floor)
        return step + jnp.log(-jnp.expm1(-step))

    return init


def parameter(shape: tuple[int, ...], axes: Axes, init: Initializer, rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter with one logical name (or None) per axis."""
    with nnx.use_eager_sharding(False):
        return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: jax.Array, kernel: jax.Array, dtype: Any, out_dtype: Any, axes: Axes | None = None
) -> jax.Array:
    """`x @ kernel` with both factors in `dtype`. x: [..., in]; kernel: [in, out].

    The kernel's gradient is summed and returned in the kernel's own dtype. Reverse mode only.
    axes: the kernel's logical names. With them, one that lies over two axes of the mesh is gathered
    over one after the other, and its gradient is scattered so: over both at once a TPU may have no
    ring, and XLA makes all-reduces of both, twice the bytes (v5p:4x4x8, fsdp=8 x sequence=16).
    """
    kernel = _half_gathered(kernel.astype(dtype), axes)
    return jnp.matmul(x.astype(dtype), kernel, preferred_element_type=out_dtype)


def _half_gathered(kernel: jax.Array, axes: Axes | None) -> jax.Array:
    spec = None if axes is None else outer_part(kernel, axes)
    return kernel if spec is None else jax.lax.with_sharding_constraint(kernel, spec)


def _project_forward(
    x: jax.Array, kernel: jax.Array, dtype: Any, out_dtype: Any, axes: Axes | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel, dtype, out_dtype, axes), (x, kernel)


def _project_backward(
    dtype: Any,
    out_dtype: Any,
    axes: Axes | None,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dy = dy.astype(dtype)
    dx = (dy @ _half_gathered(kernel.astype(dtype), axes).T).astype(x.dtype)
    x = x.astype(dtype)
    # Two axes, because XLA on CPU turns a product over [batch, seq_len] into transposed copies that
    # recompute what they copy: the backward pass of a gated MLP, [8, 256, 128] x 256, takes 12 ms
    # instead of 26 (one core, jax 0.12). A sharded seq_len cannot be folded into the batch.
    if sequence_ways() == 1:
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    tokens = tuple(range(x.ndim - 1))
    dkernel = jax.lax.dot_general(
        x, dy, ((tokens, tokens), ((), ())), preferred_element_type=kernel.dtype
    )
    return dx, _half_gathered(dkernel, axes)


project.defvjp(_project_forward, _project_backward)


class Dense(nnx.Module):
    """`x @ kernel + bias` in `dtype`. kernel: [in, out] with names `axes`; bias: [out] or None."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: Axes,
        *,
        init: Initializer,
        use_bias: bool = False,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.kernel = parameter((in_features, out_features), axes, init, rngs)
        zeros = jax.nn.initializers.zeros
        self.bias = parameter((out_features,), axes[1:], zeros, rngs) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        names = self.kernel.get_metadata().get("out_sharding")  # a user's own may have none
        axes = None if names is None else tuple(names[-2:])
        y = project(x, self.kernel[...], self.dtype, self.dtype, axes)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def prepend_axis(module: nnx.Module, name: str) -> None:
    """Names the new leading axis of every parameter of a module that was made under `jax.vmap`."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Variable):
            node.set_metadata(out_sharding=(name, *node.get_metadata()["out_sharding"]))


def parameter_axes(abstract_state: nnx.State) -> dict[Any, Any]:
    """The logical axis names of every parameter, in the shape of the pure dict of parameters.

    abstract_state: the state half of `nnx.split(module)`, of arrays or of ShapeDtypeStructs. Each
    leaf of the answer is a tuple with one name or None per axis. Raises ValueError where a
    parameter carries no names, or a wrong number of them.
    """
    axes = {}
    for path, variable in nnx.to_flat_state(abstract_state):
        names = variable.get_metadata().get("out_sharding")
        if names is None or len(names) != len(variable.shape):
            raise ValueError(
                f"parameter {'.'.join(map(str, path))}: expected one axis name for each of its "
                f"{len(variable.shape)} axes, got {names}"
            )
        axes[path] = tuple(names)
    return nnx.traversals.unflatten_mapping(axes)
