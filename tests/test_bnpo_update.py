"""BNPO: what an update does, against a reference that is written in loops; learning."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import arrays, assert_allclose, assert_same

from algos import bnpo, ppo

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_bnpo_update")

# The tiny config: N environments with episodes of T steps, H of which are looked ahead, in a replay
# buffer of W episodes.
N, T, H, W = 4, 8, 3, 4
PPO_BRAIN, DDPG_BRAIN = tiny.config_of("bnpo").brains
replace = dataclasses.replace

# Nothing learns, and each brain has one minibatch per update: PPO, then DDPG.
FROZEN = {"learning_rate": 0.0, "turn_interval": 8, "turn_minibatches": 1.0, "learning_starts": 20}
FROZEN |= {"her_ratio": 0.5}
FROZEN_PPO = replace(PPO_BRAIN, **FROZEN, actor_tau=0.5, critic_tau=0.1)
FROZEN_DDPG = replace(DDPG_BRAIN, **FROZEN, actor_tau=0.0, critic_tau=0.3)
UPDATES = 12
# Combined, so that few updates are compiled. DDPG begins before PPO in the first.
VARIANTS = {
    "as published": {},
    "action": {
        "brains": (
            replace(FROZEN_PPO, learning_starts=100),
            replace(FROZEN_DDPG, own_target_actor=True),
        ),
        "critic_input": "action",
        "floating_nstep": False,
    },
    "ratio": {
        "brains": (
            FROZEN_PPO,
            replace(
                FROZEN_DDPG, rule="weighted_ddpg", clip_eps=0.3, mean_only=False, actor_tau=0.25
            ),
        ),
        "ratio_reduce": "sum",
        "share_target_actor": True,
        "max_grad_norm": 0.01,
    },
    "future": {
        "brains": (FROZEN_PPO, replace(FROZEN_DDPG, rule="weighted_ddpg", clip_eps=0.3)),
        "env": "test_bnpo_update:still",
        "her_strategy": "future",
        "ratio_denominator": "relabelled",
        "reward_kind": "env",
    },
}


def still():
    """`tiny.seek` with a constant goal, and the distance to it as the reward."""
    raw, distance = tiny.seek(), lambda achieved, goal, kind: jnp.abs(achieved - goal)

    def step(key, state, action):
        obs, state, _, terminated, info = raw.step(key, state, action)
        return obs, state, jnp.abs(obs[1] - obs[3]), terminated, info

    goals = raw.goals._replace(moving=False, compute_reward=distance)
    return raw._replace(step=step, goals=goals)


def breaking():
    """`tiny.seek` whose physics breaks on large actions, and which never ends otherwise."""
    raw = tiny.seek()

    def step(key, state, action):
        obs, state, reward, _, info = raw.step(key, state, action)
        obs = jnp.where(action[0] > 0.5, jnp.nan, obs)
        return obs, state, reward, jnp.zeros((), bool), info

    return raw._replace(step=step)


def test_a_step_of_broken_physics_has_reward_0():
    """As the environment says. What stands in for its observation is no state to be rewarded."""
    algo = tiny.build("bnpo", frozen_config(env="test_bnpo_update:breaking"))
    replay = jax.jit(algo.update)(algo.init(jax.random.key(0)))[0].replay
    reward, broken = replay.reward[0], replay.terminated[0]
    assert 0 < broken.sum() < broken.size
    assert (reward[broken] == 0.0).all()
    assert (reward[~broken] != 0.0).any(-1).all()


def different(tree, key, scale=0.3):
    """The same tree, moved at random."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


def frozen_config(**changes):
    fixed = {"brains": (FROZEN_PPO, FROZEN_DDPG), "critic_lr": 0.0, "max_grad_norm": 1e9}
    return tiny.config_of("bnpo", **(fixed | changes))


