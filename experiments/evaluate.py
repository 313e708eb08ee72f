"""Exported policies of a run, played greedily on more episodes than a launch has time for.

    python experiments/evaluate.py RUN_DIR --episodes 256 --json evaluation.json

Each policy plays from start states of its own, drawn by --seed, which the launch's own evaluations
have not seen. The table is that of compare.py.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from algos.launch import cli, evaluation, logs, policies, program, report, rundir

SLICE = 50  # steps between two moves of the progress bar, where ctrl-C ends the program


def evaluate_run(run: rundir.Run, episodes: int, seed: int) -> rundir.Run:
    """The run with the returns [R, episodes] of its final policies; NaN where a seed is dead.

    ValueError if there is no policy.
    """
    alive = np.flatnonzero(np.isfinite(run.returns[:, -1]).all(-1))
    if not len(alive):
        raise ValueError(f"{run.path}: no seed is alive")
    paths = [run.path / f"policy_s{row:03d}.npz" for row in alive]
    # One Algo serves all rows: what may be swept changes training, never how to act.
    known, algo, template = policies.read_policy(paths[0])
    trees, metas = zip(*(rundir.load_tree(path, template) for path in paths), strict=True)
    env = envs.make(run.config["env"], episodes, stagger=False, reset_mode="cached")
    policies.check_task(paths[0], known, env)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.asarray(alive))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees)
    play = jax.jit(lambda keys: evaluation.begin(env, keys))(keys)
    advance = jax.jit(partial(evaluation.advance, algo.act, env=env, num_steps=SLICE))
    with tqdm.tqdm(total=env.max_steps, unit=" steps") as bar:
        while play.alive.any():
            play = advance(stacked, play=play)
            bar.update(min(SLICE, env.max_steps - bar.n))
    broken = int(play.broken.sum())
    if broken:
        print(
            f"{broken:,} steps had a reward or observation that is not finite: they end their "
            "episodes with reward 0",
            file=sys.stderr,
        )
    final = np.full((len(run.seeds), episodes), np.nan)
    final[alive] = play.returns
    return run._replace(final=final, steps=np.array([metas[0]["step"]]))


@logs.steady()
def main(argv: list[str] | None = None):
    """Evaluate from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("run_dir", type=cli.path, metavar="RUN_DIR", help="a finished run")
    parser.add_argument("--episodes", type=cli.integer, default=256, help="of each policy")
    parser.add_argument("--seed", type=cli.seed, default=1, help="of the start states")
    parser.add_argument(
        "--json", type=cli.path, help="JSON to write, with the means of every policy"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    if args.episodes < 1:
        parser.error(f"--episodes {args.episodes}: at least 1 is needed")
    try:
        program.setup_jax(1)
        rundir.check_new([args.json], args.force)
        run = evaluate_run(rundir.read_run(args.run_dir), args.episodes, args.seed)
        rows = [report.summary(*entry) for entry in report.entries([run])]
        print(report.markdown(rows), end="")
        if args.json:
            known = {"episodes": args.episodes, "seed": args.seed, "rows": rows}
            rundir.write_json(args.json, known | logs.surroundings())
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped: nothing is kept\n")


if __name__ == "__main__":
    main()
