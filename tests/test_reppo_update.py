"""Relative entropy pathwise policy optimisation: what an update does, settings, learning."""

import dataclasses
import math
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import envs
from algos import common, launch, reppo
from algos.launch import evaluation
from envs.wrappers import RawEnv, raw_state

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_reppo_update")

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def config_of(**changes):
    return tiny.config_of("reppo", **({"reward_scale": 1.0, "anneal_lr": False} | changes))


def run_update(**changes):
    """State before and after one update, and its metrics."""
    return tiny.run_update("reppo", **({"reward_scale": 1.0, "anneal_lr": False} | changes))


# A single gradient step that climbs Q in every state. A scalar critic is not flat at first.
ONE = {
    "num_epochs": 1,
    "num_minibatches": 1,
    "kl_mode": "value",
    "kl_estimator": "exact",
    "critic_loss": "mse",
}


def with_head(state, **leaves):
    """The state with other weights or biases in the last layer of the actor."""
    net = state.params["actor"]["net"]["params"]
    net = {"params": net | {"Dense_0": net["Dense_0"] | leaves}}
    actor = state.params["actor"] | {"net": net}
    return state._replace(params=state.params | {"actor": actor})


# --- multipliers ---


def test_multipliers_move_and_are_logged():
    before, after, metrics = run_update(learning_rate=0.01)
    for name, old in before.params["actor"]["duals"].items():
        new = after.params["actor"]["duals"][name]
        assert old != new
        assert_close(metrics[f"losses/{name}"], np.exp(new))
    moved = jax.tree.map(
        lambda x, y: bool((x != y).any()),
        before.params["actor"]["net"],
        after.params["actor"]["net"],
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_multipliers_have_their_own_learning_rate():
    runs = [run_update(**ONE, learning_rate=1e-3, dual_lr_mult=factor) for factor in (1.0, 5.0)]
    steps = [
        after.params["actor"]["duals"]["temperature"]
        - before.params["actor"]["duals"]["temperature"]
        for before, after, _ in runs
    ]
    assert_close(steps[1], 5.0 * steps[0], rtol=1e-3)
    tiny.assert_same(runs[0][1].params["actor"]["net"], runs[1][1].params["actor"]["net"])


@pytest.mark.parametrize(
    ("field", "value", "name", "sign"),
    [
        ("kl_bound", -1.0, "kl_coef", 1),
        ("kl_bound", 1.0, "kl_coef", -1),
        ("target_entropy_mult", -10.0, "temperature", 1),
        ("target_entropy_mult", 10.0, "temperature", -1),
        ("target_entropy_mult", 0.0, "temperature", -1),  # the entropy itself is positive
    ],
)
def test_an_update_moves_the_multipliers_to_their_constraints(field, value, name, sign):
    before, after, _ = run_update(**ONE, **{field: value})
    old, new = (state.params["actor"]["duals"][name] for state in (before, after))
    assert np.sign(new - old) == sign


# --- observations ---


def recorder():
    """Observations that wander; remembers them and the actions of its first 32 steps."""

    def reset(key):
        obs = 3.0 * jax.random.normal(key, (2,)) + 5.0
        return obs, (jnp.int32(0), obs, jnp.zeros((32, 2)), jnp.zeros((32, 2)))

    def step(key, state, action):
        t, obs, seen, done = state
        obs = 0.9 * obs + jax.random.normal(key, (2,))
        return obs, (t + 1, obs, seen.at[t].set(obs), done.at[t].set(action)), 0.0, False, {}

    return RawEnv(reset, step, 2, (2,), 2, False, 10_000, "cached")


@pytest.mark.slow
def test_statistics_include_the_observation_that_they_standardise():
    """With next to no noise an action is the mean at the observation, standardised at its step."""
    config = config_of(env="test_reppo_update:recorder", learning_rate=0.0, min_std=0.0)
    algo = tiny.build("reppo", config)

    def narrow(state):
        kernel = state.params["actor"]["net"]["params"]["Dense_0"]["kernel"]
        return with_head(
            state, kernel=kernel.at[:, 2:].set(0.0), bias=jnp.array([0.0, 0.0, -20.0, -20.0])
        )

    start = jax.jit(lambda key: narrow(algo.init(key)))(jax.random.key(0))
    state = start
    for _ in range(2):
        state, _ = jax.jit(algo.update)(state)
    _, _, seen, actions = raw_state(state.env_state)  # [N, 32, 2]
    seen = np.concatenate([np.asarray(start.obs)[:, None], seen[:, :16]], 1)
    assert_close(state.obs_stats.mean, seen.reshape(-1, 2).mean(0))
    assert_close(state.obs_stats.var, seen.reshape(-1, 2).var(0))
    assert state.obs_stats.count == seen.shape[0] * 17
    actor = reppo.Actor(config, 2, 2)
    for t in range(16):
        past = seen[:, : t + 1].reshape(-1, 2)
        inputs = (seen[:, t] - past.mean(0)) / np.sqrt(past.var(0) + 1e-2)
        mean = actor.apply(start.params["actor"]["net"], jnp.asarray(inputs)).mean
        assert_close(actions[:, t], np.clip(np.tanh(mean), -0.999, 0.999), atol=2e-4)


# --- an update ---


def test_the_prediction_does_not_learn_without_its_weight():
    """Its head is the third block and the third linear layer of the critic."""
    before, after, metrics = run_update(aux_loss_mult=0.0, learning_rate=0.01)
    assert metrics["losses/aux_loss"] == 0
    old, new = (state.params["critic"]["params"] for state in (before, after))
    for layer in ("Block_2", "Dense_2"):
        tiny.assert_same(old[layer], new[layer])
    assert (old["Dense_1"]["kernel"] != new["Dense_1"]["kernel"]).any()


@pytest.mark.parametrize(("preset", "updates"), [("large", 382), ("medium", 763), ("small", 1526)])
def test_published_sizes_of_a_run(preset, updates):
    config = dataclasses.replace(reppo.Config(), **reppo.PRESETS[f"dmc_{preset}"])
    assert config.num_updates == updates
    gradient_steps = config.num_epochs * config.num_minibatches
    assert config.steps_per_update / gradient_steps == 256
    assert config.steps_per_update // config.num_minibatches == 2048


@pytest.mark.slow
def test_an_epoch_sees_every_transition_once():
    """Without learning, the mean over minibatches is that over the batch."""
    whole = run_update(**ONE, learning_rate=0.0)[2]
    cut = run_update(**(ONE | {"num_minibatches": 4}), learning_rate=0.0)[2]
    for name in ("losses/qf_loss", "losses/value_error", "losses/q_data", "losses/std"):
        assert_close(cut[name], whole[name], rtol=1e-4)


def test_the_actor_climbs_the_critic_that_was_just_updated():
    still, moving = (run_update(**ONE, learning_rate=rate)[2] for rate in (0.0, 0.03))
    assert_close(moving["losses/q_data"], still["losses/q_data"])
    assert_close(moving["losses/entropy"], still["losses/entropy"])
    assert abs(moving["losses/policy_loss"] - still["losses/policy_loss"]) > 1e-3


def test_the_actor_climbs_through_its_own_action():
    """Without weight on entropy and KL, nothing but Q moves the policy."""
    alone = {"temperature_init": 1e-20, "kl_coef_init": 1e-20}
    assert run_update(**ONE, **alone)[2]["losses/actor_grad_norm"] > 1e-3


def test_a_gated_state_does_not_climb():
    """Every KL is above a bound of -1, so without weight on the KL nothing moves the policy."""
    alone = {"temperature_init": 1e-20, "kl_coef_init": 1e-20, "kl_bound": -1.0}
    metrics = run_update(**ONE | {"kl_mode": "clipped"}, **alone)[2]
    assert metrics["losses/gated_fraction"] == 1
    assert metrics["losses/actor_grad_norm"] < 1e-6


def test_first_step_of_an_update_has_no_kl():
    metrics = run_update(**ONE)[2]
    assert abs(metrics["losses/kl"]) < 1e-5
    assert metrics["losses/gated_fraction"] == 0


def blind_and_narrow(state):
    """The critic no longer sees the action's two entries; the policy has mean 0, std e^-3."""
    critic = state.params["critic"]["params"]
    kernel = critic["Block_0"]["Dense_0"]["kernel"].at[2:].set(0.0)
    block = critic["Block_0"] | {"Dense_0": critic["Block_0"]["Dense_0"] | {"kernel": kernel}}
    params = state.params | {"critic": {"params": critic | {"Block_0": block}}}
    kernel = state.params["actor"]["net"]["params"]["Dense_0"]["kernel"]
    bias = jnp.array([0.0, 0.0, -3.0, -3.0])
    return with_head(state._replace(params=params), kernel=0 * kernel, bias=bias)


# `counter` pays 1 a step, and its episodes are cut after 4 steps; here all of them start at 0.
COUNTER = {"env": "tiny:counter", "normalize_obs": False, "min_std": 0.0, "td_lambda": 0.0}
COUNTER |= ONE | {"gamma": 0.5, "aux_loss_mult": 0.0}
HERE, SUCCESSOR = (
    np.stack([count, 4 - count], -1).astype(np.float32)
    for count in np.array([[0, 1, 2, 3] * 2, [1, 2, 3, 4] * 2])
)


def counter_run(**changes):
    """An update of `counter` without entropy: state before it, state after it, metrics."""
    config = config_of(**COUNTER | {"temperature_init": 1e-20} | changes)
    algo = reppo.build(config, envs.make("tiny:counter", 4, stagger=False))

    def run(key):
        state = blind_and_narrow(algo.init(key))
        return state, *algo.update(state)

    return jax.jit(run)(jax.random.key(0))


def counter_update(**changes):
    """The same: values [8] by parameters and observations, metrics, parameters of the critic."""
    before, _, metrics = counter_run(**changes)
    critic = reppo.Critic(config_of(**COUNTER | changes))
    predict = lambda params, obs: critic.apply(params, obs, np.zeros((8, 2))).value
    return predict, metrics, before.params["critic"]


@pytest.mark.parametrize("td_lambda", [0.0, 0.8])
def test_what_the_targets_are_made_of(td_lambda):
    """1 + F / 2: F mixes V at the true successor with the next target, but not across a cut."""
    predict, metrics, params = counter_update(td_lambda=td_lambda)
    values = np.append(predict(params, HERE)[:4], predict(params, SUCCESSOR)[3])
    assert np.diff(np.sort(values)).min() > 1e-3  # the counts 0 to 4 can be told apart
    value = np.asarray(predict(params, SUCCESSOR))
    target = 1 + 0.5 * value
    for t in (2, 1, 0, 6, 5, 4):  # steps 3 and 7 are the last of their episodes
        target[t] = 1 + 0.5 * (td_lambda * target[t + 1] + (1 - td_lambda) * value[t])
    loss = lambda params: ((predict(params, HERE) - target) ** 2).mean()
    assert_close(metrics["losses/qf_loss"], loss(params), rtol=1e-4)
    assert_close(metrics["losses/value_error"], loss(params), rtol=1e-4)
    norm = optax.global_norm(jax.grad(loss)(params))
    assert_close(metrics["losses/critic_grad_norm"], norm, rtol=1e-4)
    explained = 1 - loss(params) / target.var()
    assert_close(metrics["losses/explained_variance"], explained, rtol=1e-3)


@pytest.mark.parametrize(
    ("critic_loss", "reward_scale", "share"),
    [("hl_gauss", 1.0, 0.75), ("hl_gauss", -1.0, 0.75), ("mse", 1.0, 0.0)],
)
def test_share_of_targets_outside_the_support(critic_loss, reward_scale, share):
    """An episode has targets near +-1.62, 1.56, 1.4 and 1; a scalar critic has no support."""
    changes = {"critic_loss": critic_loss, "reward_scale": reward_scale, "td_lambda": 0.8}
    _, metrics, _ = counter_update(vmin=-1.2, vmax=1.2, **changes)
    assert metrics["health/target_clip_fraction"] == share


def test_the_entropy_of_the_next_state_is_a_bonus():
    """The target is 10 + gamma alpha H + V(successor) / 2, where the sample of H has std 1."""
    predict, metrics, params = counter_update(temperature_init=2.0, reward_scale=10.0)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) - 3.0)  # tanh is the identity near 0
    target = 10 + 0.5 * 2.0 * entropy + 0.5 * predict(params, SUCCESSOR)
    error = ((predict(params, HERE) - target) ** 2).mean() + 1.0
    assert_close(metrics["losses/value_error"], error, rtol=0.15)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_the_kl_is_that_of_the_new_policy_from_the_old_one(estimator):
    """Two epochs of one minibatch: the first has no KL, the second what the first step made."""
    changes = {"kl_estimator": estimator, "kl_samples": 512, "kl_coef_init": 1e-20}
    changes |= {"temperature_init": 1.0, "learning_rate": 0.3}  # entropy widens the policy
    before, after, _ = counter_run(**changes)
    *_, metrics = counter_run(**changes, num_epochs=2)
    actor = reppo.Actor(config_of(**COUNTER), 2, 2)
    old, new = (actor.apply(x.params["actor"]["net"], HERE) for x in (before, after))
    kl_of = lambda p, q: (
        (np.log(q.std / p.std) + (p.std**2 + (p.mean - q.mean) ** 2) / (2 * q.std**2) - 0.5)
        .sum(-1)
        .mean()
    )
    kl, other = kl_of(old, new), kl_of(new, old)
    assert abs(kl / other - 1) > 0.2
    assert (new.std > old.std).all()
    tolerance = {"exact": 1e-3, "sampled": 0.1}[estimator]
    assert_close(metrics["losses/kl"], kl / 2, rtol=tolerance)