@cache
def run(config, strange=False):
    """(state, next state, metrics) of updates in which a brain learns, of networks that differ.

    `strange`: before every second of them the means of the behaviour policies are moved by 2.
    """
    algo = tiny.build("bnpo", config)
    update = jax.jit(algo.update)
    state = algo.init(jax.random.key(0))
    params = different(state.params, 0)
    targets = {
        name: different(params[name[:-1]], 1 + int(name[-1]))
        for name in state.target_params
        if name != "critic"
    }
    targets["critic"] = different(params["critic"], 3)
    state = state._replace(params=params, target_params=targets)
    found = []
    for i in range(UPDATES):
        if strange and i % 2:
            policy = state.replay.policy
            policy = policy._replace(mean=policy.mean + 2.0)
            state = state._replace(replay=state.replay._replace(policy=policy))
        new, metrics = update(state)
        numbers = lambda s: s._replace(replay=jax.tree.map(np.asarray, s.replay))
        found.append((numbers(state), numbers(new), metrics))
        state = new
    return [x for x in found if any(x[2][f"brain{k}/count"] for k in range(len(config.brains)))]


def run_variant(name):
    config = frozen_config(**VARIANTS[name])
    return config, run(config, strange=name == "ratio")


# --- the reference ---


@cache
def networks(config):
    """Compiled: policy of parameters, inputs, noise; Q of parameters, inputs, policy, action."""
    actor = bnpo.Actor(config, 2)
    critic = bnpo.Critic(config, 1 if config.reward_kind == "env" else 2)
    no_noise = jnp.zeros((4, 8)), jnp.zeros((8, 2))
    policy_of = lambda params, x, noise=no_noise: actor.apply(params, x, noise)
    return jax.jit(policy_of), jax.jit(critic.apply)


def inputs_of(state, obs):
    mean, var = np.asarray(state.obs_stats.mean), np.asarray(state.obs_stats.var)
    return np.clip((obs - mean) / np.sqrt(var + 1e-4), -10, 10)


def reward_of(config, obs):
    if config.reward_kind == "env":
        return np.abs(obs[..., 1:2] - obs[..., 3:])
    return np.asarray(tiny.seek().goals.compute_reward(obs[..., 1:2], obs[..., 3:], "proxy"))


def window_of(config, state, rows, b):
    """Observations [H + 1, 4], rewards [H, m] and ends [H] of a row, with its goals."""
    e, i, t = (int(x[b]) for x in (rows.episode, rows.env, rows.step))
    obs = np.array(state.replay.obs[e, i, t : t + H + 1])
    reward = np.array(state.replay.reward[e, i, t : t + H])
    terminated = np.array(state.replay.terminated[e, i, t : t + H])
    if rows.relabel[b]:
        there = state.replay.obs[e, i, int(rows.goal_step[b]) :]
        obs[:, 3:] = there[0, 1] if config.her_strategy == "future" else there[: H + 1, 3:]
        reward = np.where(terminated[:, None], reward, reward_of(config, obs[1:]))
    return obs, reward, terminated


def rows_of(config, k, state, new):
    """The rows that brain k samples in its one minibatch of an update, from the update's key."""
    brain, update = config.brains[k], int(state.update)
    (key_block,) = jax.random.split(jax.random.split(state.key, 3)[2], 1)
    key = jax.random.split(key_block, 2 + len(config.brains))[2 + k]
    *keys, key_choice = jax.random.split(jax.random.split(jax.random.fold_in(key, update))[0], 6)
    size = brain.batch_size * (8 if brain.importance_resampling else 1)
    rows = bnpo.draw_rows(config, brain, state.update, size, keys)
    if brain.importance_resampling:
        obs = np.stack([window_of(config, state, rows, b)[0][0] for b in range(size)])
        policy = networks(config)[0](state.params["actor"], inputs_of(new, obs), new.noise)
        at = rows.episode, rows.env, rows.step
        action, behaviour = jax.tree.map(
            lambda x: x[at], (state.replay.action, state.replay.policy)
        )
        density = lambda p: jax.scipy.stats.norm.pdf(action, p.mean, jnp.exp(p.log_std))
        ratio = (density(policy) / density(behaviour)).mean(-1)
        chosen = bnpo.resample(key_choice, ratio, brain.batch_size)
        rows = jax.tree.map(lambda x: x[chosen], rows)
    return jax.tree.map(np.asarray, rows)


