"""Exported policies of a run, played greedily on more episodes than a launch has time for.

    python experiments/evaluate.py RUN_DIR --episodes 256 --json evaluation.json

Each policy plays from the same start states, drawn by --seed, which the launch's own evaluations
have not seen. The table is that of compare.py.
"""

import argparse
from pathlib import Path

import jax
import numpy as np

import envs
from algos import common, logs, rundir
from experiments import compare


def evaluate_run(run: rundir.Run, episodes: int, seed: int) -> rundir.Run:
    """The run with returns and lengths [R, 1, episodes] of its final policies; NaN where dead.

    ValueError if there is no policy.
    """
    alive = np.flatnonzero(np.isfinite(run.returns[:, -1]).all(-1))
    if not len(alive):
        raise ValueError(f"{run.path}: no seed is alive")
    paths = {row: run.path / f"policy_s{row:03d}.npz" for row in alive}
    # One function serves all rows: what may be swept changes training alone, never how to act.
    algo, template = rundir.read_policy(paths[alive[0]])
    env = envs.make(run.config["env"], episodes, stagger=False, reset_mode="cached")
    play = jax.jit(lambda policy: common.evaluate(algo.act, policy, env, jax.random.key(seed)))
    played = np.full((2, len(run.seeds), 1, episodes), np.nan)
    for row, path in paths.items():
        policy, meta = rundir.load_tree(path, template)
        played[:, row, 0] = play(policy)
    return run._replace(returns=played[0], lengths=played[1], steps=np.array([meta["step"]]))


def main(argv: list[str] | None = None):
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--episodes", type=int, default=256, help="of each policy")
    parser.add_argument("--seed", type=int, default=1, help="of the start states")
    parser.add_argument("--json", help="JSON to write, with the means of every policy")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        parser.error(f"--episodes {args.episodes}: at least 1 is needed")
    try:
        run = evaluate_run(rundir.read_run(args.run_dir), args.episodes, args.seed)
        rows = [compare.summary(*entry) for entry in compare.entries([run])]
        if args.json:
            known = {"episodes": args.episodes, "seed": args.seed, "rows": rows}
            rundir.write_json(Path(args.json), known | logs.surroundings())
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    print(compare.markdown(rows), end="")


if __name__ == "__main__":
    main()
