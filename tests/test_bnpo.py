"""BNPO: relabelled goals, targets, losses of the brains, natural gradient, settings."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_allclose

from algos import bnpo, common, ppo
from algos.common import Gaussian
from envs import arm
from envs.wrappers import Goals

W, N, L, H = 3, 2, 9, 4

# --- goals ---


def tagged():
    """Replay whose observations are (episode, environment, step) and the same tag of the goal."""
    index = np.indices((W, N, L + 1)).transpose(1, 2, 3, 0).astype(np.float32)
    goals = Goals(
        achieved_goal=lambda obs: 100.0 + obs[..., :3],
        desired_goal=lambda obs: obs[..., 3:],
        with_goal=lambda obs, goal: jnp.concatenate([obs[..., :3], goal], -1),
        compute_reward=None,
        kinds=(),
        moving=True,
    )
    return jnp.asarray(np.concatenate([index, index], -1)), goals


def drawn(seed=0, size=200, future=False):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, L - H + 1, size)
    h = rng.integers(t + 1, L + 1) if future else rng.integers(0, L - H + 1, size)
    return bnpo.Rows(
        slot=rng.integers(W, size=size),
        env=rng.integers(N, size=size),
        t=t,
        relabel=rng.random(size) < 0.5,
        h=h,
    )


def test_shifted_goals_are_those_of_the_same_episode():
    replay, goals = tagged()
    rows, ahead = drawn(), np.arange(H + 1)
    obs = bnpo.relabelled(goals, "shift", replay, rows, ahead)
    start = np.where(rows.relabel, rows.h, rows.t)
    for step, tag in ((rows.t, obs[..., :3]), (start, obs[..., 3:])):
        np.testing.assert_array_equal(tag[..., 0], np.repeat(rows.slot[:, None], H + 1, 1))
        np.testing.assert_array_equal(tag[..., 1], np.repeat(rows.env[:, None], H + 1, 1))
        np.testing.assert_array_equal(tag[..., 2], step[:, None] + ahead)
    own = bnpo.relabelled(goals, "none", replay, rows, ahead)
    np.testing.assert_array_equal(own[..., 3:], own[..., :3])


def test_future_goals_were_achieved_later():
    replay, goals = tagged()
    rows, ahead = drawn(1, future=True), np.arange(H + 1)
    obs = np.asarray(bnpo.relabelled(goals, "future", replay, rows, ahead))
    achieved = 100 + np.stack([rows.slot, rows.env, rows.h], -1)
    expected = np.where(rows.relabel[:, None, None], achieved[:, None], obs[..., :3])
    np.testing.assert_array_equal(obs[..., 3:], expected)
    np.testing.assert_array_equal(obs[..., 2], rows.t[:, None] + ahead)


def circle(speed):
    """Observations [1, 1, L + 1, 33] of random arms, hands near a target that goes round."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(1, 1, L + 1, 33)).astype(np.float32)
    angle = 40.0 + 4.0 * speed * np.arange(L + 1)
    obs[0, 0, :, 26:29] = arm.target_position(jnp.asarray(angle))
    obs[0, 0, :, 29:32] = arm.target_position(jnp.asarray(rng.uniform(0.0, 110.0, L + 1)))
    return jnp.asarray(obs)


GOALS = Goals(
    arm.achieved_goal, arm.desired_goal, arm.with_goal, arm.compute_reward, arm.KINDS, True
)


@pytest.mark.parametrize("kind", arm.KINDS)
def test_relabelled_rewards_are_those_of_the_new_goals(kind):
    replay = circle(0.9)
    rows = drawn(2)
    unmoved = np.arange(len(rows.t)) % 4 == 0  # a shift to where they are
    h = np.where(unmoved, rows.t, rows.h)
    rows = rows._replace(slot=0 * rows.slot, env=0 * rows.env, h=h)
    obs = bnpo.relabelled(GOALS, "shift", replay, rows, np.arange(H + 1))
    goal = arm.desired_goal(obs)
    reward = arm.compute_reward(arm.achieved_goal(obs[:, 1:]), goal[:, 1:], kind)
    episode, ahead = replay[0, 0], np.arange(1, H + 1)
    at, then = (
        episode[start[:, None] + ahead] for start in (rows.t, np.where(rows.relabel, h, rows.t))
    )
    expected = arm.compute_reward(arm.achieved_goal(at), arm.desired_goal(then), kind)
    np.testing.assert_array_equal(reward, expected)
    own = arm.compute_reward(arm.achieved_goal(at), arm.desired_goal(at), kind)
    np.testing.assert_array_equal(reward[unmoved | ~rows.relabel], own[unmoved | ~rows.relabel])
    assert (rows.relabel & unmoved).sum() > 10
    assert (reward != own).any()