def target_of(config, state, new, target_params, name, rows, b):
    """Target [m] of a row, and its first inputs, action and behaviour policy."""
    policy_of, q_of = networks(config)
    obs, reward, terminated = window_of(config, state, rows, b)
    inputs = inputs_of(new, obs)
    at = rows.episode[b], rows.env[b], rows.step[b] + np.arange(H)
    behaviour, action = jax.tree.map(lambda x: x[at], (state.replay.policy, state.replay.action))
    value = np.array(q_of(target_params["critic"], inputs[:H], behaviour, action))
    n = 1 + b % H if config.floating_nstep else H
    n = 1 if rows.relabel[b] else n
    bootstrap = q_of(target_params["critic"], inputs[n], policy_of(target_params[name], inputs[n]))
    y, weight = value[0], 1.0
    for j in range(n):
        after = bootstrap if j + 1 == n else value[j + 1]
        y = y + weight * (reward[j] + config.gamma * after * ~terminated[j] - value[j])
        if terminated[j]:
            break
        weight *= config.gamma * config.gae_lambda
    return y, (inputs[0], action[0], jax.tree.map(lambda x: x[0], behaviour))


def reference(*args):
    """The same of all rows."""
    found = [target_of(*args, b) for b in range(len(args[-1].step))]
    batch = jax.tree.map(lambda *x: np.stack(x), *(x for _, x in found))
    return np.stack([y for y, _ in found]), batch


def actor_loss(config, k, actor_params, params, noise, relabel, target, batch):
    """Loss of brain k, and the log-ratios of its rows."""
    brain, (policy_of, q_of) = config.brains[k], networks(config)
    inputs, action, behaviour = batch
    policy, start = (policy_of(x, inputs, noise) for x in (actor_params, params["actor"]))
    old = behaviour.log_prob(action)
    if config.ratio_denominator == "relabelled":
        old = jnp.where(relabel, start.log_prob(action), old)
    # PPO moves the ratio, DDPG the value; the other one is that of the actor before the step.
    moved, valued = (policy, start) if brain.rule == "ppo" else (start, policy)
    log_ratio = (moved.log_prob(action) - old) / (2 if config.ratio_reduce == "mean" else 1)
    if brain.mean_only:
        valued = valued._replace(log_std=jax.lax.stop_gradient(valued.log_std))
    q = q_of(params["critic"], inputs, valued)
    x, eps = jnp.minimum(jnp.exp(log_ratio), 100.0), brain.clip_eps
    surrogate = lambda gain: jnp.minimum(x * gain, jnp.clip(x, 1 - eps, 1 + eps) * gain)
    gain = (target - q if brain.rule == "ppo" else q - target).sum(-1)
    return -(gain if brain.rule == "ddpg" else surrogate(gain)).mean(), log_ratio


@cache
def losses(config, k):
    """Compiled: parameters and rows' data -> log-ratios, losses, gradients of actor and critic."""
    q_of = networks(config)[1]

    def critic_loss(critic_params, target, batch):
        return ((q_of(critic_params, batch[0], batch[2], batch[1]) - target) ** 2).mean()

    def both(params, *data):
        loss = jax.value_and_grad(partial(actor_loss, config, k), has_aux=True)
        (pg_loss, log_ratio), grads = loss(params["actor"], params, *data)
        vf_loss, critic_grads = jax.value_and_grad(critic_loss)(params["critic"], *data[2:])
        values = {"policy_loss": pg_loss, "value_loss": vf_loss}
        return log_ratio, values, {"actor": grads, "critic": critic_grads}

    return jax.jit(both)


