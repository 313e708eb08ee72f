"""Why a run of `algos/bnpo.py` returns what it does: its actors, its critic and its gradients.

    python experiments/diagnose_bnpo.py --run-dir runs/... --out runs/diagnosis

Reads the last checkpoint of a run on the arm, without a sweep, whose critic takes the policy's
parameters. It measures:

  return    whole episodes of the actor with its parameter noise (explorer) and of each target
            actor, greedy and sampled. Also greedy while the goal of another environment is shown,
            which does not matter to a policy that ignores its goal; and the smallest mean of 20
            sampled episodes
  value     target critic at the first target actor beside Monte Carlo returns of that actor, summed
            over the parts of the reward; critic and actor beside their targets, on replayed steps
  circle    mean reward and share of paid steps, by the place of the target, in the same episodes
  rewarded  shares of all replayed steps: with a positive reward to learn from, before and after a
            shift of the goal; paid by the task; and both
  cosine    between the gradients of PPO's and of DDPG's rule for the weights of the mean, on the
            same steps, with the first brain's clip range; and of each rule on two halves of the
            steps, which is 1 without noise

Behind each number stands the 95 % bootstrap interval of its IQM over seeds.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __name__ == "__main__":  # import from this checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import envs
from algos import bnpo
from algos.launch import cli, evaluation, logs, program, report, rundir

GROUP = 20  # episodes of one of the author's evaluations
TAIL = 400  # further steps of a Monte Carlo return
SECTORS = 8  # of the target's circle


def read_state(run_dir: Path) -> tuple[bnpo.Config, Any]:
    """Config and last checkpoint, all seeds, of a run; ValueError if it cannot be diagnosed."""
    run = rundir.read_run(run_dir)
    if run.algo != "bnpo" or any(run.labels) or not run.config["env"].startswith("arm/"):
        raise ValueError(f"{run_dir} is not a run of algos/bnpo.py on the arm without a sweep")
    config = rundir.from_json(bnpo.Config, run.config)
    if config.critic_input != "distribution":
        raise ValueError(f"{run_dir}: its critic takes the action, not the policy's parameters")
    saved = rundir.checkpoints(run_dir)
    if not saved:
        raise ValueError(f"{run_dir} has no checkpoint: train it again")
    keys = jax.random.split(jax.random.key(0), len(run.seeds))
    algo = bnpo.build(config, bnpo.make_env(config))
    shapes = jax.eval_shape(jax.vmap(algo.init), keys)
    shapes = shapes._replace(update=jax.ShapeDtypeStruct((), jnp.int32))  # seeds share it
    return config, rundir.load_tree(saved[-1], shapes)[0]


def cosine(x, y):
    """Cosine [] of the angle between two vectors."""
    return x @ y / jnp.sqrt((x @ x) * (y @ y))


def make_diagnose(config: bnpo.Config, num_envs: int, num_rows: int) -> Callable:
    """Function of the state of one seed and a key: all measurements, scalars by name.

    It plays `num_envs` episodes, a multiple of GROUP, of each actor in each way, and looks at
    `num_rows` rows, an even number, of the replay.
    """
    env = envs.make(config.env, num_envs, stagger=False)
    goals, T, H = env.goals, config.num_steps, config.max_nstep
    shift = dataclasses.replace(config, her_strategy="shift")
    sizes = env.obs_size, *config.hidden, env.action_size
    no_noise = tuple(map(jnp.zeros, itertools.pairwise(sizes)))

    def reward_at(obs, kind=config.reward_kind):
        return bnpo.reward_of(goals, kind, obs)

    def target_actors(state):
        """Parameters of the target actors by their number."""
        named = state.target_params.items()
        return {name.removeprefix("actor"): x for name, x in named if name != "critic"}

    actor = bnpo.Actor(config, env.action_size)
    critic = bnpo.Critic(config, reward_at(jnp.zeros((1, env.obs_size))).shape[-1])

    def q_of(params, inputs, policy):
        return critic.apply(params["critic"], inputs, policy)

    def returns(state, key):
        """Returns of whole episodes; every actor meets the same ones in every way."""

        def act(way, obs, key, greedy):
            other = jnp.roll(goals.desired_goal(obs), 1, 0)
            goal = jnp.where(way["shuffle"], other, goals.desired_goal(obs))
            inputs = bnpo.normalize(state.obs_stats, goals.with_goal(obs, goal))
            policy = actor.apply(way["params"], inputs, way["noise"])
            return policy.sample(way["std"] * jax.random.normal(key, policy.mean.shape))

        actors = {"explorer": (state.params["actor"], state.noise)}
        actors |= {f"target {k}": (x, no_noise) for k, x in target_actors(state).items()}
        # One row for each actor and way: greedy, greedy with another's goal, sampled.
        rows = [row for row in actors.values() for _ in range(3)]
        params, noise = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        ways = {
            "params": params,
            "noise": noise,
            "std": jnp.tile(jnp.array([0.0, 0.0, 1.0]), len(actors)),
            "shuffle": jnp.tile(jnp.array([False, True, False]), len(actors)),
        }
        keys = jnp.broadcast_to(key, (len(rows),))
        scores = evaluation.evaluate(act, ways, env, keys)[0].reshape(len(actors), 3, num_envs)
        out = {}
        for name, (greedy, shuffled, sampled) in zip(actors, scores, strict=True):
            out[f"return/{name}, greedy"] = greedy.mean()
            out[f"return/{name}, greedy, another's goal"] = shuffled.mean()
            out[f"return/{name}, sampled"] = sampled.mean()
            out[f"return/{name}, sampled, least of 20"] = sampled.reshape(-1, GROUP).mean(-1).min()
        return out

    def beside_monte_carlo(state, key):
        """Sampled episodes of the first target actor: their rewards, and the critic beside them."""
        key_reset, key_noise, key_env = jax.random.split(key, 3)
        targets = state.target_params

        def step(carry, x):
            (obs, env_state), (noise, key) = carry, x
            inputs = bnpo.normalize(state.obs_stats, obs)
            policy = actor.apply(targets["actor0"], inputs, no_noise)
            obs, env_state, *_, info = long.step(key, env_state, policy.sample(noise))
            return (obs, env_state), (q_of(targets, inputs, policy), info["final_observation"])

        # One episode holds all steps, whatever the task's own time limit.
        limit = max(env.max_steps, T + TAIL)
        long = envs.make(config.env, num_envs, stagger=False, max_steps=limit)
        noise = jax.random.normal(key_noise, (T + TAIL, num_envs, env.action_size))
        xs = noise, jax.random.split(key_env, T + TAIL)
        q, arrived = jax.lax.scan(step, long.reset(key_reset), xs)[1]
        reward, paid = reward_at(arrived).sum(-1), reward_at(arrived, "env")[..., 0] > 0.0
        add = lambda later, reward: (reward + config.gamma * later,) * 2
        total = jax.lax.scan(add, jnp.zeros(num_envs), reward, reverse=True)[1][:T].ravel()
        value = q[:T].sum(-1).ravel()
        out = {
            "value/critic": value.mean(),
            "value/Monte Carlo": total.mean(),
            "value/correlation of both": jnp.corrcoef(value, total)[0, 1],
        }
        goal = goals.desired_goal(arrived)
        turn = jnp.arctan2(goal[..., 0], goal[..., -1]) / (2.0 * jnp.pi) % 1.0
        for k in range(SECTORS):
            here = jnp.floor(SECTORS * turn) == k
            name = f"circle/{360 * k // SECTORS:03} to {360 * (k + 1) // SECTORS:03} degrees"
            out[f"{name}, reward learned from"] = jnp.where(here, reward, 0.0).sum() / here.sum()
            out[f"{name}, paid by the task"] = (here & paid).sum() / here.sum()
        return out

    def replayed(state, key):
        """Critic, actors, hindsight and gradients on steps of the first brain's window."""
        *keys, _ = jax.random.split(key, 6)
        params, targets = state.params, state.target_params
        rows = bnpo.draw_rows(shift, config.brains[0], state.update, num_rows, keys)
        rows = rows._replace(relabel=jnp.ones(num_rows, bool))
        own = bnpo.gather(state.replay, rows, H)
        shifted = bnpo.relabel(goals, shift, state.replay, rows, own)

        inputs = bnpo.normalize(state.obs_stats, own.obs)
        n = bnpo.lookaheads(config, num_rows)
        last = inputs[jnp.arange(num_rows), n]
        bootstrap = q_of(targets, last, actor.apply(targets["actor0"], last, no_noise))
        next_value = jnp.roll(q_of(targets, inputs[:, :-1], own.policy), -1, 1)
        trace = config.gamma, config.gae_lambda
        target = bnpo.nstep_target(own.reward, next_value, bootstrap, n, own.terminated, *trace)
        inputs, action, behaviour = jax.tree.map(
            lambda x: x[:, 0], (inputs, own.action, own.policy)
        )

        def slope(brain, part):
            """Gradient [P] of a brain's rule for the weights of the mean."""

            def loss(weights):
                tree = {"params": params["actor"]["params"] | weights}
                policy = actor.apply(tree, inputs[part], state.noise)
                old = jax.tree.map(lambda x: x[part], behaviour)
                log_ratio = bnpo.log_prob_of(policy, action[part])
                log_ratio -= bnpo.log_prob_of(old, action[part])
                q = q_of(params, inputs[part], policy)
                reduce = jnp.mean if config.ratio_reduce == "mean" else jnp.sum
                ratio = bnpo.ratio_of(reduce(log_ratio, -1))
                return bnpo.policy_loss(brain, q, ratio, target[part])

            weights = params["actor"]["params"]
            weights = {name: x for name, x in weights.items() if name.startswith("kernel")}
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(weights))])

        every, first, second = slice(None), slice(num_rows // 2), slice(num_rows // 2, None)
        ppo, ddpg = (dataclasses.replace(config.brains[0], rule=x) for x in ("ppo", "ddpg"))
        q = q_of(params, inputs, behaviour)
        difference = (q - q_of(targets, inputs, behaviour)).sum(-1)
        rewarded = own.reward[:, 0].sum(-1) > 0.0
        paid = reward_at(own.obs[:, 1], "env")[:, 0] > 0.0
        out = {
            "value/std of the critic": q.sum(-1).std(),
            "value/critic - target": difference.mean(),
            "value/|critic - target|": jnp.abs(difference).mean(),
            "rewarded/own goal": rewarded.mean(),
            "rewarded/shifted goal": (reward_at(shifted.obs[:, 1]).sum(-1) > 0.0).mean(),
            "rewarded/and paid by the task": (rewarded & paid).mean(),
            "rewarded/paid by the task": paid.mean(),
            "cosine/PPO, DDPG": cosine(slope(ppo, every), slope(ddpg, every)),
            "cosine/PPO, PPO": cosine(slope(ppo, first), slope(ppo, second)),
            "cosine/DDPG, DDPG": cosine(slope(ddpg, first), slope(ddpg, second)),
        }
        policy = actor.apply(params["actor"], inputs, no_noise)
        for k, tree in target_actors(state).items():
            kl = bnpo.kl_divergence(policy, actor.apply(tree, inputs, no_noise))
            out[f"value/KL of the actor from target {k}"] = kl.mean()
        return out

    def diagnose(state, key):
        keys = jax.random.split(key, 3)
        return (
            returns(state, keys[0]) | beside_monte_carlo(state, keys[1]) | replayed(state, keys[2])
        )

    return diagnose


def markdown(measured: dict[str, np.ndarray]) -> str:
    """Table of the measurements, one number for each seed."""
    rows = []
    for name, values in measured.items():
        low, high = report.iqm_interval(values)
        shown = ", ".join(f"{x:.3g}" for x in values)
        rows.append([name, f"{report.iqm(values):.3g} [{low:.3g}, {high:.3g}]", shown])
    return report.table(["measurement", "IQM [95 %]", "seeds"], rows)


@logs.steady()
def main(argv: list[str] | None = None) -> None:
    """Diagnose from the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--run-dir", type=cli.path, required=True, help="run of algos/bnpo.py with a checkpoint"
    )
    parser.add_argument("--num-envs", type=cli.integer, default=200, help="episodes of each actor")
    parser.add_argument("--num-rows", type=cli.integer, default=4096, help="rows of the replay")
    parser.add_argument(
        "--out", type=cli.path, required=True, help="files to write, without suffix"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    if args.num_envs < 1 or args.num_envs % GROUP:
        parser.error(f"--num-envs {args.num_envs}: a multiple of {GROUP} is needed")
    if args.num_rows < 2 or args.num_rows % 2:
        parser.error(f"--num-rows {args.num_rows}: an even number is needed")
    try:
        program.setup_jax(1)
        table, numbers = rundir.measurement_files(args.out, args.force)
        config, state = read_state(args.run_dir)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    axes = program.per_row(type(state), 0, None)
    diagnose = make_diagnose(config, args.num_envs, args.num_rows)
    measured = jax.jit(jax.vmap(diagnose, (axes, None)))(state, jax.random.key(1))
    measured = {name: np.asarray(x, np.float64) for name, x in measured.items()}
    print(markdown(measured), end="")
    rundir.write_text(table, markdown(measured))
    seeds = {name: x.tolist() for name, x in measured.items()}
    made = {"run_dir": str(args.run_dir), **logs.surroundings()}
    rundir.write_json(numbers, {"made": made, "seeds": seeds})


if __name__ == "__main__":
    main()