def test_a_shift_turns_the_circle():
    rows = drawn(3)._replace(relabel=np.ones(200, bool))
    rows = rows._replace(slot=0 * rows.slot, env=0 * rows.env)
    speed, ahead = 0.7, np.arange(H + 1)
    obs = bnpo.relabelled(GOALS, "shift", circle(speed), rows, ahead)
    goal, others = arm.desired_goal(obs), np.r_[:26, 29:33]  # the target's speed is the last
    own = circle(speed)[0, 0][rows.t[:, None] + ahead]
    np.testing.assert_array_equal(obs[..., others], own[..., others])
    angle = 40.0 + 4 * speed * (rows.h[:, None] + ahead)
    assert_allclose(goal, arm.target_position(jnp.asarray(angle)), atol=1e-4)
    assert_allclose(jnp.hypot(goal[..., 0], goal[..., 2]), np.full(goal.shape[:2], 8.0), atol=1e-4)
    still = circle(0.0)
    obs = bnpo.relabelled(GOALS, "shift", still, rows, ahead)
    np.testing.assert_array_equal(obs, still[0, 0][rows.t[:, None] + ahead])


@pytest.mark.parametrize("strategy", ["shift", "future"])
def test_what_acted_is_the_weight_of_shifted_goals_alone(strategy):
    """x goes to x + a, a ~ N(k (g - x), 1), for two steps, to be near the goal at the end.

    Weighted by what acted for the original goals, the returns for shifted ones are those of the
    new policy, k = 0.7. For goals that were achieved they are not: these depend on the actions.
    """
    rng, num = np.random.default_rng(0), 400_000
    goal = rng.choice([-1.0, 1.0], (1, num, 6))
    x, noise, action = np.zeros((1, num, 6)), rng.normal(size=(num, 2)), []
    for j in range(2):
        action.append(0.5 * (goal[0, :, j] - x[0, :, j]) + noise[:, j])
        x[0, :, j + 1] = x[0, :, j] + action[j]
    goals = Goals(
        achieved_goal=lambda obs: obs[..., :1],
        desired_goal=lambda obs: obs[..., 1:],
        with_goal=lambda obs, goal: np.concatenate([obs[..., :1], goal], -1),
        compute_reward=None,
        kinds=(),
        moving=True,
    )
    h = rng.integers(0, 4, num) if strategy == "shift" else np.full(num, 2)
    rows = bnpo.Rows(np.zeros(num, int), np.arange(num), np.zeros(num, int), np.ones(num, bool), h)
    replay, ahead = np.stack([x, goal], -1), np.arange(3)
    own = bnpo.relabelled(goals, "none", replay, rows, ahead)
    new = np.asarray(bnpo.relabelled(goals, strategy, replay, rows, ahead))
    log_weight = 0.0
    for j in range(2):
        pi, acted = (
            Gaussian(k * (obs[:, j, 1:] - obs[:, j, :1]), jnp.zeros((num, 1)))
            for k, obs in ((0.7, new), (0.5, own))
        )
        a = action[j][:, None]
        log_weight += np.asarray(bnpo.log_prob_of(pi, a) - bnpo.log_prob_of(acted, a))[:, 0]
    weight, loss = np.exp(log_weight), (new[:, 2, 0] - new[:, 2, 1]) ** 2
    mean_of = lambda x: (x.mean(), 3.0 * x.std() / num**0.5)
    mean, margin = mean_of(weight)
    if strategy == "future":
        assert mean > 1.5
        return
    assert abs(mean - 1.0) < margin
    x, g = np.zeros(num), rng.choice([-1.0, 1.0], (3, num))
    for j in range(2):
        x = x + 0.7 * (g[j] - x) + rng.normal(size=num)
    on_policy, own_margin = mean_of((x - g[2]) ** 2)
    mean, margin = mean_of(weight * loss)
    assert abs(mean - on_policy) < margin + own_margin