def check(config, k, state, new, metrics, target_params):
    """A minibatch of brain k against the reference.

    Gives the target actor that it bootstraps from, which is the one that explains its value loss
    best, the largest ratio and the gradients.
    """
    brain, rows = config.brains[k], rows_of(config, k, state, new)
    metrics = {x.split("/")[1]: y for x, y in metrics.items() if x.startswith(f"brain{k}/")}
    actors = [name for name in target_params if name != "critic"]
    if brain.own_target_actor:
        actors = [actors[0] if config.share_target_actor else f"actor{k}"]
    options = []
    for name in actors:
        target, batch = reference(config, state, new, target_params, name, rows)
        data = new.noise, rows.relabel, target, batch
        options.append((*losses(config, k)(state.params, *data), name))
    error = lambda option: abs(option[1]["value_loss"] - metrics["value_loss"])
    log_ratio, values, grads, name = min(options, key=error)
    norm = lambda tree: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))
    x = np.minimum(np.exp(np.float64(log_ratio)), 100.0)
    values |= {
        "count": 1.0,
        "her_fraction": rows.relabel.mean(),
        "reward": np.mean([window_of(config, state, rows, b)[1][0].sum() for b in range(len(x))]),
        "approx_kl": (x - 1.0 - log_ratio).mean(),
        "ess": x.mean() ** 2 / (x**2).mean(),
        "actor_grad_norm": norm(grads["actor"]),
        "critic_grad_norm": norm(grads["critic"]),
    }
    if brain.rule != "ddpg":
        values["clip_fraction"] = (np.abs(x - 1.0) > brain.clip_eps).mean()
    assert values.keys() == metrics.keys()
    for metric, value in values.items():
        assert_allclose(metrics[metric], value, rtol=1e-3, atol=1e-4)
    return name, x.max(), grads


def assert_moments_follow(config, old, new, gradients):
    """Adam's moments are what these gradients, one after the other, make of the old ones."""
    first, second = old[1].mu, old[1].nu
    for grads in gradients:
        scale = min(1.0, config.max_grad_norm / optax.global_norm(grads))
        clipped = optax.tree.scale(scale, grads)
        first = follow(first, clipped, 0.1)
        second = follow(second, jax.tree.map(jnp.square, clipped), 0.001)
    for found, expected in ((new[1].mu, first), (new[1].nu, second)):
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
        for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert_allclose(x, y, rtol=2e-3, atol=2e-3 * size)


def follow(old, new, tau):
    return jax.tree.map(lambda x, y: (1 - tau) * x + tau * y, old, new)


# --- a minibatch ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_minibatch_is_the_reference(variant):
    """Losses, ratios and gradients of both brains, and what the target networks become."""
    config, found = run_variant(variant)
    which, largest = set(), 0.0
    both = [x for x in found if x[2]["brain0/count"] and x[2]["brain1/count"]]
    assert len(both) > 5
    for state, new, metrics in both[:6]:
        params, targets, gradients = state.params, state.target_params, []
        for k, brain in enumerate(config.brains):
            name, x, grads = check(config, k, state, new, metrics, targets)
            gradients.append(grads)
            which.add((k, name))
            largest = max(largest, x)
            mine = "actor0" if config.share_target_actor else f"actor{k}"
            due = int(state.update) % brain.actor_tau_interval == 0
            targets = targets | {
                mine: follow(targets[mine], params["actor"], brain.actor_tau * due),
                "critic": follow(targets["critic"], params["critic"], brain.critic_tau),
            }
        tiny.assert_close(new.target_params, targets)
        assert_same(new.params, params)
        old, now = state.opt_state, new.opt_state
        for k, grads in enumerate(gradients):
            name = f"actor{k}"
            assert_moments_follow(config, old[name], now[name], [grads["actor"]])
        critic_grads = [grads["critic"] for grads in gradients]
        assert_moments_follow(config, old["critic"], now["critic"], critic_grads)
    own = {"action": {(0, "actor0"), (1, "actor1")}, "ratio": {(0, "actor0"), (1, "actor0")}}
    either = {(0, "actor0"), (1, "actor0"), (1, "actor1")}  # DDPG bootstraps from either
    assert which == own.get(variant, either)
    assert (largest == 100.0) == (variant == "ratio")  # the largest ratio is reached


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("denominator", ["behaviour", "relabelled"])
def test_the_other_denominator_is_the_policy_at_the_start_of_a_turn(denominator, minibatches):
    """So ratios of relabelled rows are 1 in the first minibatch of a turn, not in the second."""
    brain = replace(FROZEN_PPO, her_ratio=1.0, learning_rate=0.01, turn_minibatches=minibatches)
    found = run(frozen_config(brains=(brain,), ratio_denominator=denominator))
    assert found
    for *_, metrics in found:
        assert metrics["brain0/count"] == minibatches
        ones = denominator == "relabelled" and minibatches == 1
        assert (float(metrics["brain0/approx_kl"]) < 1e-9) == ones
        assert (float(metrics["brain0/ess"]) > minibatches - 1e-6) == ones


