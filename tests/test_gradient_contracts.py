"""What a training step moves for its parameters, compiled for TPUs: static contracts.

bfloat16 compute, 12 scanned layers. XLA may write a reduce-scatter as permutes beside the products
(each part of a sum travels on while the next is computed): as many bytes, and overlapped.
"""

import collections
import functools
import math
import re

import jax
import pytest

from effattn.data.config import DataConfig
from effattn.experiment import Experiment, OptimizerConfig, TrainConfig
from effattn.models.transformer import TransformerConfig
from effattn.nn.memory import MemoryConfig
from effattn.parallel.mesh import MeshConfig
from effattn.parallel.sequence import SequenceConfig
from effattn.static.chips import chip_of
from effattn.static.collectives import collectives as collectives_of
from effattn.static.tpu import compile_step, describe_devices
from effattn.train.program import abstract_batch, make_program

LAYERS = 12
# A part of a table has whole vectors of 128 lanes; of a narrower one XLA sums all of it.
WIDTH = 1024
MLP_WIDTH, VOCAB = 2048, 1536
MESHES = {
    "fsdp=8": ({"fsdp": 8}, "local", None),
    "fsdp=8, MLP in tiles": ({"fsdp": 8}, "local", 512),
    "fsdp=2 x sequence=4": ({"fsdp": 2, "sequence": 4}, "ring", None),
    "fsdp=4 x tensor=2": ({"fsdp": 4, "tensor": 2}, "local", None),
    "fsdp=4": ({"fsdp": 4}, "local", None),
}
EIGHT = [name for name, (axes, *_) in MESHES.items() if math.prod(axes.values()) == 8]


def described(topology, name, num_slices=1):
    """(experiment, mesh, program). Slices are the data axis."""
    axes, kind, mlp_tile = MESHES[name]
    experiment = Experiment(
        model=TransformerConfig(
            num_layers=LAYERS,
            width=WIDTH,
            num_heads=8,
            mlp_width=MLP_WIDTH,
            remat="full",
            tied=False,
        ),
        data=DataConfig(batch_size=8, seq_len=2048),
        optimizer=OptimizerConfig(name="adamw"),
        train=TrainConfig(compute_dtype="bfloat16", loss_tile=512),
        mesh=MeshConfig(data=num_slices, **axes),
        sequence=SequenceConfig(kind=kind),
        memory=MemoryConfig(mlp_tile=mlp_tile),
    )
    chip = chip_of(topology)
    mesh = experiment.mesh.build(describe_devices(chip, topology, num_slices))
    return experiment, mesh, make_program(experiment, VOCAB, mesh)


@functools.cache
def compiled(topology, name, num_slices=1):
    """(collectives, memory, program)"""
    experiment, mesh, program = described(topology, name, num_slices)
    arguments = program.abstract, abstract_batch(experiment, program.rows)
    done = compile_step(chip_of(topology), program.step, arguments, mesh)
    return collectives_of(done.as_text(), mesh), done.memory_analysis(), program


@pytest.mark.parametrize("name", EIGHT)
def test_the_program_scatters_what_it_sums(name):
    mlp_tile = MESHES[name][2]
    experiment, mesh, program = described("v5e:2x4", name)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.abstract, abstract_batch(experiment, program.rows))
    # The gradient of the head, whole on each device before and one part of it afterwards. That of
    # the embedding is added up in parts, of vectors that were exchanged.
    sums = re.compile(r"stablehlo.reduce_scatter.*?}\) : \(tensor<([0-9x]+)xf32>\)", re.S)
    wanted = {f"{WIDTH}x{VOCAB}": 1}
    if "sequence" in name:  # over one axis after the other
        wanted |= {f"{WIDTH // 2}x{VOCAB}": 1}
    if mlp_tile is not None:
        wanted |= {f"{WIDTH}x{MLP_WIDTH}": 2, f"{MLP_WIDTH}x{WIDTH}": 1}
    assert collections.Counter(sums.findall(lowered.as_text())) == wanted


CASES = [
    ("v5e:2x4", "fsdp=8"),
    *(
        pytest.param(topology, name, marks=pytest.mark.slow)
        for topology in ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
        for name in EIGHT
        if (topology, name) != ("v5e:2x4", "fsdp=8")
    ),
]


# What a program scatters by itself, the head's gradient and those of MLPs in tiles, stays a
# reduce-scatter on v5e and v6e. The compiler for v5p sums it whole on a mesh of 2x2x2 and cuts it
# afterwards.
SUMMED_WHOLE = "v5p:2x2x2"


@pytest.mark.parametrize(("topology", "name"), CASES)
def test_gradients_of_split_weights_are_not_all_reduced(topology, name):
    found, _, program = compiled(topology, name)
    smallest = WIDTH * WIDTH * 4 // 8  # a part of the smallest matrix, in float32
    over_parameters = {"fsdp", "sequence"}
    large = [
        c
        for c in found
        if c.kind == "all-reduce" and over_parameters & set(c.axes) and c.bytes >= smallest
    ]
    if topology != SUMMED_WHOLE:
        assert not large, large
    elif MESHES[name][2] is None:
        assert not [c for c in large if c.times % LAYERS == 0], large
    assert program.whole == 0


@pytest.mark.parametrize(("topology", "name"), CASES)
def test_the_state_is_donated(topology, name):
    _, memory, program = compiled(topology, name)
    leaves = jax.tree.leaves((program.abstract.params, program.abstract.opt_state))
    state = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )
    # The step, the key and the tiling of small arrays come on top.
    assert 0 <= memory.alias_size_in_bytes - state <= 2**16


def test_weights_are_gathered_in_the_compute_dtype():
    found, _, program = compiled("v5e:2x4", "fsdp=8")
    gathered = sum(c.bytes * c.times for c in found if c.kind == "all-gather")
    # bfloat16, seven eighths from others, in the forward pass at least; what else moves of them
    # moves as permutes beside the products.
    whole = program.model.num_parameters * 2 * 7 / 8
    assert gathered <= 1.1 * 2 * whole


@pytest.mark.slow
def test_between_slices_each_chip_sends_its_part_of_the_gradients():
    found, _, program = compiled("v5e:2x2", "fsdp=4", num_slices=2)
    across = [c for c in found if c.across_slices]
    assert {c.axes for c in across} == {("data",)}
    # In float32; the loss's sums and the norms' vectors come on top.
    part = program.model.num_parameters * 4 / 4
    assert part <= sum(c.bytes * c.times for c in across) <= 1.05 * part
