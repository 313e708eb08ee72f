"""Draw one greedy episode of the best, the median and the worst seed of a launch.

    python experiments/render.py RUN_DIR

Writes RUN_DIR/videos: HTML for Brax, GIF for the others. Needs no display.
"""

import sys
from pathlib import Path

import jax
import numpy as np

import envs
from algos import rundir
from envs.wrappers import raw_state


def render_run(run_dir: Path) -> list[Path]:
    """Render the three seeds; returns the files. ValueError if there is nothing to draw."""
    run = rundir.read_run(run_dir)
    env = envs.make(run.config["env"], 1, stagger=False, reset_mode="cached")
    if env.frame is None or env.render is None:
        raise ValueError(f"{env.name} cannot be drawn")
    final = run.returns[:, -1].mean(-1)
    order = [i for i in np.argsort(final) if np.isfinite(final[i])]
    if not order:
        raise ValueError(f"{run_dir}: no seed is alive")
    chosen = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    files = []
    for name, row in chosen.items():
        act = rundir.load_policy(run_dir / f"policy_s{row:03d}.npz")
        frames, length = jax.device_get(jax.jit(episode, static_argnums=(0, 1))(act, env))
        frames = jax.tree.map(lambda x, n=length: x[:n], frames)
        files.append(env.render(frames, run_dir / "videos" / f"{name}_s{run.seeds[row]:03d}"))
    return files


def episode(act, env):
    """Frames [max_steps, ...] of one episode, and how many of them belong to it."""
    key_reset, key = jax.random.split(jax.random.key(0))
    obs, state = env.reset(key_reset)

    def step(carry, key):
        obs, state = carry
        frame = env.frame(raw_state(jax.tree.map(lambda x: x[0], state)))
        obs, state, _, _, _, info = env.step(key, state, act(obs))
        return (obs, state), (frame, info["returned"][0])

    _, (frames, returned) = jax.lax.scan(step, (obs, state), jax.random.split(key, env.max_steps))
    return frames, returned.argmax() + 1


def main() -> None:
    """Render from the command line; one line and exit status 2 for bad input."""
    if len(sys.argv) != 2:
        print("usage: python experiments/render.py RUN_DIR", file=sys.stderr)
        raise SystemExit(2)
    try:
        files = render_run(Path(sys.argv[1]))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    main()