def test_one_brain_without_hindsight_is_ppo():
    """Its gradient is that of the clipped surrogate of ppo.py, with targets of target networks."""
    brain = replace(FROZEN_PPO, her_ratio=0.0)
    config = frozen_config(brains=(brain,), ratio_reduce="sum", floating_nstep=False)
    policy_of, q_of = networks(config)
    for state, new, metrics in run(config)[:3]:
        check(config, 0, state, new, metrics, state.target_params)
        rows = rows_of(config, 0, state, new)
        assert not rows.relabel.any()
        target, (inputs, action, behaviour) = reference(
            config, state, new, state.target_params, "actor0", rows
        )
        policy = policy_of(state.params["actor"], inputs, new.noise)
        advantage = (target - q_of(state.params["critic"], inputs, policy)).sum(-1)

        def surrogate(actor_params):
            now = policy_of(actor_params, inputs, new.noise).log_prob(action)  # noqa: B023
            return ppo.policy_loss(now, behaviour.log_prob(action), advantage, 0.2)[0]  # noqa: B023

        grads = jax.grad(surrogate)(state.params["actor"])
        old, now = state.opt_state["actor0"], new.opt_state["actor0"]
        assert_moments_follow(config, old, now, [grads])


@pytest.mark.parametrize("rule", ["ppo", "weighted_ddpg"])
def test_a_natural_step_takes_the_place_of_adams(rule):
    brain = replace(FROZEN_PPO, rule=rule, natural_gradient=True)
    config = frozen_config(brains=(brain, FROZEN_DDPG))
    state, new, _ = run(config)[0]
    rows = rows_of(config, 0, state, new)
    target, batch = reference(config, state, new, state.target_params, "actor0", rows)
    data = state.params, new.noise, rows.relabel, target, batch
    loss_of = lambda params: actor_loss(config, 0, params, *data)[0]
    policy_of = lambda params: networks(config)[0](params, batch[0], new.noise)
    old = state.params["actor"]
    step = jax.jit(partial(bnpo.natural_step, loss_of, policy_of))
    expected = step(old, jax.grad(loss_of)(old))
    # A relative change of 1e-6 in the gradient turns this step by 4 % in parameter space, and the
    # rounding of another program does the like. What the step does to the policy is steadier.
    taken = new.params["actor"]
    distance = lambda x, y: bnpo.kl_divergence(policy_of(x), policy_of(y)).mean()
    assert_allclose(distance(taken, old), distance(expected, old), rtol=0.01, atol=0)
    assert distance(taken, expected) < 0.02 * distance(expected, old)
    gain = lambda params: loss_of(old) - loss_of(params)
    assert_allclose(gain(taken), gain(expected), rtol=0.05, atol=0)
    assert_same(new.opt_state["actor0"], state.opt_state["actor0"])
    assert_same(new.params["critic"], state.params["critic"])


def test_hindsight_for_no_row_and_for_every_row():
    brains = replace(FROZEN_PPO, her_ratio=0), replace(FROZEN_DDPG, her_ratio=1)
    found = run(frozen_config(brains=brains))
    assert found
    for *_, metrics in found:
        assert [float(metrics[f"brain{k}/her_fraction"]) for k in (0, 1)] == [0.0, 1.0]


