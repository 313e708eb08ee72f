"""Why a run of `algos/bnpo.py` returns what it does: its actors, its critic and its gradients.

    python experiments/diagnose_bnpo.py --run-dir runs/... --out results/bnpo/diagnosis/a1

Reads the last checkpoint of a run on the arm, without a sweep, with the lifted critic:

  return    whole episodes of the actor with the noise of its weights (explorer) and of each target
            actor, greedy and sampled; greedy with the goal of another environment shown, which a
            policy that ignores its goal would not notice; the least mean of 20 sampled episodes
  value     target critic at the first target actor beside Monte Carlo returns of that actor, sums
            over the parts of the reward; critic and actors beside their targets on replayed rows
  circle    where the target is, in the same episodes: mean reward and share of steps that are paid
  rewarded  share of these rows with a positive reward that is learned from, before and after a
            shift of the goal, and which of them the task pays for as well
  cosine    between the gradients of PPO's and of DDPG's rule for the weights of the mean, on the
            same rows; and of each rule on two halves of the rows, which is 1 without noise

After a number stands the 95 % bootstrap interval of its IQM over seeds.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import envs
from algos import bnpo, common, logs, rundir
from experiments import compare

GROUP = 20  # episodes of one of the author's evaluations
TAIL = 400  # further steps of a Monte Carlo return
SECTORS = 8  # of the target's circle


def read_state(run_dir: Path) -> tuple[bnpo.Config, Any]:
    """Config and last checkpoint, all seeds, of a run; ValueError if it cannot be diagnosed."""
    run = rundir.read_run(run_dir)
    if run.algo != "bnpo" or any(run.labels) or not run.config["env"].startswith("arm/"):
        raise ValueError(f"{run_dir} is not a run of algos/bnpo.py on the arm without a sweep")
    config, algo = rundir.load_algo("bnpo", run.config)
    if config.critic_input != "distribution":
        raise ValueError(f"{run_dir}: its critic is told the action, not the distribution")
    saved = rundir.checkpoints(run_dir)
    if not saved:
        raise ValueError(f"{run_dir} has no checkpoint: train it again")
    keys = jax.random.split(jax.random.key(0), len(run.seeds))
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
    goals, L, H = env.goals, config.num_steps, config.max_nstep
    sizes = env.obs_size, *config.hidden, env.action_size
    silence = tuple(map(jnp.zeros, itertools.pairwise(sizes)))

    def reward_at(obs, kind=config.reward_kind):
        return goals.compute_reward(goals.achieved_goal(obs), goals.desired_goal(obs), kind)

    actor = bnpo.Actor(config, env.action_size)
    critic = bnpo.Critic(config, reward_at(jnp.zeros((1, env.obs_size))).shape[-1])

    def q_of(params, inputs, policy):
        told = jnp.concatenate([policy.mean, jnp.exp(policy.log_std)], -1)
        return critic.apply(params["critic"], inputs, told)

    def returns(state, key):
        """Returns of whole episodes; every actor meets the same ones in every way."""

        def play(acting, way):
            def act(_, obs, key, greedy):
                other = jnp.roll(goals.desired_goal(obs), 1, 0)
                goal = jnp.where(way["shuffle"], other, goals.desired_goal(obs))
                inputs = bnpo.normalize(state.obs_stats, goals.with_goal(obs, goal))
                policy = actor.apply(acting[0], inputs, acting[1])
                return policy.sample(way["std"] * jax.random.normal(key, policy.mean.shape))

            return common.evaluate(act, None, env, key)[0]

        targets = state.target_params["actor"]
        actors = {"explorer": (state.params["actor"], state.noise)}
        actors |= {f"target {k}": (params, silence) for k, params in targets.items()}
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *actors.values())
        ways = {"std": jnp.array([0.0, 0.0, 1.0]), "shuffle": jnp.array([False, True, False])}
        scores = jax.vmap(jax.vmap(play, (None, 0)), (0, None))(stacked, ways)
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
            policy = actor.apply(targets["actor"][0], inputs, silence)
            obs, env_state, *_, info = env.step(key, env_state, policy.sample(noise))
            return (obs, env_state), (q_of(targets, inputs, policy), info["final_observation"])

        noise = jax.random.normal(key_noise, (L + TAIL, num_envs, env.action_size))
        xs = noise, jax.random.split(key_env, L + TAIL)
        q, arrived = jax.lax.scan(step, env.reset(key_reset), xs)[1]
        reward, paid = reward_at(arrived).sum(-1), reward_at(arrived, "env")[..., 0] > 0.0
        add = lambda later, reward: (reward + config.gamma * later,) * 2
        total = jax.lax.scan(add, jnp.zeros(num_envs), reward, reverse=True)[1][:L].ravel()
        value = q[:L].sum(-1).ravel()
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
        """Critic, actors, relabelling and gradients on rows of the first brain's window."""
        keys, params, targets = jax.random.split(key, 4), state.params, state.target_params
        newest = jnp.minimum(state.update, config.window[0])
        draw = lambda key, most: jax.random.randint(key, (num_rows,), 0, most)
        rows = bnpo.Rows(
            slot=(state.update - 1 - draw(keys[0], newest)) % max(config.window),
            env=draw(keys[1], config.num_envs),
            t=draw(keys[2], L - H),
            relabel=jnp.ones(num_rows, bool),
            h=draw(keys[3], L - H + 1),
        )
        look = lambda strategy: bnpo.relabelled(
            goals, strategy, state.replay.obs, rows, np.arange(H + 1)
        )
        inputs = bnpo.normalize(state.obs_stats, look("none"))
        index = rows.slot[:, None], rows.env[:, None], rows.t[:, None] + np.arange(H)
        recorded = jax.tree.map(lambda x: x[index], tuple(state.replay[1:]))
        action, acted, reward, terminated = recorded

        n = bnpo.lookaheads(num_rows, H, config.floating_step)
        last = inputs[jnp.arange(num_rows), n]
        bootstrap = q_of(targets, last, actor.apply(targets["actor"][0], last, silence))
        next_value = jnp.roll(q_of(targets, inputs[:, :-1], acted), -1, 1)
        trace = config.gamma, config.gae_lambda
        target = bnpo.nstep_target(reward, next_value, bootstrap, n, terminated, *trace)
        inputs, action, acted = jax.tree.map(lambda x: x[:, 0], (inputs, action, acted))

        def slope(bellman, part):
            """Gradient [P] of DDPG's or of PPO's rule for the weights of the mean."""

            def loss(weights):
                tree = {"params": params["actor"]["params"] | weights}
                policy = actor.apply(tree, inputs[part], state.noise)
                log_ratio = bnpo.log_prob_of(policy, action[part])
                log_ratio -= bnpo.log_prob_of(jax.tree.map(lambda x: x[part], acted), action[part])
                q = q_of(params, inputs[part], policy)
                eps = 0.0 if bellman else 0.2
                return bnpo.actor_loss(q, log_ratio.mean(-1), target[part], bellman, eps, False)

            weights = params["actor"]["params"]
            weights = {name: x for name, x in weights.items() if name.startswith("kernel")}
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(weights))])

        every, first, second = slice(None), slice(num_rows // 2), slice(num_rows // 2, None)
        q = q_of(params, inputs, acted)
        rewarded = reward[:, 0].sum(-1) > 0.0
        paid = reward_at(look("none")[:, 1], "env")[:, 0] > 0.0
        out = {
            "value/deviation of the critic": q.sum(-1).std(),
            "value/critic - target": (q - q_of(targets, inputs, acted)).sum(-1).mean(),
            "value/|critic - target|": jnp.abs((q - q_of(targets, inputs, acted)).sum(-1)).mean(),
            "rewarded/own goal": rewarded.mean(),
            "rewarded/shifted goal": (reward_at(look("shift")[:, 1]).sum(-1) > 0.0).mean(),
            "rewarded/and paid by the task": (rewarded & paid).mean(),
            "rewarded/paid by the task": paid.mean(),
            "cosine/PPO, DDPG": cosine(slope(False, every), slope(True, every)),
            "cosine/PPO, PPO": cosine(slope(False, first), slope(False, second)),
            "cosine/DDPG, DDPG": cosine(slope(True, first), slope(True, second)),
        }
        acting = actor.apply(params["actor"], inputs, silence)
        for k, tree in targets["actor"].items():
            kl = common.gaussian_kl(acting, actor.apply(tree, inputs, silence))
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
        low, high = rundir.iqm_interval(values)
        shown = ", ".join(f"{x:.3g}" for x in values)
        rows.append([name, f"{rundir.iqm(values):.3g} [{low:.3g}, {high:.3g}]", shown])
    return compare.table(["measurement", "IQM [95 %]", "seeds"], rows)


def main(argv: list[str] | None = None) -> None:
    """Diagnose from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run of algos/bnpo.py")
    parser.add_argument("--num-envs", type=int, default=200, help="episodes of each actor")
    parser.add_argument("--num-rows", type=int, default=4096, help="rows of the replay")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    args = parser.parse_args(argv)
    if args.num_envs < 1 or args.num_envs % GROUP:
        parser.error(f"--num-envs {args.num_envs}: a multiple of {GROUP} is needed")
    if args.num_rows < 2 or args.num_rows % 2:
        parser.error(f"--num-rows {args.num_rows}: an even number is needed")
    try:
        config, state = read_state(args.run_dir)
    except ValueError as error:
        parser.error(str(error))
    axes = type(state)(*[0] * len(state))._replace(update=None)
    diagnose = make_diagnose(config, args.num_envs, args.num_rows)
    measured = jax.jit(jax.vmap(diagnose, (axes, None)))(state, jax.random.key(1))
    measured = {name: np.asarray(x, np.float64) for name, x in measured.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(measured)
    args.out.with_suffix(".md").write_text(text)
    seeds = {name: x.tolist() for name, x in measured.items()}
    made = {"run_dir": str(args.run_dir), **logs.surroundings()}
    rundir.write_json(args.out.with_suffix(".json"), {"made": made, "seeds": seeds})
    print(text, end="")


if __name__ == "__main__":
    main()