# --- targets ---


def random_targets(seed, b=6, m=2, chance=0.0):
    rng = np.random.default_rng(seed)
    return {
        "reward": rng.normal(size=(b, H, m)),
        "next_value": rng.normal(size=(b, H, m)),
        "bootstrap": rng.normal(size=(b, m)),
        "n": rng.integers(1, H + 1, b),
        "terminated": rng.random((b, H)) < chance,
    }


def test_one_step_needs_no_value():
    given = random_targets(0) | {"n": np.ones(6, int)}
    target = partial(bnpo.nstep_target, gamma=0.9)
    expected = given["reward"][:, 0] + 0.9 * given["bootstrap"]
    for lam in (0.0, 0.5, 1.0):
        assert_allclose(target(**given, lam=lam), expected)
    moved = given | {"next_value": given["next_value"] + 5.0}
    assert_allclose(target(**moved, lam=0.5), expected)


def test_without_a_trace_decay_rewards_are_summed():
    given = random_targets(1)
    actual = bnpo.nstep_target(**given, gamma=0.9, lam=1.0)
    for b, n in enumerate(given["n"]):
        expected = sum(0.9**j * given["reward"][b, j] for j in range(n))
        assert_allclose(actual[b], expected + 0.9**n * given["bootstrap"][b])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_the_right_values_are_a_fixed_point(lam):
    given = random_targets(2)
    value = 1 / (1 - 0.9)
    given |= {"reward": np.ones((6, H, 2)), "next_value": np.full((6, H, 2), value)}
    given |= {"bootstrap": np.full((6, 2), value)}
    assert_allclose(bnpo.nstep_target(**given, gamma=0.9, lam=lam), np.full((6, 2), value))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.floats(0, 0.6))
def test_target_is_value_plus_decayed_errors(seed, gamma, lam, chance):
    """The published form, a sum of temporal differences: the value that it starts from cancels."""
    given = random_targets(seed, chance=chance)
    actual = jax.jit(bnpo.nstep_target)(**given, gamma=gamma, lam=lam)
    for b, n in enumerate(given["n"]):
        value, weight = np.full(2, 3.0), 1.0
        expected = value.copy()
        for j in range(n):
            after = given["bootstrap"][b] if j + 1 == n else given["next_value"][b, j]
            after = 0.0 if given["terminated"][b, j] else after
            expected += weight * (given["reward"][b, j] + gamma * after - value)
            if given["terminated"][b, j]:
                break
            value, weight = given["next_value"][b, j], weight * gamma * lam
        assert_allclose(actual[b], expected, atol=1e-4)


def test_lookaheads_are_equally_frequent():
    floating = bnpo.lookaheads(2048, 10, True)
    np.testing.assert_array_equal(np.bincount(floating), [0, *[205] * 8, *[204] * 2])
    np.testing.assert_array_equal(bnpo.lookaheads(5, 10, False), np.full(5, 10))


def test_turns_come_when_they_are_due():
    """Of a1 in an episode of 60 steps: 6 turns of DDPG with 1 or 2 minibatches, 1 of PPO with 6."""
    had = lambda delay, repeat: [int(bnpo.minibatches(t, delay, repeat)) for t in range(0, 130, 10)]
    assert np.diff(had(10, 1.5)).tolist() == [1, 2] * 6
    assert np.diff(had(60, 6.0)).tolist() == [0, 0, 0, 0, 0, 6] * 2
    assert np.diff(had(40, 107.0)).tolist() == [0, 0, 0, 107] * 3


# --- losses ---


