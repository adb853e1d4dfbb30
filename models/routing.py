"""Routing Transformer: layers that attend inside clusters of content, and layers with a window.

The paper splits the heads of a layer between the two; here layers take turns, and clusters are
causal (see `effattn.nn.mixers.routing`). Source: Roy et al. 2020 (arXiv 2003.05997).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effattn.batch import TokenInfo
from effattn.checks import check_at_least, check_in
from effattn.nn.block import Block
from effattn.nn.clusters import moved_means, unit
from effattn.nn.decoder import Stack
from effattn.nn.language_model import LanguageModel
from effattn.nn.layers import Embedding, GatedMLP, Head, RMSNorm, gated_mlp_width
from effattn.nn.mixer import Output
from effattn.nn.mixers.attention import AttentionConfig
from effattn.nn.mixers.routing import RoutingConfig
from effattn.parallel.sequence import Local, SequenceParallel


@dataclass(kw_only=True)
class RoutingModelConfig:
    """pattern: "window" or "routing" per layer, repeated until num_layers are named.

    window: tokens seen to the left. num_clusters, cluster_window: of routing layers, as
    `num_clusters` and `window` of their mixer. decay: of the centroids' moving average. mlp_width
    None: 8/3 width, up to a multiple of 64. remat: none | dots | names | full | offload.
    """

    num_layers: int = 12
    width: int = 768
    pattern: tuple[str, ...] = ("window", "routing")
    num_heads: int = 12
    window: int = 128
    num_clusters: int = 16
    cluster_window: int | None = None
    commitment: float = 1e-4
    decay: float = 0.999
    mlp_width: int | None = None
    rotary_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tied: bool = True
    remat: str = "none"

    def layers(self) -> tuple[str, ...]:
        """The kind of every layer. Raises ValueError for an unknown kind or an empty pattern."""
        check_at_least("model.num_layers", self.num_layers, 1)
        check_at_least("len(model.pattern)", len(self.pattern), 1)
        for kind in self.pattern:
            check_in("model.pattern", kind, ["routing", "window"])
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

    def inner_mlp_width(self) -> int:
        return gated_mlp_width(self.width) if self.mlp_width is None else self.mlp_width

    def flops_by_part(
        self, *, vocab_size: int, seq_len: int
    ) -> tuple[tuple[str, int, str, float], ...]:
        """With clusters of one size: a routed query sees 1 / num_clusters of what is before it,
        no more than cluster_window, and the centroids twice. See flops.py."""
        width = self.width
        visible = (seq_len + 1) / 2 / self.num_clusters
        if self.cluster_window is not None:
            visible = min(visible, self.cluster_window)
        seen = {
            "routing": visible + 1 + self.num_clusters,  # memory; both sides of 2 c d are 4 c d
            "window": _mean_window(seq_len, self.window),
        }
        rows: list[tuple[str, int, str, float]] = []
        for kind in dict.fromkeys(self.layers()):
            count = self.layers().count(kind)
            rows += [
                (kind, count, "projections", count * 2 * width * 4 * width),
                (kind, count, "pairs", count * 4 * width * seen[kind]),
                (kind, count, "mlp", count * 2 * width * 3 * self.inner_mlp_width()),
            ]
        return (*rows, ("head", 1, "logits", 2 * width * vocab_size))

    def build(
        self,
        *,
        vocab_size: int,
        sequence: SequenceParallel = Local(),  # noqa: B008 - frozen
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "RoutingModel":
        """Raises ValueError where a field does not fit another."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"model.decay: got {self.decay}, expected 0 <= decay < 1")
        return RoutingModel(self, vocab_size=vocab_size, sequence=sequence, dtype=dtype, rngs=rngs)


def _mean_window(seq_len: int, window: int) -> float:
    full = max(0, seq_len - window)
    some = seq_len - full
    return (some * (some + 1) / 2 + full * (window + 1)) / seq_len


