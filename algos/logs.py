"""Where numbers go: console, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from algos import rundir


class Log:
    """All sinks of a launch; on any but the lead host it is silent and writes nothing."""

    def __init__(
        self, run_dir: Path, name: str, config: Any, launch: Any, rows: Any, lead: bool, step: int
    ):
        self.verbose = launch.verbose if lead else -1
        self.file = open(run_dir / "metrics.jsonl", "a") if lead else None  # noqa: SIM115
        self.tensorboard = None
        if lead and launch.tensorboard:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.wandb_runs: list[tuple[Any, int | None]] = []  # (run, its row; None: all rows)
        if lead and launch.track:
            with self.wandb_guard():
                self.wandb_runs = start_wandb(run_dir, name, config, launch, rows)
        self.bar: Any = None

    # console

    def say(self, text: str, level: int = 1) -> None:
        """Print a line if verbose enough, above the progress bar if there is one."""
        if self.verbose >= level:
            tqdm.tqdm.write(text, file=sys.stderr)

    @contextlib.contextmanager
    def waiting(self, text: str):
        """Show `text` with a running clock while the block works, and how long it took."""
        start, ended = time.time(), threading.Event()
        live = self.verbose >= 1 and sys.stderr.isatty()

        def tick():
            while live and not ended.wait(1.0):
                print(f"\r{text} {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)

        if not live:
            self.say(f"{text} ...")
        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield
        finally:
            ended.set()
            clock.join()
            print("\r" if live else "", end="", file=sys.stderr)
        self.say(f"{text} took {time.time() - start:.1f} s")

    @contextlib.contextmanager
    def progress(self, total: int, done: int):
        """Progress bar over steps, with speed and time left; terminals only."""
        hidden = None if self.verbose >= 1 else True  # None: hidden if not a terminal
        self.bar = tqdm.tqdm(
            total=total, initial=done, unit=" steps", unit_scale=True, disable=hidden, leave=False
        )
        with self.bar:
            yield

    def advance(self, steps: int) -> None:
        """Move the progress bar."""
        self.bar.update(steps)

    def evaluation(self, step, returns, lengths, seeds_dead, speed, elapsed, left) -> None:
        """One aligned line: greedy return over live seeds, length, training speed, clock."""
        alive = np.flatnonzero(~seeds_dead)
        if not len(alive):
            self.say(f"step {step:>11,} | no seed is alive", 0)
            return
        returns, lengths = returns[alive], lengths[alive]
        self.say(
            f"step {step:>11,} | return {returns.mean():9.2f} "
            f"[{returns.min():9.2f}, {returns.max():9.2f}] | length {lengths.mean():6.1f} | "
            f"seeds {len(alive)}/{len(seeds_dead)} | {speed:9,.0f} steps/s | "
            f"{clock(elapsed)} elapsed, {clock(left)} left"
        )

    # records

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values`: numbers, or arrays [R] with NaN for what is absent."""
        if self.file is None:
            return
        line = {"global_step": step} | {k: jsonable(v) for k, v in values.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        scalars = aggregate(values)
        self.say("  " + "  ".join(f"{k} {v:.4g}" for k, v in scalars.items()), 2)
        if self.tensorboard:
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, step)
        with self.wandb_guard():
            for run, row in self.wandb_runs:
                mine = scalars if row is None else row_values(values, row)
                run.log({"global_step": step, **mine})

    def close(self) -> None:
        """Finish all sinks."""
        if self.file:
            self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        with self.wandb_guard():
            for run, _ in self.wandb_runs:
                run.finish()

    @contextlib.contextmanager
    def wandb_guard(self):
        """Any failure of W&B ends the tracking, never the run."""
        try:
            yield
        except Exception as error:
            self.say(f"W&B failed and is off from here on: {error}", 0)
            self.wandb_runs = []


def tell_warnings_once() -> None:
    """From here on a warning is one line on stderr, and is not told again.

    Python's own memory of what it told is lost whenever a library changes its filters.
    """
    told: set[str] = set()

    def tell(message, *_, **__):
        if str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = tell


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss, or a dash if not known yet."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def start_wandb(run_dir: Path, name: str, config: Any, launch: Any, rows: Any):
    """One W&B run for the launch, and one per row under --wandb-seeds."""
    import wandb

    device = jax.devices()[0].device_kind
    options = {
        "project": launch.wandb_project,
        "entity": launch.wandb_entity or None,
        "group": f"{name}__{config.env}",
        "dir": str(run_dir),
        "config": dataclasses.asdict(config) | dataclasses.asdict(launch) | versions(),
        "tags": [*launch.wandb_tags, f"jax {jax.__version__}", device, commit()[:9] or "no commit"],
        "reinit": "create_new",
        "resume": "allow",
    }
    which = [None, *range(len(rows.seeds))] if launch.wandb_seeds else [None]
    runs = []
    for row in which:
        suffix = "launch" if row is None else f"seed{rows.seeds[row]} {rows.labels[row]}".strip()
        identity = hashlib.sha256(f"{run_dir.resolve()} {suffix}".encode()).hexdigest()[:12]
        run = wandb.init(
            name=f"{run_dir.name}-{suffix}",
            id=identity,
            job_type="launch" if row is None else "seed",
            **options,
        )
        run.define_metric("*", step_metric="global_step")
        runs.append((run, row))
    return runs


def aggregate(values: dict[str, Any]) -> dict[str, float]:
    """Means over the rows that have a value; returns also as min, max and IQM."""
    scalars = {}
    for key, value in values.items():
        present = np.asarray(value, np.float64)
        present = present[np.isfinite(present)]
        if present.size:
            scalars[key] = float(present.mean())
            if key.endswith("episodic_return"):
                scalars[key + "_min"] = float(present.min())
                scalars[key + "_max"] = float(present.max())
                scalars[key + "_iqm"] = rundir.iqm(present)
    return scalars


def row_values(values: dict[str, Any], row: int) -> dict[str, float]:
    """The charts/ and eval/ values of one row."""
    mine = {k: np.atleast_1d(v) for k, v in values.items() if k.startswith(("charts/", "eval/"))}
    return {k: float(v[row]) for k, v in mine.items() if len(v) > row and np.isfinite(v[row])}


def jsonable(value: Any) -> Any:
    """Plain numbers and lists, null for what is not finite."""
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [jsonable(x) for x in array]
    return float(array) if np.isfinite(array) else None


# --- what a run was made with ---


def surroundings() -> dict[str, Any]:
    """Command, commit, versions and machine of this process."""
    return {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        # Of networks; None is jax's own.
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }


def versions() -> dict[str, str]:
    """Versions of what can change a result."""
    names = ("jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx", "gymnax", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def commit() -> str:
    """Git commit, with + if algos/ or envs/ differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "algos", "envs"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
