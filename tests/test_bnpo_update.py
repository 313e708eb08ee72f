"""BNPO: what an update does, against a reference that is written in loops; learning."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import arrays, assert_allclose, assert_same

from algos import bnpo, common, ppo
from envs.wrappers import Goals, RawEnv

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_bnpo_update")

N, L, H, W = 4, 8, 3, 4
GOALS = tiny.seek().goals
# Nothing learns, and each brain has one minibatch per update: PPO, then DDPG.
FROZEN = {
    "lr_actor": (0.0, 0.0),
    "lr_critic": 0.0,
    "learning_delay": (8, 8),
    "learning_repeat": (1.0, 1.0),
    "optim_batch_size": (20, 20),
    "her_ratio": (0.5, 0.5),
    "tau_actor": (0.5, 0.0),
    "tau_critic": (0.1, 0.3),
    "max_grad_norm": 1e9,
}
UPDATES = 12
# Combined, so that few updates are compiled. DDPG begins before PPO in the first.
VARIANTS = {
    "action": {
        "critic_input": "action",
        "floating_step": False,
        "her_nstep": True,
        "separate_actors": (True, True),
        "optim_batch_size": (100, 20),
    },
    "ratio": {
        "ppo_eps": (0.2, 0.3),
        "is_inverted": True,
        "ratio_reduce": "sum",
        "mean_only": (False, False),
        "detach_actors": False,
        "tau_actor": (0.5, 0.25),
        "max_grad_norm": 0.01,
    },
    "future": {
        "env": "test_bnpo_update:still",
        "her_strategy": "future",
        "is_denominator": "relabelled",
        "reward_kind": "env",
        "ppo_eps": (0.2, 0.3),
    },
}


def still():
    """`tiny.seek` with a goal that stays, which pays how far away it is."""
    raw, distance = tiny.seek(), lambda achieved, goal, kind: jnp.abs(achieved - goal)

    def step(key, state, action):
        obs, state, _, terminated, info = raw.step(key, state, action)
        return obs, state, jnp.abs(obs[1] - obs[3]), terminated, info

    goals = raw.goals._replace(moving=False, compute_reward=distance)
    return raw._replace(name="still", step=step, goals=goals)


def luck(shape):
    """Gumbel noise that is known, for all that is resampled."""
    return np.random.RandomState(0).gumbel(size=shape).astype(np.float32)


def different(tree, key, scale=0.3):
    """The same tree, moved at random."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, moved)


@cache
def frozen(strange=False, **changes):
    """Config, and (state, next state, metrics, what was looked up and learned from) of updates.

    `strange`: before every second of them another policy is said to have acted.
    """
    config = tiny.config_of("bnpo", **(FROZEN | changes))
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def spy(name, chosen):
            original = getattr(bnpo, name)

            def wrapper(*args):
                jax.debug.callback(lambda *x: seen.append((name, x)), *chosen(args), ordered=True)
                return original(*args)

            patch.setattr(bnpo, name, wrapper)

        spy("relabelled", lambda args: args[3:])
        spy("actor_loss", lambda args: args[:3])
        patch.setattr(jax.random, "gumbel", lambda _, shape: luck(shape))
        algo = bnpo.build(config)
        update = jax.jit(algo.update)
        state = algo.init(jax.random.key(0))
        params = different(state.params, 0)
        actors = state.target_params["actor"]
        targets = {"actor": {k: different(params["actor"], k + 1) for k in actors}}
        targets["critic"] = different(params["critic"], 3)
        state = state._replace(params=params, target_params=targets)
        found = []
        for i in range(UPDATES):
            if strange and i % 2:
                policy = state.replay.policy
                policy = policy._replace(mean=policy.mean + 2.0)
                state = state._replace(replay=state.replay._replace(policy=policy))
            new, metrics = update(state)
            jax.effects_barrier()
            numbers = lambda s: s._replace(replay=jax.tree.map(np.asarray, s.replay))
            found.append((numbers(state), numbers(new), metrics, tuple(seen)))
            seen.clear()
            state = new
    return config, found