class RoutingModel(LanguageModel):
    # Rounding can move a token to another cluster.
    chooses = True
    untrained = ("means",)

    def __init__(
        self,
        config: RoutingModelConfig,
        *,
        vocab_size: int,
        sequence: SequenceParallel,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        layers, width, std = config.layers(), config.width, config.initializer_range
        stds = {"init_std": std, "out_init_std": std / (2 * len(layers)) ** 0.5}
        self.decay = config.decay
        mixers: dict[str, RoutingConfig | AttentionConfig] = {
            "routing": RoutingConfig(
                num_heads=config.num_heads,
                num_clusters=config.num_clusters,
                window=config.cluster_window,
                rotary_base=config.rotary_base,
                commitment=config.commitment,
                **stds,
            ),
            "window": AttentionConfig(
                num_heads=config.num_heads,
                window=config.window,
                rotary_base=config.rotary_base,
                **stds,
            ),
        }

        def norm(rngs: nnx.Rngs) -> RMSNorm:
            return RMSNorm(width, eps=config.norm_eps, dtype=dtype, rngs=rngs)

        def block(kind: str, rngs: nnx.Rngs) -> Block:
            mixer = mixers[kind].build(width, sequence=sequence, dtype=dtype, rngs=rngs)
            mlp = GatedMLP(width, config.inner_mlp_width(), **stds, dtype=dtype, rngs=rngs)
            return Block(mixer, mlp, norm(rngs), norm(rngs))

        self.embedding = Embedding(vocab_size, width, init_std=std, dtype=dtype, rngs=rngs)
        self.stack = Stack(layers, block, remat=config.remat, rngs=rngs)
        self.final_norm = norm(rngs)
        self.head = (
            None if config.tied else Head(width, vocab_size, init_std=std, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, tokens: jax.Array, info: TokenInfo, *, key: jax.Array | None = None, extra: Any = None
    ) -> Output:
        """tokens: int [batch, seq_len]. With a key, in training, `extra` gathers clusters' members.

        Metric `clusters_used`: share of the clusters that have a member in this batch.
        """
        x, aux = self.stack(self._embed(tokens), info, key=key)
        routed = [a for a in aux if a is not None]
        losses, metrics = {}, {}
        if routed:
            parts = [a.commitment for a in routed]
            losses["commitment_loss"] = (
                jnp.sum(jnp.concatenate([p[0] for p in parts])),
                jnp.sum(jnp.concatenate([p[1] for p in parts])),
            )
            used = [jnp.any(a.members != 0, axis=-1).ravel() for a in routed]
            metrics["clusters_used"] = jnp.mean(jnp.concatenate(used).astype(jnp.float32))
        if key is not None and extra is not None:
            extra = [e + a.members.astype(e.dtype) for e, a in zip(extra, routed, strict=True)]
        return Output(self.final_norm(x), losses, metrics, extra)

    def _routed(self) -> list[int]:
        return [i for i, block in enumerate(self.stack.blocks) if hasattr(block.mixer, "means")]

    def init_extra(self) -> list[jax.Array] | None:
        """Sums of every cluster's unit vectors since the last update, an array per routed block."""
        shapes = [self.stack.blocks[i].mixer.means.shape for i in self._routed()]
        return [jnp.zeros(shape, jnp.float32) for shape in shapes] or None

    def end_step(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """(parameters, extra) after an optimiser's step: centroids move to their members' mean.

        params: a pure dict. An optimiser that decays or scales `means` changes nothing: their
        directions alone are read, and here they are made unit vectors again.
        """
        if extra is None:
            return params, extra
        blocks = dict(params["stack"]["blocks"])
        for i, members in zip(self._routed(), extra, strict=True):
            block = blocks[i]
            means = moved_means(unit(block["mixer"]["means"]), members, self.decay)
            blocks[i] = {**block, "mixer": {**block["mixer"], "means": means}}
        params = {**params, "stack": {**params["stack"], "blocks": blocks}}
        return params, [jnp.zeros_like(members) for members in extra]
