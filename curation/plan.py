"""What `python -m common.plan` compiles of curation: a pass of k-means, and what ends it."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.kernels.nearest_centroid.reranked import Nearest, Rounded
from common.sharding import MESH_AXES, make_mesh
from common.sharding.program import Inference, Program
from curation import assignment, device_rows
from curation.config import PRESETS as PRESETS
from curation.config import PoolConfig
from curation.seeding import SAMPLE_ROWS, SAMPLE_ROWS_PER_SEED


def programs(
    config: PoolConfig, devices: Sequence[jax.Device], inference: Inference
) -> Mapping[str, Callable[[], Program]]:
    """Returns for each level the pass over a chunk of rows, and what ends a pass.

    A pass is run once for every chunk, an iteration has one pass, a clustering up to its
    `iterations` and one more; the notes of a program add that up.
    """
    mesh = make_mesh(devices=devices)
    found: dict[str, Callable[[], Program]] = {}
    rows = config.rows
    for level, k in enumerate(config.levels.clusters):
        found[f"level{level + 1}.assign"] = _bound(_assign, config, mesh, level, rows)
        found[f"level{level + 1}.update"] = _bound(_update, config, mesh, level, rows)
        rows = k * config.levels.splits_of(level)
    return found


def _bound(make: Callable[..., Program], *arguments: object) -> Callable[[], Program]:
    return lambda: make(*arguments)


def _assign(config: PoolConfig, mesh: Mesh, level: int, rows: int) -> Program:
    k, width = config.levels.clusters[level], config.width
    block = device_rows.block_for(rows)
    memory = int(config.memory * 1e9)
    shard, resident = device_rows.shard_rows(rows, width, mesh.size, memory=memory, block=block)
    chunk = min(shard * mesh.size, rows)
    whole, each = _shardings(mesh)
    so_far = _pass(mesh, k, width)
    x = jax.ShapeDtypeStruct((shard * mesh.size, width), jnp.float32, sharding=each)
    labels = jax.ShapeDtypeStruct((shard * mesh.size,), jnp.int32, sharding=each)
    scores = short = None
    if resident:
        scores = jax.ShapeDtypeStruct(labels.shape, jnp.float32, sharding=each)
        short = Rounded(jax.ShapeDtypeStruct(x.shape, jnp.uint16, sharding=each), scores)
    moved = jax.ShapeDtypeStruct((k,), jnp.bool_, sharding=whole)
    centroids = jax.ShapeDtypeStruct((k, width), jnp.float32, sharding=whole)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    span = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return Program(
        function=assignment.assign,
        arguments=(
            so_far,
            x,
            Nearest(labels, scores, scores),
            number,
            centroids,
            moved,
            span,
            short,
        ),
        keywords={"mesh": mesh, "block": block, "precision": "bfloat16"},
        holds={"rows": (x, short), "centroids": centroids, "sums": so_far},
        mesh=mesh,
        flops=2.0 * chunk * k * width,
        items=chunk,
        unit="rows",
        shape=f"{chunk:,} of {rows:,} rows × {width}, {k:,} clusters",
        loops=True,
        notes=_notes(config, level, rows, chunk, resident),
    )


def _update(config: PoolConfig, mesh: Mesh, level: int, rows: int) -> Program:
    k, width = config.levels.clusters[level], config.width
    whole, _ = _shardings(mesh)
    so_far = _pass(mesh, k, width)
    centroids = jax.ShapeDtypeStruct((k, width), jnp.float32, sharding=whole)
    span = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return Program(
        function=_add_and_move,
        arguments=(so_far, centroids, span),
        keywords={"mesh": mesh},
        holds={"centroids": centroids, "sums": so_far},
        mesh=mesh,
        flops=float(k * width),
        items=rows,
        unit="rows",
        shape=f"{k:,} centroids × {width}, once an iteration",
    )


@functools.partial(jax.jit, static_argnames="mesh")
def _add_and_move(
    parts: assignment.Pass, centroids: jax.Array, span: jax.Array, *, mesh: Mesh
) -> assignment.Step:
    return assignment.move_centroids(assignment.totals(mesh, parts), centroids, span)


def _notes(config: PoolConfig, level: int, rows: int, chunk: int, resident: bool) -> list[str]:
    levels, k, width = config.levels, config.levels.clusters[level], config.width
    passes = levels.kmeans.iterations + 1
    flops = 2.0 * rows * k * width * passes
    where = "stay on the devices" if resident else f"come in {-(-rows // chunk)} chunks"
    notes = [f"rows {where}; a clustering is at most {passes} passes over them, {flops:.2g} FLOPs"]
    if (steps := levels.steps_of(level)) > 0:
        sample = min(rows, k * levels.sample_of(level, rows))
        again = steps * 2.0 * k * width * (sample * passes + rows)
        notes.append(f"{steps} more clusterings of {sample:,} rows: {again:.2g} FLOPs")
    if (parts := levels.splits_of(level)) > 1:
        notes.append(
            f"{k:,} clusters are then divided into {parts} each: "
            f"{2.0 * rows * parts * width * passes:.2g} FLOPs, one cluster after the other"
        )
    seeds = min(rows, max(SAMPLE_ROWS, SAMPLE_ROWS_PER_SEED * k))
    notes.append(
        f"seeds come from {seeds:,} rows; their last choice, among some 3.5 K candidates, runs on "
        f"one device and reads {4.0 * 3.5 * k * width * k / 1e12:.3g} TB of its memory"
    )
    return notes


def _pass(mesh: Mesh, clusters: int, width: int) -> assignment.Pass:
    _, each = _shardings(mesh)
    shapes = jax.eval_shape(lambda: assignment.start(mesh, clusters, width))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=each), shapes)


def _shardings(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(MESH_AXES))
