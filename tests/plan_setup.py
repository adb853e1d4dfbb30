"""A plan made by hand, whose numbers are easy to follow."""

from effattn.plan.report import LayerFlops, Memory, Moved, PallasCall, Plan

GIB = 2**30


def plan(**changes):
    """8 chips of 16 GiB, 12 GiB in use, 2 s a step by its collectives."""
    fields = dict(
        method="compiled",
        kind="train",
        config="transformer_tiny",
        overrides=("model.remat=full",),
        topology="v5e:2x4",
        chip="v5e",
        chips=8,
        num_slices=1,
        mesh={"data": 2, "fsdp": 4},
        num_parameters=1_000_000,
        tokens=16_384,
        memory=Memory(
            parameters=2 * GIB,
            optimizer=4 * GIB,
            batch=GIB // 2,
            outputs=6 * GIB,
            aliased=6 * GIB,
            temporaries=5 * GIB,
            code=GIB // 2,
            capacity=16 * GIB,
        ),
        collectives=(
            Moved(
                kind="all-gather",
                axes=("fsdp",),
                count=48,
                bytes=4 * GIB,
                overlapped=3 * GIB,
                seconds=0.08,
                exposed=0.02,
                network="links",
            ),
            Moved(
                kind="all-reduce",
                axes=("data",),
                count=2,
                bytes=GIB,
                overlapped=0,
                seconds=1.0,
                exposed=1.0,
                network="links",
            ),
        ),
        flops=(
            LayerFlops(layer="attention", layers=12, part="projections", flops=6e9),
            LayerFlops(layer="attention", layers=12, part="pairs", flops=2e9),
            LayerFlops(layer="head", layers=1, part="logits", flops=1e9),
        ),
        peak_flops=197e12,
        model_flops=98.5e12,
        recomputed_flops=32.8e12,
        hlo_flops=1.1e14,
        hbm_bytes=4e11,
        roofline={"compute": 0.98, "memory": 0.5, "links": 1.02},
        pallas=(PallasCall(name="attention_forward", count=12, vmem=2**20),),
        compile_seconds=12.0,
        compile_host_bytes=GIB,
        versions={"jax": "0.12.0.1"},
        date="2026-11-27",
        command="effattn plan --config=transformer_tiny --topology=v5e:2x4",
        notes=("static",),
    )
    return Plan(**{**fields, **changes})