def test_the_kl_is_measured_from_the_policy_that_acted():
    metrics = run_update(learning_rate=0.03)[2]
    assert metrics["losses/kl"] > 0.05
    assert 0 < metrics["losses/gated_fraction"] < 1


def test_the_critic_sees_what_the_actor_does_not():
    config = config_of()
    env = reppo.make_env(config)._replace(privileged_size=1)
    params = jax.eval_shape(reppo.build(config, env).init, jax.random.key(0)).params
    first = lambda tree: tree["params"]["Block_0"]["Dense_0"]["kernel"].shape[0]
    assert first(params["critic"]) == 4 + 1
    assert first(params["actor"]["net"]) == 4 - 1


SCALAR = {"critic_loss": "mse", "kl_mode": "full"}
OTHER = {"kl_estimator": "exact", "norm": "none"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [SCALAR, OTHER], ids=["scalar", "other"])
def test_variants_run(changes):
    metrics = run_update(**changes)[2]
    assert metrics["health/finite"]
    assert metrics["health/skipped_steps"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_inputs_are_standardised_at_their_step():
    """By statistics of all that was shown until then: at an end, the new start and not the last."""
    # another norm of the hidden layers would hide a wrong scale
    predict, metrics, params = counter_update(normalize_obs=True, norm="none")
    standard = lambda seen, obs: (obs - seen.mean) / np.sqrt(seen.var + 1e-2)
    show = lambda seen, t: seen.add(np.tile(HERE[t % 8], (4, 1)))  # 4 environments in step
    seen, inputs, successors = show(common.Stats.empty((2,)), 0), [], []
    for t in range(8):
        inputs.append(standard(seen, HERE[t]))
        seen = show(seen, t + 1)
        successors.append(standard(seen, SUCCESSOR[t]))
    inputs, successors = np.array(inputs), np.array(successors)
    target = 1 + 0.5 * predict(params, successors)
    error = ((predict(params, inputs) - target) ** 2).mean()
    assert_close(metrics["losses/qf_loss"], error, rtol=1e-4)


# --- broken physics ---


def broken():
    """Balance whose reward is never a number."""
    raw = tiny.balance()

    def step(key, state, action):
        obs, state, _, terminated, info = raw.step(key, state, action)
        return obs, state, jnp.nan, terminated, info

    return raw._replace(step=step)


def test_broken_physics_teaches_nothing():
    before, after, metrics = run_update(env="test_reppo_update:broken")
    assert metrics["health/env_nan"] == 32
    assert metrics["health/finite"]
    assert metrics["health/skipped_steps"] == 0
    tiny.assert_close(after.params, before.params, atol=1e-6)  # a step is 3e-4


def test_a_gradient_that_is_not_finite_is_skipped():
    """A reward scale of infinity makes every target infinite, and the scalar critic's error too."""
    before, after, metrics = run_update(**SCALAR, reward_scale=math.inf)
    tiny.assert_close(before.params["critic"], after.params["critic"], atol=1e-6)  # a step is 3e-4
    assert metrics["health/skipped_steps"] == 4
    assert not metrics["health/finite"]  # nothing was learned: the seed is named


def rich(discrete=False):
    """The first step pays more than float32 can scale; the others nothing."""

    def step(key, t, action):
        return jnp.ones(1), t + 1, jnp.where(t == 0, 3e38, 0.0), False, {}

    reset = lambda key: (jnp.ones(1), jnp.int32(0))
    return RawEnv(reset, step, 1, (1,), 2, discrete, 10_000, "cached")


rich_discrete = partial(rich, discrete=True)


@pytest.mark.parametrize("name", ["reppo", "reppo_discrete"])
def test_a_skipped_step_leaves_no_trace(name):
    """The metrics are those of the other steps, and so are the moments of Adam."""
    task = "rich_discrete" if name == "reppo_discrete" else "rich"
    changes = {"env": f"test_reppo_update:{task}", "reward_scale": 10.0, "td_lambda": 0.0}
    _, after, metrics = tiny.run_update(name, **changes, num_epochs=2, num_minibatches=8)
    assert 0 < metrics["health/skipped_steps"] < 16  # 4 transitions in 8 minibatches, two epochs
    assert metrics["health/finite"]
    assert common.all_finite((after.params, after.opt_state))


@pytest.mark.parametrize("name", ["reppo", "reppo_discrete"])
def test_multipliers_start_at_their_settings(name):
    config = tiny.config_of(name, kl_coef_init=0.3, temperature_init=0.2)
    state = jax.jit(tiny.build(name, config).init)(jax.random.key(0))
    duals = jax.tree.map(jnp.exp, state.params["actor"]["duals"])
    assert_close([duals["kl_coef"], duals["temperature"]], [0.3, 0.2])


def test_a_greedy_action_is_clipped_as_in_a_rollout():
    algo = tiny.build("reppo", config_of())
    state = algo.init(jax.random.key(0))
    kernel = state.params["actor"]["net"]["params"]["Dense_0"]["kernel"]
    far = jnp.full(kernel.shape[1], 9.0)
    policy = algo.policy_of(with_head(state, kernel=jnp.zeros_like(kernel), bias=far))
    action = algo.act(policy, state.obs, jax.random.key(1), True)
    assert_close(action, 0.999)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_minibatches": 3}, r"num_minibatches=3 .* 32 transitions .*num_envs=4, num_steps=8"),
        ({"env": "cartpole"}, r"CartPole-v1 has discrete actions"),
        ({"vmin": 5.0, "vmax": 5.0}, r"vmin=5: .*vmax=5"),
        ({"reward_range": (5.0, -5.0)}, r"reward_range=\(5.0, -5.0\): the lower end comes first"),
        ({"num_bins": 1}, r"num_bins=1"),
    ],
)
def test_bad_input_is_one_error(changes, message):
    with pytest.raises(ValueError, match=message):
        reppo.make_train(config_of(**changes))