def test_ppo_is_the_clipped_surrogate():
    """Value and gradient; the baseline is a constant, and only the ratio has a gradient."""
    log_ratio = jnp.log(jnp.array([0.5, 0.9, 1.1, 1.5, 0.5, 1.5, 3.0]))
    target = jnp.array([[2.0, 1.0]] * 4 + [[-1.0, -1.0]] * 3)
    q = jnp.full((7, 2), 0.25)
    advantage = (target - q).sum(-1)
    loss = lambda q, x: bnpo.actor_loss(q, x, target, False, 0.2, False)
    ratio = jnp.exp(log_ratio)
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    assert_allclose(loss(q, log_ratio), -surrogate.mean())
    theirs = lambda x: ppo.policy_loss(x, jnp.zeros(7), advantage, 0.2)[0]
    assert_allclose(jax.grad(loss, 1)(q, log_ratio), jax.grad(theirs)(log_ratio), atol=1e-6)
    q_grad, grad = jax.grad(loss, (0, 1))(q, log_ratio)
    assert_allclose(q_grad, jnp.zeros_like(q))
    expected = -ratio * advantage / 7
    # past the range in the direction that the advantage asks for
    assert_allclose(grad, expected.at[jnp.array([3, 4])].set(0.0))


def test_at_the_acting_policy_ppo_is_the_policy_gradient():
    rng = np.random.default_rng(0)
    mean, action = jnp.float32(rng.normal(size=(2, 5, 4)))
    target, q = jnp.float32(rng.normal(size=(2, 5, 3)))
    log_prob = bnpo.log_prob_of(Gaussian(mean, jnp.zeros((5, 4))), action)

    def loss(mean, reduce):
        now = bnpo.log_prob_of(Gaussian(mean, jnp.zeros((5, 4))), action)
        log_ratio = getattr(now - log_prob, reduce)(-1)
        return bnpo.actor_loss(q, log_ratio, target, False, 0.2, False)

    advantage = (target - q).sum(-1)
    plain = jax.grad(
        lambda m: -(advantage * Gaussian(m, jnp.zeros((5, 4))).log_prob(action)).mean()
    )(mean)
    for reduce, factor in (("sum", 1.0), ("mean", 0.25)):
        assert_allclose(loss(mean, reduce), -advantage.mean())
        assert_allclose(jax.grad(loss)(mean, reduce), factor * plain)


def test_ddpg_climbs_the_critic():
    """The target shifts the loss and leaves its gradient alone; so does the ratio."""
    rng = np.random.default_rng(1)
    q, target = jnp.float32(rng.normal(size=(2, 5, 3)))
    loss = lambda q, x, y: bnpo.actor_loss(q, x, y, True, 0.0, False)
    grads = jax.grad(loss, (0, 1, 2))(q, jnp.ones(5), target)
    assert_allclose(grads[0], np.full((5, 3), -1 / 5))
    assert_allclose(grads[1], np.zeros(5))
    assert_allclose(loss(q, jnp.ones(5), target), -(q - target).sum(-1).mean())


@pytest.mark.parametrize("inverted", [False, True])
def test_ddpg_with_ratios_weighs_the_critic(inverted):
    ratio = jnp.array([0.5, 1.0, 1.5, 200.0])
    log_ratio = -jnp.log(ratio) if inverted else jnp.log(ratio)
    q, target = jnp.array([[1.0], [1.0], [-1.0], [-1.0]]), jnp.zeros((4, 1))
    loss = lambda q, x: bnpo.actor_loss(q, x, target, True, 0.2, inverted)
    weight = jnp.array([0.5, 1.0, 1.5, 100.0])  # the smaller product of both
    assert_allclose(loss(q, log_ratio), -(weight * q[:, 0]).mean(), rtol=1e-4)
    q_grad, ratio_grad = jax.grad(loss, (0, 1))(q, log_ratio)
    assert_allclose(q_grad[:, 0], -weight / 4, rtol=1e-4)
    assert_allclose(ratio_grad, np.zeros(4))


@pytest.mark.parametrize("bellman", [False, True])
def test_a_ratio_beyond_all_numbers_has_no_gradient(bellman):
    """exp(200) is infinite; the other row learns nevertheless."""
    log_ratio, q = jnp.array([200.0, 0.0, -200.0]), jnp.zeros((3, 1))
    for gain, total in ((1.0, 1.2 + 1.0 + 0.0), (-1.0, -100.0 - 1.0 - 0.8)):
        target = jnp.full((3, 1), -gain if bellman else gain)
        loss = lambda q, x, y=target: bnpo.actor_loss(q, x, y, bellman, 0.2, False)
        value, grads = jax.value_and_grad(loss, (0, 1))(q, log_ratio)
        assert_allclose(value, -total / 3, rtol=1e-4)
        assert jnp.isfinite(grads[0]).all()
        assert_allclose(grads[1], [0.0, 0.0 if bellman else -gain / 3, 0.0])