def minibatches(found):
    """(state, next state, metrics, [brain: looked up rows, (q, log ratio, target)]) of updates."""
    for state, new, metrics, seen in found:
        if not metrics["brain0/count"] or not metrics["brain1/count"]:
            continue
        names = [name for name, _ in seen]
        assert names == ["relabelled", "actor_loss", "relabelled", "relabelled", "actor_loss"]
        numbers = [jax.tree.map(np.asarray, x) for _, x in seen]
        looked = [
            x[0] if "relabelled" in name else x for name, x in zip(names, numbers, strict=True)
        ]
        yield state, new, metrics, looked


def inputs_of(state, obs):
    mean, var = np.asarray(state.obs_stats.mean), np.asarray(state.obs_stats.var)
    return np.clip((obs - mean) / np.sqrt(var + 1e-4), -10, 10)


@cache
def networks(config):
    """Compiled functions: policy of parameters, inputs and noise; Q of them and what it is told."""
    actor, critic = (
        bnpo.Actor(config, 2),
        bnpo.Critic(config, 1 if config.reward_kind == "env" else 2),
    )
    silence = jnp.zeros((4, 8)), jnp.zeros((8, 2))

    def q_of(params, x, policy, action=None):
        told = jnp.concatenate([policy.mean, jnp.exp(policy.log_std)], -1)
        if config.critic_input == "action":
            told = policy.mean if action is None else action
        return critic.apply(params, x, told)

    policy_of = lambda params, x, noise=silence: actor.apply(params, x, noise)
    return jax.jit(policy_of), jax.jit(q_of)


def reward_of(config, obs):
    if config.reward_kind == "env":
        return np.abs(obs[..., 1:2] - obs[..., 3:])
    return np.asarray(GOALS.compute_reward(obs[..., 1:2], obs[..., 3:], "proxy"))


def window_of(config, state, rows, b):
    """Observations [H + 1, 4], rewards [H, 2] and ends [H] of a row, with its goals."""
    e, i, t = (int(x[b]) for x in (rows.slot, rows.env, rows.t))
    obs = np.array(state.replay.obs[e, i, t : t + H + 1])
    reward = np.array(state.replay.reward[e, i, t : t + H])
    terminated = np.array(state.replay.terminated[e, i, t : t + H])
    if rows.relabel[b]:
        there = state.replay.obs[e, i, int(rows.h[b]) :]
        obs[:, 3:] = there[0, 1] if config.her_strategy == "future" else there[: H + 1, 3:]
        reward = np.where(terminated[:, None], reward, reward_of(config, obs[1:]))
    return obs, reward, terminated


def target_of(config, state, new, target_params, which, rows, b):
    """Target [m] of a row, and its first inputs, action and policy that acted."""
    policy_of, q_of = networks(config)
    obs, reward, terminated = window_of(config, state, rows, b)
    inputs = inputs_of(new, obs)
    at = rows.slot[b], rows.env[b], rows.t[b] + np.arange(H)
    acted, action = jax.tree.map(lambda x: x[at], (state.replay.policy, state.replay.action))
    value = np.array(q_of(target_params["critic"], inputs[:H], acted, action))
    n = 1 + b % H if config.floating_step else H
    n = 1 if rows.relabel[b] and not config.her_nstep else n
    last = policy_of(target_params["actor"][which], inputs[n])
    bootstrap = q_of(target_params["critic"], inputs[n], last)
    y, weight = value[0], 1.0
    for j in range(n):
        after = bootstrap if j + 1 == n else value[j + 1]
        y = y + weight * (reward[j] + config.gamma * after * ~terminated[j] - value[j])
        if terminated[j]:
            break
        weight *= config.gamma * config.gae_lambda
    first = jax.tree.map(lambda x: x[0], acted)
    return y, (inputs[0], action[0], first)


def reference(*args):
    """The same of all rows."""
    found = [target_of(*args, b) for b in range(len(args[-1].t))]
    batch = jax.tree.map(lambda *x: np.stack(x), *(x for _, x in found))
    return np.stack([y for y, _ in found]), batch