def test_a_support_that_is_too_small_is_a_warning():
    numbers = r"values can be 0 to 100 .*vmin=-2, vmax=12"
    with pytest.warns(UserWarning, match=numbers) as caught:
        config_of(reward_range=(0.0, 1.0), gamma=0.99).validate()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_of(reward_range=(0.0, 0.0), vmin=1.0).validate()  # not known


def test_the_warning_is_one_line_before_anything_compiles(tmp_path, capsys):
    (tmp_path / "file").touch()  # no directory can be under it: the launch ends before it traces
    argv = ["--env", "pendulum", "--vmin", "-9", "--run-dir", str(tmp_path / "file" / "run")]
    with pytest.raises(SystemExit) as end:
        launch.main("reppo", argv)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert lines[0].startswith("warning: values can be -162.8 to 0 given reward_range")
    assert not any("values can be" in line for line in lines[1:])
    assert lines[-1].startswith("error: ")


def test_presets_have_room_for_their_rewards(recwarn):
    for preset in reppo.PRESETS.values():
        dataclasses.replace(reppo.Config(), **preset).validate()
    assert not recwarn.list


def test_published_sizes_keep_nothing_of_a_task_but_its_rewards():
    rewards = {"vmin", "vmax", "reward_scale", "reward_range", "gamma"}
    merged = lambda presets: {k: v for x in presets for k, v in reppo.PRESETS[x].items()}
    settings = lambda *presets: {
        name: value
        for name, value in vars(dataclasses.replace(reppo.Config(), **merged(presets))).items()
        if name not in rewards
    }
    for task in ("gym", "playground", "pendulum", "inverted_pendulum", "ReacherEasy"):
        for published in ("default", "dmc_small", "tiny", "humanoid_small"):
            assert settings(task, published) == settings(published), (task, published)


