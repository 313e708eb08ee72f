"""Pictures of what was learnt: one greedy episode of the best, the median and the worst seed.

Seeds are ranked by their final evaluation. All start from the same state and are played in one
compiled scan, from the exported policies.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import envs
from algos.launch import policies, report, rundir
from envs import wrappers

RANKS = ("best", "median", "worst")


def render_run(run_dir: Path | str, say: Callable = print) -> list[Path]:
    """Draw a finished run to RUN_DIR/videos, and `say` what is drawn; returns the files written.

    If it cannot be drawn, that is one line on stderr and no error, since training is done. Raises
    ValueError if `run_dir` is not a run directory.
    """
    run = rundir.read_run(run_dir)
    try:
        return draw(run, say)
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        print(f"not rendered: {' '.join(reason.splitlines())}", file=sys.stderr)
        return []


def draw(run: rundir.Run, say: Callable) -> list[Path]:
    """Play the chosen seeds and draw their episodes."""
    if run.done is None:  # its policies may be of a shorter run
        raise ValueError(f"{run.path} has not ended: --resume it first")
    rows = ranked(run.final.mean(-1))
    env = envs.make(run.config["env"], len(rows), stagger=False, reset_mode="cached")
    if env.frame is None or env.render is None:
        raise ValueError(f"{env.name} has no drawing")
    files = [run.path / f"policy_s{row:03d}.npz" for row in rows.values()]
    acts = []
    for file in files:
        known, algo, policy = policies.read_policy(file)
        policies.check_task(file, known, env)
        acts.append(policies.act_of(known, algo, policy))
    frames, lengths = jax.device_get(play(env, acts, jax.random.key(0)))
    paths = []
    for i, (rank, row) in enumerate(rows.items()):
        episode = jax.tree.map(lambda x, i=i: x[: lengths[i], i], frames)
        stem = stem_of(run, rank, row)
        stem.parent.mkdir(exist_ok=True)
        path = env.render(episode, stem)
        say(f"{caption(run, rank, row)}, {path}")
        paths.append(path)
    return paths


def stem_of(run: rundir.Run, rank: str, row: int) -> Path:
    """File of a row's picture, without its ending."""
    return run.path / "videos" / f"{rank}_s{row:03d}"


def files(run_dir: Path) -> list[Path]:
    """The pictures in a run directory."""
    return [x for rank in RANKS for x in (run_dir / "videos").glob(f"{rank}_s*")]


def caption(run: rundir.Run, rank: str, row: int) -> str:
    """What a picture shows."""
    seed = f"seed {run.seeds[row]} {run.labels[row]}".strip()
    final = run.final.mean(-1)
    digits = report.decimals(report.iqm(final))  # as in tables
    return f"{rank}: {seed}, final return {report.number(final[row], digits)}"


def pictures(run: rundir.Run) -> dict[Path, str]:
    """The pictures of the run that were drawn, and their captions."""
    final = run.final.mean(-1)
    rows = ranked(final) if np.isfinite(final).any() else {}
    found = {}
    for rank, row in rows.items():
        for ending in (".gif", ".html"):
            path = stem_of(run, rank, row).with_suffix(ending)
            if path.exists():
                found[path] = caption(run, rank, row)
    return found


def ranked(final: np.ndarray) -> dict[str, int]:
    """Rows of the best, median and worst of the returns [R]; dead ones left out, none twice."""
    order = np.argsort(-final, kind="stable")[: np.isfinite(final).sum()]  # NaN is last
    if not len(order):
        raise ValueError("no seed is alive")
    chosen: dict[str, int] = {}
    for rank, place in zip(RANKS, (0, (len(order) - 1) // 2, -1), strict=True):
        if order[place] not in chosen.values():
            chosen[rank] = int(order[place])
    return chosen


def play(env: envs.Env, acts: list[Callable], key: jax.Array):
    """One greedy episode of each policy: frames, leaves [max_steps, n, ...], and lengths [n].

    A frame shows the state before a step, so the last one is the state in which the last action was
    taken; what follows an episode's end is to be cut off.
    """
    key_reset, key_step = jax.random.split(key)

    def step(carry, key):
        obs, state, alive = carry
        frame = jax.vmap(env.frame)(wrappers.raw_state(state))
        action = jnp.stack([act(x) for act, x in zip(acts, obs, strict=True)])
        obs, state, _, _, _, info = env.step(key, state, action)
        return (obs, state, alive & ~info["returned"]), (frame, alive)

    @jax.jit
    def episodes():
        same = lambda x: jnp.repeat(x[:1], len(acts), 0)
        carry = *jax.tree.map(same, env.reset(key_reset)), jnp.ones(len(acts), bool)
        frames, alive = jax.lax.scan(step, carry, jax.random.split(key_step, env.max_steps))[1]
        return frames, alive.sum(0)

    return episodes()