@pytest.mark.parametrize("variant", ["as published", "future"])
def test_an_episode_is_stored_whole(variant):
    """It begins anew; its rewards are those of the successors; the other episodes stay."""
    config, found = run_variant(variant)
    assert found[-1][1].replay.terminated.any()
    for state, new, _ in found:
        slot = int(state.update) % W
        episode = jax.tree.map(lambda x: x[slot], new.replay)  # noqa: B023
        assert (np.abs(episode.obs[:, 0]) <= 0.05).all()
        after = episode.obs[:, 1:]
        reward = reward_of(config, after)
        goes_on = ~episode.terminated
        assert_allclose(episode.reward[goes_on], reward[goes_on], rtol=1e-5, atol=0)
        assert (np.abs(after[:, :-1, 1]) <= 0.5).all()  # what follows an end is a start
        z = (episode.action - episode.policy.mean) / jnp.exp(episode.policy.log_std)
        assert len(np.unique(np.round(z, 4))) > 0.9 * z.size  # every action has its own noise
        others = np.arange(W) != slot
        for x, y in zip(*map(jax.tree.leaves, (state.replay, new.replay)), strict=True):
            np.testing.assert_array_equal(x[others], y[others])


# --- an update ---


@cache
def learning():
    """States before and after each of 6 updates of the tiny config, and their metrics."""
    config = tiny.config_of("bnpo")
    algo = tiny.build("bnpo", config)
    update, states, metrics = jax.jit(algo.update), [algo.init(jax.random.key(0))], []
    for _ in range(6):
        state, values = update(states[-1])
        states.append(state)
        metrics.append(values)
    return config, states, metrics


def test_brains_have_their_turns_after_their_warmup():
    config, _, metrics = learning()
    assert [config.warmup(brain) for brain in config.brains] == [1, 3]
    assert [int(x["brain0/count"]) for x in metrics] == [0, 2, 2, 2, 2, 2]
    assert [int(x["brain1/count"]) for x in metrics] == [0, 0, 0, 3, 3, 3]


def test_a_brain_leaves_the_others_alone():
    """While PPO alone learns, the optimiser and the target actor of DDPG stay as they were."""
    _, states, _ = learning()
    for state, new in itertools.pairwise(states[1:4]):
        for part in ("opt_state", "target_params"):
            old, now = arrays(getattr(state, part)), arrays(getattr(new, part))
            for k in old:
                assert (old[k] != now[k]).any() == ("['actor1']" not in k), k
    alone = [x for x in run_variant("action")[1] if not x[2]["brain0/count"]]
    assert len(alone) == 4
    for state, new, _ in alone:  # the other way round; the learning rates are 0
        old, now = arrays(state.opt_state), arrays(new.opt_state)
        for k in old:  # the std has no gradient
            changed = "['actor0']" not in k and "log_std" not in k
            assert (old[k] != now[k]).any() == changed, k
        assert_same(new.target_params["actor0"], state.target_params["actor0"])
    for part in ("opt_state", "target_params"):  # now both learn
        old, now = arrays(getattr(states[3], part)), arrays(getattr(states[4], part))
        assert all((old[k] != now[k]).any() for k in old if "log_std" not in k)


def inputs_so_far(obs, t):
    """Observations [N, 4] of step t of an episode [N, L + 1, 4], by the statistics up to it."""
    seen = np.asarray(obs[:, : t + 1]).reshape(-1, 4)
    return np.clip((obs[:, t] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-4), -10, 10)


def test_statistics_include_the_observation_that_is_acted_on():
    """In the first episode, in which nothing learns and the parameter noise does not change."""
    config, (start, end, *_), _ = learning()
    policy_of, _ = networks(config)
    obs, behaviour = end.replay.obs[0], jax.tree.map(lambda x: x[0], end.replay.policy)
    for t in range(T):
        expected = policy_of(start.params["actor"], inputs_so_far(obs, t), end.noise)
        assert_allclose(behaviour.mean[:, t], expected.mean, atol=1e-4)
    seen = np.asarray(obs[:, :T]).reshape(-1, 4)
    assert_allclose(end.obs_stats.mean, seen.mean(0))
    assert_allclose(end.obs_stats.var, seen.var(0), atol=1e-6)