# --- learning ---


@pytest.mark.slow
def test_bandit_is_learned():
    config = reppo.Config(
        env="probe/action-continuous", num_envs=64, num_steps=16, num_epochs=4, num_minibatches=4,
        total_timesteps=150 * 1024, vmin=-3.0, vmax=1.0, hidden=(32,), critic_width=32,
        learning_rate=1e-3, normalize_obs=False,
    )  # fmt: skip
    assert config.num_updates * config.num_epochs * config.num_minibatches <= 3000
    state = jax.jit(reppo.make_train(config))(jax.random.key(0))["state"]
    algo = tiny.build("reppo", config)
    action = algo.act(algo.policy_of(state), jnp.ones((1, 1)), jax.random.key(0), True)
    assert abs(action[0, 0] - 0.5) < 0.1


def point_mass():
    """x' = x + a / 2, reward -x^2, from x in [-2, 2], for 32 steps."""

    def reset(key):
        obs = jax.random.uniform(key, (1,), minval=-2.0, maxval=2.0)
        return obs, obs

    def step(key, state, action):
        obs = state + 0.5 * jnp.clip(action, -1.0, 1.0)
        return obs, obs, -(obs[0] ** 2), False, {}

    return RawEnv(reset, step, 1, (1,), 1, False, 32, "fresh")