def actor_loss(config, brain, actor_params, params, noise, relabel, target, batch):
    """Loss of a brain, and (Q, log-ratios) of its rows."""
    policy_of, q_of = networks(config)
    inputs, action, acted = batch
    policy, old = policy_of(actor_params, inputs, noise), acted.log_prob(action)
    if config.is_denominator == "relabelled":
        start = policy_of(params["actor"], inputs, noise).log_prob(action)
        old = jnp.where(relabel, start, old)
    log_ratio = (policy.log_prob(action) - old) / (2 if config.ratio_reduce == "mean" else 1)
    if config.mean_only[brain]:
        held = policy._replace(log_std=jax.lax.stop_gradient(policy.log_std))
        q = q_of(params["critic"], inputs, held)
    else:
        q = q_of(params["critic"], inputs, policy)
    x, eps = jnp.minimum(jnp.exp(log_ratio), 100.0), config.ppo_eps[brain]
    surrogate = lambda gain, x: jnp.minimum(x * gain, jnp.clip(x, 1 - eps, 1 + eps) * gain)
    if brain == 0:
        gain = surrogate(jax.lax.stop_gradient((target - q).sum(-1)), x)
    elif eps:
        x = jnp.exp(-log_ratio if config.is_inverted else log_ratio)
        gain = surrogate((q - target).sum(-1), jax.lax.stop_gradient(jnp.minimum(x, 100.0)))
    else:
        gain = q.sum(-1)
    return -gain.mean(), (q, log_ratio)


@cache
def losses(config, brain):
    """Compiled: parameters, noise, rows' data -> Q, log-ratios, gradients of actor and critic."""
    _, q_of = networks(config)

    def critic_loss(critic_params, target, batch):
        return ((q_of(critic_params, batch[0], batch[2], batch[1]) - target) ** 2).mean()

    def both(params, *data):
        loss = partial(actor_loss, config, brain)
        grads, seen = jax.grad(loss, has_aux=True)(params["actor"], params, *data)
        critic_grads = jax.grad(critic_loss)(params["critic"], *data[2:])
        return *seen, {"actor": grads, "critic": critic_grads}

    return jax.jit(both)


def check(config, brain, state, new, metrics, target_params, rows, seen):
    """A minibatch against the reference; its gradients, where it bootstrapped from, largest x."""
    actors = list(target_params["actor"])
    actors = [brain % len(actors)] if config.separate_actors[brain] else actors
    options = [reference(config, state, new, target_params, i, rows) for i in actors]
    which = int(np.argmin([np.abs(target - seen[2]).max() for target, _ in options]))
    target, batch = options[which]
    assert_allclose(seen[2], target, atol=1e-4)
    data = new.noise, rows.relabel, target, batch
    q, log_ratio, grads = losses(config, brain)(state.params, *data)
    assert_allclose(seen[0], q, atol=1e-4)
    assert_allclose(seen[1], log_ratio, atol=1e-4)
    for name, tree in grads.items():
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))
        assert_allclose(metrics[f"brain{brain}/{name}_grad_norm"], norm, rtol=1e-3)
    x, eps = np.minimum(np.exp(np.float64(log_ratio)), 100.0), config.ppo_eps[brain]
    measured = {
        "her_fraction": rows.relabel.mean(),
        "approx_kl": (x - 1.0 - log_ratio).mean(),
        "ess": x.mean() ** 2 / (x**2).mean(),
    }
    if eps:
        measured["clip_fraction"] = (np.abs(x - 1.0) > eps).mean()
    for name, value in measured.items():
        assert_allclose(metrics[f"brain{brain}/{name}"], value, rtol=1e-3)
    return grads, actors[which], x.max()


def assert_moments_follow(config, old, new, gradients):
    """Adam's first moments are what these gradients, one after the other, make of the old ones."""
    moments = lambda state: state[1].mu
    expected = moments(old)
    for grads in gradients:
        scale = min(1.0, config.max_grad_norm / optax.global_norm(grads))
        expected = follow(expected, optax.tree.scale(scale, grads), 0.1)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for x, y in zip(*map(jax.tree.leaves, (moments(new), expected)), strict=True):
        assert_allclose(x, y, rtol=1e-3, atol=1e-3 * size)


def follow(old, new, tau):
    return jax.tree.map(lambda x, y: (1 - tau) * x + tau * y, old, new)