def test_log_probabilities_add_up():
    rng = np.random.default_rng(2)
    mean, log_std, action = jnp.float32(rng.normal(size=(3, 5, 4)))
    policy = Gaussian(mean, log_std)
    each = bnpo.log_prob_of(policy, action)
    assert each.shape == (5, 4)
    assert_allclose(each.sum(-1), policy.log_prob(action))


def test_the_critic_learns_what_a_distribution_is_worth():
    """One state, r = a, no future: the reward of samples gives Q(mean) = mean."""
    critic = bnpo.Critic(bnpo.Config(hidden=(16,)), 1)
    mean, obs = jnp.tile(jnp.array([-1.0, 0.0, 1.0]), 1000)[:, None], jnp.ones((3000, 1))
    told = jnp.concatenate([mean, jnp.ones_like(mean)], -1)
    optimizer = optax.adam(5e-3)

    def step(carry, key):
        params, opt_state = carry
        action = mean + jax.random.normal(key, mean.shape)
        loss = lambda params: ((critic.apply(params, obs, told) - action) ** 2).mean()
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def fit(key):
        params = critic.init(key, obs, told)
        keys = jax.random.split(key, 400)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    learned = critic.apply(fit(jax.random.key(0)), obs[:3], told[:3])
    assert_allclose(learned[:, 0], [-1.0, 0.0, 1.0], atol=0.05)


def test_the_deviation_stays_between_bounds():
    actor = bnpo.Actor(bnpo.Config(hidden=(4,)), 2)
    noise = (jnp.ones((3, 4)), jnp.ones((4, 2)))
    params = actor.init(jax.random.key(0), jnp.ones((5, 3)), noise)["params"]
    for log_std, expected in ((0.0, 1.0), (100.0, math.e), (-100.0, 1 / math.e)):
        changed = {"params": params | {"log_std": jnp.full(2, log_std)}}
        std = jnp.exp(actor.apply(changed, jnp.ones((5, 3)), noise).log_std)
        assert_allclose(std, np.full((5, 2), expected))
    noisy, silent = (
        actor.apply({"params": params}, jnp.ones((5, 3)), x).mean
        for x in (noise, jax.tree.map(jnp.zeros_like, noise))
    )
    shifted = {k: v + 0.017 if "kernel" in k else v for k, v in params.items()}
    still = actor.apply({"params": shifted}, jnp.ones((5, 3)), jax.tree.map(jnp.zeros_like, noise))
    assert_allclose(noisy, still.mean)
    assert (noisy != silent).all()
    squashing = bnpo.Actor(bnpo.Config(hidden=(4,), mean_squash="tanh"), 2)
    squashed = squashing.apply({"params": params}, jnp.ones((5, 3)), noise)
    assert_allclose(squashed.mean, jnp.tanh(noisy))


def test_a_quadratic_critic_is_climbed():
    """Q = -(mean - b)^2 - (std - e)^2: the gradient that the parameters of the policy get."""
    mean, rho, b, e = jnp.array([[0.5], [-1.0]]), 0.3, 1.5, 0.7

    def loss(mean, rho):
        std = jnp.exp(jnp.tanh(rho))
        q = -((mean - b) ** 2) - (std - e) ** 2
        return bnpo.actor_loss(q, jnp.zeros(2), jnp.ones((2, 1)), True, 0.0, False)

    mean_grad, rho_grad = jax.grad(loss, (0, 1))(mean, rho)
    std = math.exp(math.tanh(rho))
    assert_allclose(mean_grad, 2 * (mean - b) / 2)
    assert_allclose(rho_grad, 2 * (std - e) * std * (1 - math.tanh(rho) ** 2))


# --- natural gradient ---


def tiny_policy(params, obs):
    hidden = jnp.tanh(obs @ params["first"])
    log_std = jnp.broadcast_to(params["log_std"], (len(obs), 2))
    return Gaussian(hidden @ params["second"], log_std)