def test_parameter_noise_changes_within_an_episode():
    """Every 4 of its 8 steps: the policy of the first 4 has other noise than that of the last."""
    config = tiny.config_of("bnpo", param_noise_interval=4)
    algo = tiny.build("bnpo", config)
    start = algo.init(jax.random.key(0))
    end, _ = jax.jit(algo.update)(start)
    obs, mean = np.asarray(end.replay.obs[0]), np.asarray(end.replay.policy.mean[0])
    for t in range(T):
        policy = networks(config)[0](start.params["actor"], inputs_so_far(obs, t), end.noise)
        same = np.isclose(mean[:, t], policy.mean, atol=1e-4).all()
        assert same == (t >= 4), t


def test_one_layer_has_new_noise_at_a_time():
    _, states, _ = learning()
    layers = []
    for state, new in itertools.pairwise(states):
        changed = [bool((x != y).any()) for x, y in zip(state.noise, new.noise, strict=True)]
        assert sum(changed) == 1
        layers.append(changed.index(True))
    assert set(layers) == {0, 1}


def test_the_exported_policy_is_a_target_actor_without_noise():
    config, states, _ = learning()
    algo, state, obs = tiny.build("bnpo", config), states[-1], jnp.ones((3, 4))
    policy_of, _ = networks(config)
    expected = policy_of(state.target_params["actor0"], inputs_of(state, obs))
    act = partial(algo.act, algo.policy_of(state), obs, jax.random.key(0))
    assert_allclose(act(True), expected.mean)
    noise = jax.random.normal(jax.random.key(0), (3, 2))
    assert_allclose(act(False), expected.mean + jnp.exp(expected.log_std) * noise)


def test_without_relabelled_rows_the_denominator_does_not_matter():
    ends = []
    for denominator in ("behaviour", "relabelled"):
        config = tiny.config_of("bnpo", brains=(PPO_BRAIN,), ratio_denominator=denominator)
        ends.append(jax.jit(bnpo.make_train(config))(jax.random.key(0))["state"])
    tiny.assert_close(*ends)


def test_networks_have_their_own_learning_rates_and_intervals():
    """Adam's first step is the learning rate; the target critic follows every third minibatch."""
    brain = replace(FROZEN_PPO, learning_rate=5e-3, critic_tau_interval=3, actor_tau_interval=2)
    found = run(frozen_config(brains=(brain,), critic_lr=0.02))
    state, new, _ = found[0]
    for name, rate in (("actor", 5e-3), ("critic", 0.02)):
        step = jax.tree.map(lambda x, y: abs(x - y).max(), state.params[name], new.params[name])
        assert_allclose(max(jax.tree.leaves(step)), rate, rtol=1e-2, atol=0)
    for state, new, _ in found[:6]:  # one minibatch in each
        for name, online, tau, interval in (
            ("critic",) * 2 + (0.1, 3),
            ("actor0", "actor", 0.5, 2),
        ):
            due = int(state.update) % interval == 0
            wanted = follow(state.target_params[name], new.params[online], tau * due)
            tiny.assert_close(new.target_params[name], wanted)


def test_metrics_of_an_episode():
    """The score is the mean over a reward's parts; means beyond an action's range saturate."""
    _, states, metrics = learning()
    for i, (new, values) in enumerate(zip(states[1:], metrics, strict=True)):
        episode = jax.tree.map(lambda x: np.asarray(x[i % W]), new.replay)  # noqa: B023
        assert_allclose(values["charts/score"], episode.reward.mean(-1).sum(-1).mean(), rtol=1e-4)
        assert_allclose(values["charts/std"], np.exp(episode.policy.log_std).mean())
        assert_allclose(values["charts/saturation"], (abs(episode.policy.mean) > 1).mean())