@pytest.mark.parametrize("variant", ["as published", *VARIANTS])
def test_a_minibatch_is_the_reference(variant):
    """Targets, Q, log-ratios and gradients of both brains, and what the targets become."""
    config, found = frozen(strange=variant == "ratio", **VARIANTS.get(variant, {}))
    which, largest = set(), 0.0
    for state, new, metrics, (*first, _, chosen, second) in list(minibatches(found))[:6]:
        params, targets, gradients = state.params, state.target_params, []
        for brain, (rows, seen) in enumerate((first, (chosen, second))):
            grads, actor, x = check(config, brain, state, new, metrics, targets, rows, seen)
            gradients.append(grads)
            which.add((brain, actor))
            largest = max(largest, x)
            mine = brain % len(targets["actor"])
            due = int(state.update) % config.sync_delta_a[brain] == 0
            moved = follow(targets["actor"][mine], params["actor"], config.tau_actor[brain] * due)
            critic = follow(targets["critic"], params["critic"], config.tau_critic[brain])
            targets = {"actor": targets["actor"] | {mine: moved}, "critic": critic}
        tiny.assert_close(new.target_params, targets)
        assert_same(new.params, params)
        old, now = state.opt_state, new.opt_state
        for k, grads in enumerate(gradients):
            assert_moments_follow(config, old["actor"][k], now["actor"][k], [grads["actor"]])
        both = [grads["critic"] for grads in gradients]
        assert_moments_follow(config, old["critic"], now["critic"], both)
    own = {"action": {(0, 0), (1, 1)}, "ratio": {(0, 0), (1, 0)}}
    assert which == own.get(variant, {(0, 0), (1, 0), (1, 1)})  # DDPG bootstraps from either
    assert (largest == 100.0) == (variant == "ratio")  # the cap


def ppo_alone(**changes):
    """Fields of the first brain without the second."""
    both = vars(tiny.config_of("bnpo")) | FROZEN
    return {name: both[name][:1] for name in bnpo.BRAIN_FIELDS} | changes


def test_the_other_denominator_is_the_policy_at_the_start_of_a_turn():
    """So x of a relabelled row is 1 in the first minibatch of a turn, and no more in the second."""
    changes = {"lr_actor": (0.01,), "learning_repeat": (2.0,), "is_denominator": "relabelled"}
    _, found = frozen(**ppo_alone(**changes))
    turns = [seen for *_, metrics, seen in found if metrics["brain0/count"]]
    assert len(turns) > 5
    for (_, (rows, _)), (_, (_, first, _)), (_, (others, _)), (_, (_, second, _)) in turns:
        assert_allclose(first[rows.relabel], np.zeros(rows.relabel.sum()), atol=1e-5)
        assert np.abs(second[others.relabel]).min() > 1e-5


def test_one_brain_without_hindsight_is_ppo():
    """Its gradient is that of the clipped surrogate of ppo.py, with returns of target networks."""
    changes = {"her_ratio": (0.0,), "ratio_reduce": "sum", "floating_step": False}
    config, found = frozen(**ppo_alone(**changes))
    policy_of, q_of = networks(config)
    learned = [x for x in found if x[2]["brain0/count"]]
    assert len(learned) > 5
    for state, new, metrics, ((name, (rows, *_)), (_, seen)) in learned[:3]:
        assert name == "relabelled"
        rows, seen = jax.tree.map(np.asarray, (rows, seen))
        assert not rows.relabel.any()
        check(config, 0, state, new, metrics, state.target_params, rows, seen)
        target, (inputs, action, acted) = reference(
            config, state, new, state.target_params, 0, rows
        )
        policy = policy_of(state.params["actor"], inputs, new.noise)
        advantage = (target - q_of(state.params["critic"], inputs, policy)).sum(-1)

        def surrogate(actor_params):
            now = policy_of(actor_params, inputs, new.noise).log_prob(action)  # noqa: B023
            return ppo.policy_loss(now, acted.log_prob(action), advantage, 0.2)[0]  # noqa: B023

        grads = jax.grad(surrogate)(state.params["actor"])
        old, now = state.opt_state["actor"][0], new.opt_state["actor"][0]
        assert_moments_follow(config, old, now, [grads])