def tiny_problem(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"first": (3, 4), "second": (4, 2), "log_std": (2,)}
    params, vector = (
        {n: 0.5 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), ks, strict=True)}
        for ks in (jax.random.split(keys[0], 3), jax.random.split(keys[1], 3))
    )
    return params, vector, jax.random.normal(keys[2], (7, 3))


def test_fisher_product_is_the_hessian_of_the_kl():
    params, vector, obs = tiny_problem()
    policy_of = lambda params: tiny_policy(params, obs)
    product = jax.jit(partial(common.fisher_product, policy_of, damping=0.1))(params, vector)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    kl = lambda x: common.gaussian_kl(policy_of(params), policy_of(unravel(x))).mean()
    direct = jax.jit(jax.hessian(kl))(flat) @ jax.flatten_util.ravel_pytree(vector)[0]
    expected = jax.tree.map(lambda h, v: h + 0.1 * v, unravel(direct), vector)
    for name in params:
        assert_allclose(product[name], expected[name], atol=1e-4)


def test_fisher_of_a_linear_mean():
    """E[s s'] times one over the variance."""
    _, _, obs = tiny_problem(1)
    weights = jnp.ones((3, 2))
    policy_of = lambda w: Gaussian(
        obs @ w, jnp.broadcast_to(jnp.log(jnp.array([2.0, 0.5])), (7, 2))
    )
    vector = jax.random.normal(jax.random.key(3), (3, 2))
    product = common.fisher_product(policy_of, weights, vector, 0.0)
    assert_allclose(product, obs.T @ obs / 7 @ vector / jnp.array([4.0, 0.25]), atol=1e-4)


def sloped(policy_of, seed=5):
    """A loss that is linear in what the policy gives."""
    keys = jax.random.split(jax.random.key(seed))
    mean, log_std = (jax.random.normal(key, (7, 2)) for key in keys)
    return lambda params: (
        (mean * policy_of(params).mean).mean() + (log_std * policy_of(params).log_std).mean()
    )


def test_natural_step_has_the_wanted_kl():
    delta = 1e-4
    params, _, obs = tiny_problem(2)
    policy_of = lambda params: tiny_policy(params, obs)
    loss = sloped(policy_of)
    step = lambda x: common.natural_step(loss, policy_of, x, jax.grad(loss)(x), delta, 1e-6)
    new = jax.jit(step)(params)
    assert_allclose(common.gaussian_kl(policy_of(params), policy_of(new)).mean(), delta, rtol=0.05)
    assert loss(new) < loss(params)


def test_natural_step_solves_the_fisher_system():
    """As many steps of conjugate gradients as there are parameters, against a direct solution."""
    _, _, obs = tiny_problem(6)
    std, damping, delta = jnp.array([2.0, 0.5]), 1e-2, 1e-4
    policy_of = lambda w: Gaussian(obs @ w, jnp.broadcast_to(jnp.log(std), (7, 2)))
    loss, start = sloped(policy_of), jnp.ones((3, 2))
    grads = jax.grad(loss)(start)
    new = common.natural_step(loss, policy_of, start, grads, delta, damping, iterations=6)
    fisher = np.kron(obs.T @ obs / 7, np.diag(std**-2.0)) + damping * np.eye(6)
    step = -np.linalg.solve(np.float64(fisher), np.float64(grads).ravel())
    step *= np.sqrt(2 * delta / (step @ fisher @ step))
    assert_allclose((new - start).ravel(), step, rtol=1e-3, atol=1e-3 * np.abs(step).max())


def test_natural_step_stays_where_nothing_helps():
    params, vector, obs = tiny_problem(3)
    loss = lambda params: 0.0 * params["log_std"].sum()
    step = partial(common.natural_step, loss, lambda p: tiny_policy(p, obs))
    new = jax.jit(step)(params, vector)
    for name in params:
        np.testing.assert_array_equal(new[name], params[name])


def test_natural_step_is_halved_until_it_helps():
    """The full step, sqrt(2 delta), and its half end above the start of a narrow valley."""
    policy_of = lambda mean: Gaussian(jnp.full((7, 1), mean), jnp.zeros((7, 1)))
    loss = lambda mean: (mean - 0.01) ** 2
    new = common.natural_step(loss, policy_of, 0.0, jax.grad(loss)(0.0), 1e-3, 1e-9)
    assert_allclose(new, math.sqrt(2e-3) / 4, rtol=1e-3)


