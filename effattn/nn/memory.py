"""What a training step keeps of a long sequence, and where: one value for every model.

Each block recomputes by its `remat`; these say how much of a row exists at once inside a block, and
what of it waits in the host's memory for the backward pass.
"""

from dataclasses import dataclass
from typing import Any

from flax import nnx

from effattn.checks import check_at_least, check_in

# Names that policies of recomputation go by (`jax.ad_checkpoint.checkpoint_name`): a block's input,
# a mixer's output, and the inner activations of the tokens that wait on the host.
RESIDUAL, MIXER, HIDDEN = "residual", "mixer", "hidden"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Memory:
    """As `MemoryConfig`."""

    mlp_tile: int | None = None
    residual_on_host: bool = False
    hidden_on_host: float = 0.0


@dataclass(kw_only=True)
class MemoryConfig:
    """Long sequences on few chips.

    mlp_tile: tokens of a row, over all devices of its sequence axis, whose inner activations in an
      MLP exist at once; None: all (ALST, arXiv 2506.13996).
    residual_on_host: a block's input waits in host memory for the backward pass (ALST).
    hidden_on_host: the share of each device's tokens whose inner MLP activations wait in host
      memory too; those of the others are computed again (MEMO, arXiv 2407.12117, whose split by
      tokens this is; what it keeps of attention, `remat` names or offloads here). See
      `share_on_host`.
    residual_dtype: of the stream between blocks, "float32" or "bfloat16", half the bytes.
    """

    mlp_tile: int | None = None
    residual_on_host: bool = False
    hidden_on_host: float = 0.0
    residual_dtype: str = "float32"

    def check(self) -> None:
        """Raises ValueError that names the field."""
        if self.mlp_tile is not None:
            check_at_least("memory.mlp_tile", self.mlp_tile, 1)
        if not 0 <= self.hidden_on_host <= 1:
            raise ValueError(
                f"memory.hidden_on_host: got {self.hidden_on_host}, expected a share from 0 to 1"
            )
        if self.hidden_on_host and self.mlp_tile is not None:
            raise ValueError(
                f"memory.hidden_on_host: got {self.hidden_on_host} beside memory.mlp_tile="
                f"{self.mlp_tile}, expected one of them: tiles keep no inner activations"
            )
        check_in("memory.residual_dtype", self.residual_dtype, DTYPES)


def lay_out(model: Any, config: MemoryConfig) -> None:
    """Tells every block and stack of a model. Raises ValueError where one cannot do it."""
    from effattn.nn.block import Block
    from effattn.nn.decoder import Stack

    config.check()
    if config == MemoryConfig():
        return
    memory = Memory(config.mlp_tile, config.residual_on_host, config.hidden_on_host)
    found = False
    for _, node in nnx.iter_graph(model):
        if isinstance(node, Stack):
            node.take(memory)
            found = True
        elif isinstance(node, Block):
            node.take(memory)
        if config.residual_dtype != "float32" and hasattr(node, "residual_dtype"):
            node.residual_dtype = config.residual_dtype
    if not found:
        raise ValueError(
            f"memory: {type(model).__name__} is no stack of blocks; expected the fields as they are"
        )


def share_on_host(
    *,
    layer_bytes: float,
    layer_seconds: float,
    host_bytes_per_second: float,
    num_layers: int,
    host_bytes: float,
) -> float:
    """The largest `hidden_on_host` whose copies hide behind a layer's forward pass and fit.

    layer_bytes: inner activations of one layer on one device. host_bytes: of host memory for one
    device. MEMO: a layer_bytes / bandwidth <= layer_seconds, num_layers a layer_bytes <= host.
    """
    hidden = layer_seconds * host_bytes_per_second / layer_bytes
    return max(0.0, min(1.0, hidden, host_bytes / (num_layers * layer_bytes)))