def test_a_natural_step_takes_the_place_of_adams():
    config, found = frozen(natural=(True, False))
    state, new, _, seen = next(x for x in found if x[2]["brain0/count"])
    rows = jax.tree.map(np.asarray, seen[0][1][0])
    target, batch = reference(config, state, new, state.target_params, 0, rows)
    data = state.params, new.noise, rows.relabel, target, batch
    loss_of = lambda params: actor_loss(config, 0, params, *data)[0]
    policy_of = lambda params: networks(config)[0](params, batch[0], new.noise)
    old = state.params["actor"]
    step = jax.jit(partial(common.natural_step, loss_of, policy_of))
    expected = step(old, jax.grad(loss_of)(old))
    norm = lambda x, y: optax.global_norm(jax.tree.map(jnp.subtract, x, y))
    # Conjugate gradients in single precision differ a little from one program to the next.
    assert norm(new.params["actor"], expected) < 0.01 * norm(expected, old)
    assert_same(new.opt_state["actor"][0], state.opt_state["actor"][0])
    assert_same(new.params["critic"], state.params["critic"])


def test_achieved_goals_are_from_later_steps():
    _, found = frozen(**VARIANTS["future"])
    later = set()
    for *_, (rows, _, candidates, _, _) in minibatches(found):
        for drawn in (rows, candidates):
            later |= set(zip(drawn.t.tolist(), drawn.h.tolist(), strict=True))
    assert later == {(t, h) for t in range(L - H) for h in range(t + 1, L + 1)}


def test_rows_are_drawn_from_the_newest_complete_episodes():
    _, found = frozen()
    t, h, relabel = [], [], []
    for state, _, _, (rows, _, candidates, chosen, _) in minibatches(found):
        update = int(state.update)
        for drawn, window in ((rows, 2), (candidates, 4), (chosen, 4)):
            slots = [(update - 1 - i) % W for i in range(min(update, window))]
            assert set(drawn.slot.tolist()) <= set(slots)
            assert update < 4 or len(drawn.slot) < 16 or set(drawn.slot.tolist()) == set(slots)
        for drawn in (rows, candidates):
            t, h, relabel = t + drawn.t.tolist(), h + drawn.h.tolist(), [*relabel, *drawn.relabel]
        # the chosen are different ones of the candidates
        tag = lambda x: set(zip(*(np.asarray(y).tolist() for y in x), strict=True))
        assert tag(chosen) <= tag(candidates)
        assert len(candidates.t) == 8 * len(chosen.t)
    assert set(t) == set(range(L - H))
    assert set(h) == set(range(L - H + 1))
    assert abs(np.mean(relabel) - 0.5) < 0.08


def test_a_share_may_be_a_whole_number():
    _, found = frozen(her_ratio=(0, 1))
    learned = [metrics for *_, metrics, _ in found if metrics["brain1/count"]]
    assert len(learned) > 5
    for metrics in learned:
        assert [float(metrics[f"brain{k}/her_fraction"]) for k in (0, 1)] == [0.0, 1.0]


def test_likely_actions_are_preferred():
    """By the ratio's mean over dimensions, at most 2, to the power 0.666."""
    config, found = frozen()
    (policy_of, _), ratios = networks(config), []
    density = lambda policy, x: jax.scipy.stats.norm.pdf(x, policy.mean, jnp.exp(policy.log_std))
    for state, new, _, (_, _, rows, chosen, _) in minibatches(found):
        size = len(rows.t)
        obs = np.stack([window_of(config, state, rows, b)[0][0] for b in range(size)])
        policy = policy_of(state.params["actor"], inputs_of(new, obs), new.noise)
        action, acted = (
            jax.tree.map(lambda x: x[rows.slot, rows.env, rows.t], kept)  # noqa: B023
            for kept in (state.replay.action, state.replay.policy)
        )
        ratio = (density(policy, action) / density(acted, action)).mean(-1)
        ratios += ratio.tolist()
        score = 0.666 * np.log(np.minimum(ratio, 2.0)) + luck((size,))
        best = np.argsort(-score)[: len(chosen.t)]
        assert_same(chosen, jax.tree.map(lambda x: x[best], rows))  # noqa: B023
    assert min(ratios) < 0.5
    assert sum(x > 2.0 for x in ratios) > 10