def test_natural_step_is_halved_until_it_is_near():
    """The full step helps, but the KL there is nine times what the Fisher matrix promises."""
    policy_of = lambda x: Gaussian(jnp.full((7, 1), x + 1e3 * x**3), jnp.zeros((7, 1)))
    new = common.natural_step(jnp.negative, policy_of, 0.0, -1.0, 1e-3, 1e-9)
    assert_allclose(new, math.sqrt(2e-3) / 2, rtol=1e-3)


def test_natural_step_does_not_depend_on_the_parametrisation():
    """Twice the unit of log_std: the same change of the policy, to first order."""
    params, _, obs = tiny_problem(4)
    outcomes = []
    for unit in (1.0, 2.0):
        start = params | {"log_std": params["log_std"] / unit}
        policy_of = lambda p, unit=unit: tiny_policy(p | {"log_std": unit * p["log_std"]}, obs)
        loss = sloped(policy_of)
        grads = jax.grad(loss)(start)
        step = partial(common.natural_step, loss, policy_of, delta=1e-4, damping=1e-6)
        new = jax.jit(partial(step, iterations=60))(start, grads)
        old, new = policy_of(start), policy_of(new)
        outcomes.append([new.mean - old.mean, new.log_std - old.log_std])
    for x, y in zip(*outcomes, strict=True):
        assert_allclose(x, y, rtol=0.05, atol=2e-4)


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr_actor": (1e-3,)},
            r"lr_actor=\(0.001,\): 2 entries of 0 to inf, one for each brain",
        ),
        ({"learning_delay": (0, 10)}, r"learning_delay=\(0, 10\): 2 entries of 1 to inf"),
        ({"her_ratio": (0, 12.0)}, r"her_ratio=\(0, 12.0\): 2 entries of 0 to 1"),
        ({"her_ratio": (0, math.nan)}, r"her_ratio=\(0, nan\): 2 entries of 0 to 1"),
        ({"bellman": ()}, r"bellman=\(\): 1 entries"),
        ({"ppo_eps": (0.0, 0.0)}, "brain 0: bellman=False needs ppo_eps > 0"),
        (
            {"total_timesteps": 3_600},
            "brain 0 never learns: 6.0 minibatches .* after 3 episodes of 3",
        ),
        ({"learning_delay": (60, 20_000)}, "brain 1 never learns: 1.5 .* every 20000 steps"),
        ({"learning_repeat": (6.0, 0.0)}, "brain 1 never learns: 0.0 minibatches"),
        ({"max_nstep": 60}, "max_nstep=60: 1 to 59"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        bnpo.Config(**changes).validate()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "cartpole"}, "discrete actions"),
        ({"env": "pendulum"}, "has no goals to relabel"),
        (
            {"env": "pendulum", "her_strategy": "none"},
            "has no reward_kind='proxy': take one of env",
        ),
        ({"her_strategy": "future"}, "gives a row one for ever"),
        ({"env": "tiny:seek", "reward_kind": "sparse"}, "'sparse': take one of env, proxy"),
    ],
)
def test_what_an_environment_lacks_is_named(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        bnpo.build(dataclasses.replace(bnpo.Config(), **changes))
    assert "\n" not in str(error.value)


def test_derived_sizes_of_the_published_setting():
    config = bnpo.Config()
    assert (config.window, config.warmup, config.num_updates) == ((5, 200), (3, 2), 320)


@pytest.mark.parametrize(
    ("preset", "recalc_delay", "optim_epochs", "learning_repeat"),
    [("a1", 1, 2, 3), ("a2", 5, 2, 3), ("a2b", 5, 2, 3), ("a8", 2, 3, 140)],
)
def test_minibatches_of_the_published_settings(preset, recalc_delay, optim_epochs, learning_repeat):
    """A round is one minibatch once in `recalc_delay` + 1 times, else `optim_epochs`."""
    config = bnpo.Config(**bnpo.PRESETS[preset])
    of_a_round = (1 + recalc_delay * optim_epochs) / (recalc_delay + 1)
    expected = learning_repeat // optim_epochs * of_a_round
    assert config.learning_repeat[-1] == pytest.approx(expected, rel=0.01)
