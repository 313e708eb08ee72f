"""Rows: the runs of a launch, every seed of every swept value, and which host trains them."""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from algos import common
from algos.launch.cli import Launch


class Rows(NamedTuple):
    """What distinguishes the R runs of a launch."""

    seeds: np.ndarray  # [R]
    hparams: dict[str, np.ndarray]  # field -> [R]
    labels: list[str]  # swept values of each row, or ""

    def name(self, i: int) -> str:
        """Row i in words: its seed and swept values."""
        return f"seed {self.seeds[i]} {self.labels[i]}".strip()

    def swept(self, row: int) -> dict[str, float]:
        """Swept values of a row, to the digits of its label."""
        return {field: float(f"{values[row]:g}") for field, values in self.hparams.items()}


def make_rows(launch: Launch, config: Any, traceable: tuple[str, ...]) -> Rows:
    """Seeds times swept values, values outermost; ValueError for a malformed sweep."""
    grid = {}
    for item in launch.sweep:
        field, _, values = item.partition("=")
        if field not in traceable:
            raise ValueError(f"cannot sweep over {field!r}: choose from {', '.join(traceable)}")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"cannot read --sweep {item!r}: write {field}=VALUE,VALUE") from None
        if field in grid or len({f"{x:g}" for x in numbers}) < len(numbers):
            raise ValueError(f"--sweep {item!r} repeats a field or a value (to 6 digits)")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"--sweep {item!r} has a value that is not finite")
        grid[field] = numbers
        for value in numbers:
            # as it is written, and as the program gets it
            common.check(dataclasses.replace(config, **{field: value}))
            common.check(dataclasses.replace(config, **{field: float(np.float32(value))}))
    points = list(itertools.product(*grid.values()))
    repeated = np.repeat(np.array(points, np.float32), launch.num_seeds, 0)
    labels = [" ".join(f"{k}={v:g}" for k, v in zip(grid, point, strict=True)) for point in points]
    return Rows(
        seeds=np.tile(np.arange(launch.seed, launch.seed + launch.num_seeds), len(points)),
        hparams={field: repeated[:, i] for i, field in enumerate(grid)},
        labels=[label for label in labels for _ in range(launch.num_seeds)],
    )


def inputs(rows: Rows) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Keys [R] and swept values [R] of the rows, as the compiled program takes them."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(rows.seeds, jnp.uint32))
    return keys, {k: jnp.asarray(v) for k, v in rows.hparams.items()}


def evaluation_keys(rows: Rows, update: int, part: int = 0) -> jax.Array:
    """Keys [R] of an evaluation's start states: a function of seed, finished updates and part."""

    def key_of(seed):
        key = jax.random.fold_in(jax.random.key(seed), 2**31)  # apart from the key of training
        return jax.random.fold_in(jax.random.fold_in(key, update), part)

    return jax.vmap(key_of)(jnp.asarray(rows.seeds, jnp.uint32))


# --- hosts ---


def local(rows: Rows) -> Rows:
    """The part of the rows that this host trains."""
    count, index = jax.process_count(), jax.process_index()
    if len(rows.seeds) % count:
        raise ValueError(f"{len(rows.seeds)} rows cannot be shared by {count} hosts equally")
    part = slice(index * len(rows.seeds) // count, (index + 1) * len(rows.seeds) // count)
    hparams = {k: v[part] for k, v in rows.hparams.items()}
    return Rows(rows.seeds[part], hparams, rows.labels[part])


def gather(values: np.ndarray) -> np.ndarray:
    """Values [R / hosts, ...] of this host's rows -> those [R, ...] of all."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.process_allgather(values, tiled=True))