@pytest.mark.parametrize("variant", ["as published", "future"])
def test_an_episode_is_stored_whole(variant):
    """It begins anew; its rewards are those of the successors; the ring keeps the others."""
    config, found = frozen(**VARIANTS.get(variant, {}))
    assert found[-1][1].replay.terminated.any()
    for state, new, _, _ in found:
        slot = int(state.update) % W
        episode = jax.tree.map(lambda x: x[slot], new.replay)  # noqa: B023
        assert (np.abs(episode.obs[:, 0]) <= 0.05).all()
        after = episode.obs[:, 1:]
        reward = reward_of(config, after)
        goes_on = ~episode.terminated
        np.testing.assert_array_equal(episode.reward[goes_on], reward[goes_on])
        assert (np.abs(after[:, :-1, 1]) <= 0.5).all()  # what follows an end is a start
        z = (episode.action - episode.policy.mean) / jnp.exp(episode.policy.log_std)
        assert len(np.unique(np.round(z, 4))) > 0.9 * z.size  # every action has its own noise
        others = np.arange(W) != slot
        for x, y in zip(*map(jax.tree.leaves, (state.replay, new.replay)), strict=True):
            np.testing.assert_array_equal(x[others], y[others])


# --- learning ---


@cache
def learning():
    """States before and after each of 6 updates of the tiny config, and their metrics."""
    config = tiny.config_of("bnpo")
    algo = bnpo.build(config)
    update, states, metrics = jax.jit(algo.update), [algo.init(jax.random.key(0))], []
    for _ in range(6):
        state, values = update(states[-1])
        states.append(state)
        metrics.append(values)
    return config, states, metrics


def test_brains_have_their_turns_after_their_warmup():
    config, _, metrics = learning()
    assert config.warmup == (1, 3)
    assert [int(x["brain0/count"]) for x in metrics] == [0, 2, 2, 2, 2, 2]
    assert [int(x["brain1/count"]) for x in metrics] == [0, 0, 0, 3, 3, 3]


def test_a_brain_leaves_the_others_alone():
    """While PPO alone learns, the optimiser and the target actor of DDPG stay as they were."""
    _, states, _ = learning()
    for state, new in itertools.pairwise(states[1:4]):
        for part in ("opt_state", "target_params"):
            old, now = arrays(getattr(state, part)), arrays(getattr(new, part))
            for k in old:
                assert (old[k] != now[k]).any() == ("['actor'][1]" not in k), k
    _, found = frozen(**VARIANTS["action"])
    alone = [x for x in found if not x[2]["brain0/count"] and x[2]["brain1/count"]]
    assert len(alone) == 4
    for state, new, *_ in alone:  # the other way round; only the optimiser's moments change
        old, now = arrays(state.opt_state), arrays(new.opt_state)
        for k in old:  # nor has the deviation a gradient
            changed = "['actor'][0]" not in k and "log_std" not in k
            assert (old[k] != now[k]).any() == changed, k
        assert_same(new.target_params["actor"][0], state.target_params["actor"][0])
    for part in ("opt_state", "target_params"):  # now both learn, DDPG nothing of the deviation
        old, now = arrays(getattr(states[3], part)), arrays(getattr(states[4], part))
        assert all((old[k] != now[k]).any() for k in old if "log_std" not in k)


def inputs_so_far(obs, t):
    """Observations [N, 4] of step t of an episode [N, L + 1, 4], by the statistics up to it."""
    seen = np.asarray(obs[:, : t + 1]).reshape(-1, 4)
    return np.clip((obs[:, t] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-4), -10, 10)


def test_statistics_include_the_observation_that_is_acted_on():
    """In the first episode, in which nothing learns and the noise of the weights stays."""
    config, (start, end, *_), _ = learning()
    policy_of, _ = networks(config)
    obs, acted = end.replay.obs[0], jax.tree.map(lambda x: x[0], end.replay.policy)
    for t in range(L):
        expected = policy_of(start.params["actor"], inputs_so_far(obs, t), end.noise)
        assert_allclose(acted.mean[:, t], expected.mean, atol=1e-4)
    seen = np.asarray(obs[:, :L]).reshape(-1, 4)
    assert_allclose(end.obs_stats.mean, seen.mean(0))
    assert_allclose(end.obs_stats.var, seen.var(0), atol=1e-6)