@pytest.mark.slow
def test_point_mass_is_brought_to_rest():
    """95 % of the way from doing nothing to the best policy, a = -2 x; median of 5 seeds."""
    config = reppo.Config(
        env="test_reppo_update:point_mass", num_envs=32, num_steps=16, num_epochs=4,
        num_minibatches=4, total_timesteps=100_000, gamma=0.95, vmin=-50.0, vmax=10.0,
        hidden=(64, 64), critic_width=64, dual_lr_mult=3.0,
    )  # fmt: skip
    keys = jax.vmap(jax.random.key)(jnp.arange(5))
    states = jax.jit(jax.vmap(reppo.make_train(config)))(keys)["state"]
    algo = tiny.build("reppo", config)
    start = jnp.linspace(-2.0, 2.0, 41)[:, None]

    def play(act):
        def step(obs, _):
            obs = obs + 0.5 * jnp.clip(act(obs), -1.0, 1.0)
            return obs, -(obs[:, 0] ** 2)

        return jax.lax.scan(step, start, length=32)[1].sum(0).mean()

    def learned_by(state):
        policy = algo.policy_of(state)
        return play(lambda obs: algo.act(policy, obs, jax.random.key(0), True))

    learned = np.median(jax.vmap(learned_by)(states))
    best, idle = play(lambda obs: -2.0 * obs), play(jnp.zeros_like)
    assert (learned - idle) / (best - idle) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="hours on a CPU")
def test_cartpole_is_balanced():
    pytest.importorskip("mujoco_playground")
    keys = jax.random.key(0)[None]
    config = reppo.config_for("CartpoleBalance", "dmc_small", total_timesteps=10_000_000)
    state = jax.jit(jax.vmap(reppo.make_train(config)))(keys)["state"]
    algo = tiny.build("reppo", config)
    env = envs.make("CartpoleBalance", 64, stagger=False, reset_mode="cached")
    policies = jax.vmap(algo.policy_of)(state)
    returns, _ = evaluation.evaluate(algo.act, policies, env, jax.random.key(1)[None])
    assert returns.mean() > 950