def test_noise_changes_within_an_episode():
    """Every 4 of its 8 steps: what acted first did so with other noise than what acted last."""
    config = tiny.config_of("bnpo", noise_period=4)
    algo = bnpo.build(config)
    start = algo.init(jax.random.key(0))
    end, _ = jax.jit(algo.update)(start)
    obs, mean = np.asarray(end.replay.obs[0]), np.asarray(end.replay.policy.mean[0])
    for t in range(L):
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
    algo, state, obs = bnpo.build(config), states[-1], jnp.ones((3, 4))
    policy_of, _ = networks(config)
    expected = policy_of(state.target_params["actor"][0], inputs_of(state, obs))
    act = partial(algo.act, algo.policy_of(state), obs, jax.random.key(0))
    assert_allclose(act(True), expected.mean)
    noise = jax.random.normal(jax.random.key(0), (3, 2))
    assert_allclose(act(False), expected.mean + jnp.exp(expected.log_std) * noise)


def test_without_relabelled_rows_the_denominator_does_not_matter():
    ends = []
    for denominator in ("behaviour", "relabelled"):
        config = tiny.config_of("bnpo", her_ratio=(0.0, 0.0), is_denominator=denominator)
        ends.append(jax.jit(bnpo.make_train(config))(jax.random.key(0))["state"])
    tiny.assert_close(*ends)


# --- a point that follows a target ---


def point(moving=True):
    """A point mass in the plane, pushed by the action; the target goes round a circle."""
    place = lambda angle: 0.7 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    observe = lambda x, v, angle: jnp.concatenate([x, v, place(angle)])
    near = lambda achieved, goal: jnp.linalg.norm(achieved - goal, axis=-1, keepdims=True) < 0.3

    def compute_reward(achieved, goal, kind):
        if kind == "env":
            return 1.0 * near(achieved, goal)
        return -0.1 * jnp.abs(achieved - goal)

    def reset(key):
        angle = jax.random.uniform(key, maxval=2 * np.pi)
        state = jnp.zeros(2), jnp.zeros(2), angle
        return observe(*state), state

    def step(key, state, action):
        x, v, angle = state
        v = 0.8 * v + 0.1 * jnp.clip(action, -1, 1)
        state = jnp.clip(x + v, -1, 1), v, angle + 0.02
        obs = observe(*state)
        reward = compute_reward(obs[:2], obs[4:], "env")[0]
        return obs, state, reward, jnp.bool_(False), {}

    goals = Goals(
        achieved_goal=lambda obs: obs[..., :2],
        desired_goal=lambda obs: obs[..., 4:],
        with_goal=lambda obs, goal: jnp.concatenate([obs[..., :4], goal], -1),
        compute_reward=compute_reward,
        kinds=("env", "proxy"),
        moving=moving,
    )
    return RawEnv("point", reset, step, 6, (6,), 2, False, 200, "fresh", goals=goals)


@pytest.mark.slow
def test_a_point_learns_to_follow_its_target():
    """On target three quarters of the time after 100 short episodes; random actions hardly ever."""
    config = bnpo.Config(
        env="test_bnpo_update:point",
        total_timesteps=100 * 1200,
        hidden=(64, 64),
        batch_size=(512, 128),
        lr_actor=(3e-3, 1e-4),
        lr_critic=1e-3,
    )
    algo = bnpo.build(config)
    env = bnpo.envs.make(config.env, 20, stagger=False, reset_mode="cached")
    share = lambda act, policy: common.evaluate(act, policy, env, jax.random.key(7))[0].mean() / 200
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    states = jax.jit(jax.vmap(bnpo.make_train(config)))(keys)["state"]
    reached = [share(algo.act, algo.policy_of(tiny.row(states, i))) for i in range(3)]
    assert np.median(reached) > 0.75, reached
    random = lambda policy, obs, key, greedy: jax.random.uniform(key, (20, 2), minval=-1.0)
    assert share(random, None) < 0.1
