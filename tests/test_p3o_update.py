"""P3O: replay, updates, networks, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats
from tiny import assert_allclose

from algos import common, p3o
from algos.launch import program

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_p3o")


def config_of(**changes):
    return tiny.config_of("p3o", **changes)


# --- replay ---


@pytest.mark.parametrize("mean", [2.0, 0.5])
def test_replay_counts_are_poisson_numbers(mean):
    config = config_of(total_timesteps=10_029 * 32, replay_ratio=mean, replay_fraction=0.01)
    assert (config.num_slots, config.warmup_slots) == (100, 30)
    counts = p3o.replay_counts(config)
    assert counts.shape == (10_029,)
    assert not counts[:29].any()
    counts = counts[29:]
    error = 4 * math.sqrt(mean / len(counts))
    assert abs(counts.mean() - mean) < error
    assert abs(counts.var() - mean) < 3 * error
    assert abs((counts == 0).mean() - math.exp(-mean)) < 4 * 0.005
    assert (counts > 8).mean() < 1e-3


def test_warm_up_waits_for_two_rollouts():
    slots = {0.17: 1, 0.34: 2, 0.5: 2, 1.0: 2}
    for fraction, warmup_slots in slots.items():
        config = config_of(replay_fraction=fraction, sample_mult=1)
        assert config.warmup_slots == warmup_slots


@pytest.mark.parametrize(
    ("num_updates", "num_slots", "warmup_slots"),
    [(1000, 29, 9), (350, 10, 3), (175, 6, 2), (40, 6, 2), (4, 4, 2), (2, 2, 2), (1, 1, 1)],
)
def test_short_runs_keep_enough_rollouts(num_updates, num_slots, warmup_slots):
    """0.0286 of a run's rollouts, at least 6 for 6 segments of each environment, and no more
    than there are; 0.3 of these are filled before they are used, at least 2.
    """
    sizes = {"replay_fraction": 0.0286, "warmup_fraction": 0.3, "sample_mult": 6}
    config = config_of(total_timesteps=num_updates * 32, **sizes)
    assert (config.num_slots, config.warmup_slots) == (num_slots, warmup_slots)


def test_a_short_run_replays():
    config = config_of(total_timesteps=3 * 32, replay_fraction=0.0286, sample_mult=6)
    states, metrics = states_of(config, 3)
    assert states[0].replay.reward.shape == (3 * config.num_envs, config.num_steps)
    assert [int(m["charts/replay_filled"]) for m in metrics] == [1, 2, 3]
    assert sum(m["replay/count"] for m in metrics) > 0


def test_sampled_segments():
    """Row i is of environment i mod N; filled rollouts have equal chances, the others none."""
    slots, num_envs, filled, mult = 5, 3, 4, 2
    slot, column = jnp.divmod(jnp.arange(slots * num_envs), num_envs)
    keys = jax.random.split(jax.random.key(0), 500)
    sample = lambda key: p3o.sample_segments((slot, column), key, filled, num_envs, mult)
    drawn, columns = jax.jit(jax.vmap(sample))(keys)
    np.testing.assert_array_equal(columns, [list(range(num_envs)) * mult] * 500)
    for i in range(mult * num_envs):
        counts = np.bincount(drawn[:, i], minlength=slots)
        assert counts[filled:].sum() == 0
        assert stats.chisquare(counts[:filled]).pvalue > 1e-3
    assert (drawn[:, 0] != drawn[:, num_envs]).any()
    assert (drawn[:, 0] != drawn[:, 1]).any()


def states_of(config, num_updates, change=lambda state: state):
    """States after 0 to `num_updates` updates from seed 0, and the metrics of each update."""
    algo = tiny.build("p3o", config)
    state = change(jax.jit(algo.init)(jax.random.key(0)))
    update = jax.jit(algo.update)
    states, metrics = [state], []
    for _ in range(num_updates):
        state, measured = update(state)
        states.append(state)
        metrics.append(measured)
    return states, metrics


COUNTER = {"env": "tiny:counter_discrete", "normalize_obs": False, "normalize_reward": False}


def test_replay_is_a_ring_of_rollouts():
    config = config_of(**COUNTER, replay_fraction=0.5, sample_mult=2)
    states, _ = states_of(config, 5)
    N, T = config.num_envs, config.num_steps
    assert config.num_slots == 3

    def slot(update, i):
        return jax.tree.map(lambda x: x[i * N : (i + 1) * N], states[update].replay)

    rollouts = [slot(update + 1, update % 3) for update in range(5)]
    for i, update in enumerate((3, 4, 2)):
        tiny.assert_same(slot(5, i), rollouts[update])
    assert not np.asarray(states[1].replay.obs[N:]).any()
    for k, rollout in enumerate(rollouts):
        obs, done = np.asarray(rollout.obs), np.asarray(rollout.done)
        assert obs.shape == (N, T + 1, 2)
        # time passes within a row, and a new episode begins after an end
        np.testing.assert_array_equal(obs[:, 1:, 0], np.where(done, 0, obs[:, :-1, 0] + 1))
        if k + 1 < len(rollouts):
            np.testing.assert_array_equal(obs[:, -1], rollouts[k + 1].obs[:, 0])
    np.testing.assert_array_equal(states[5].obs, rollouts[4].obs[:, -1])


def test_segments_are_what_the_agent_saw():
    """beta is the policy that acted, at what it saw; only a time limit is bootstrapped."""
    config = config_of(**COUNTER, gamma=0.9)
    (before, after), _ = states_of(config, 1)
    N = config.num_envs
    segments = jax.tree.map(lambda x: x[:N], after.replay)
    network = p3o.ActorCritic(config, (2,), 2, True)
    policy, value = network.apply(before.params, segments.obs)
    assert_allclose(segments.policy.logits, policy.logits[:, :-1])
    true_successor = segments.obs[:, :-1] + jnp.array([1.0, -1.0])
    _, value = network.apply(before.params, true_successor)
    assert segments.done.any()
    assert (abs(value) > 0.01).all()
    assert_allclose(segments.reward, np.where(segments.done, 1 + 0.9 * value, 1.0))


def test_a_failure_is_not_bootstrapped():
    config = config_of(**COUNTER | {"env": "probe/value"})
    after = states_of(config, 1)[0][1]
    segments = jax.tree.map(lambda x: x[: config.num_envs], after.replay)
    assert segments.done.all()
    assert_allclose(segments.reward, np.ones_like(segments.reward))


def test_normalised_segments():
    """Observations and rewards are stored as the statistics of their time scale them."""
    config = config_of(env="tiny:counter_discrete", replay_fraction=0.5)
    plain = config_of(**COUNTER, replay_fraction=0.5)
    N = config.num_envs
    states, raw_states = (states_of(c, 2)[0] for c in (config, plain))
    first, raw, seen = (
        jax.tree.map(lambda x: x[i * N : (i + 1) * N], run[2].replay)  # noqa: B023
        for i, run in ((0, raw_states), (1, raw_states), (1, states))
    )
    stats, scale = states[1].obs_stats, states[1].reward_scale
    rows = first.obs[:, :-1].reshape(-1, 2)
    assert_allclose(stats.mean, rows.mean(0))
    assert_allclose(stats.var, rows.var(0))
    assert_allclose(seen.obs, stats.normalize(raw.obs))
    # Every reward is 1: the discounted returns that the scale has seen, by hand.
    returns, total = [], np.zeros(N)
    for done in np.asarray(first.done).T:
        total = 1 + config.gamma * total
        returns.append(total)
        total = np.where(done, 0.0, total)
    assert_allclose(scale.stats.var, np.var(returns), rtol=1e-4)
    factor = scale.factor()
    assert abs(factor - 1) > 0.05
    network = p3o.ActorCritic(config, (2,), 2, True)
    successor = stats.normalize(raw.obs[:, :-1] + jnp.array([1.0, -1.0]))
    value = config.gamma * network.apply(states[1].params, successor)[1]
    assert seen.done.any()
    assert_allclose(seen.reward, factor + np.where(seen.done, value, 0.0))


def test_what_is_not_written_yet_is_never_replayed():
    """Of a replay full of NaN only rollouts that were written are used."""
    spoil = lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    change = lambda state: state._replace(replay=jax.tree.map(spoil, state.replay))
    config = config_of(
        **COUNTER, replay_fraction=1.0, warmup_fraction=0.3, replay_ratio=20.0, anneal_lr=False
    )
    states, metrics = states_of(config, 4, change)
    assert metrics[1]["replay/count"] > 5
    assert common.all_finite((states[4].params, metrics))
    assert_allclose([m["charts/learning_rate"] for m in metrics], [config.learning_rate] * 4)


def test_the_newest_rollout_is_replayed_like_the_others():
    """Of two rollouts that fill the replay, told apart by their rewards, each is half of it."""
    config = config_of(
        **COUNTER, replay_fraction=1 / 3, sample_mult=2, replay_ratio=20.0, learning_rate=0.0
    )
    assert config.num_slots == 2
    N, algo = config.num_envs, tiny.build("p3o", config)
    update = jax.jit(algo.update)
    state, _ = update(jax.jit(algo.init)(jax.random.key(0)))
    spoiled = state.replay._replace(reward=state.replay.reward + 100.0)
    state, metrics = update(state._replace(replay=spoiled))
    network = p3o.ActorCritic(config, (2,), 2, True)

    def loss_of(slot):
        part = jax.tree.map(lambda x: x[slot * N : (slot + 1) * N], state.replay)
        output = network.apply(state.params, part.obs)
        return p3o.replay_loss(*output, part, config)[1]["replay/value_loss"]

    mean = metrics["replay/value_loss"] / metrics["replay/count"]
    share = (mean - loss_of(1)) / (loss_of(0) - loss_of(1))
    assert abs(share - 0.5) < 0.2
    assert metrics["charts/replay_filled"] == 2


def test_every_step_draws_anew():
    """With a minibatch of one segment and nothing learned, a step's loss identifies its segment.

    If all steps of an update drew the same one, their mean loss would be the loss of a segment.
    """
    config = config_of(
        num_envs=1,
        sample_mult=1,
        normalize_obs=False,
        normalize_reward=False,
        learning_rate=0.0,
        replay_ratio=5.0,
        replay_fraction=1.0,
        total_timesteps=20 * 8,
    )
    states, metrics = states_of(config, 20)
    network = p3o.ActorCritic(config, (4,), 2, True)

    @jax.vmap
    def value_loss(segment):
        segment = jax.tree.map(lambda x: x[None], segment)
        output = network.apply(states[0].params, segment.obs)
        return p3o.replay_loss(*output, segment, config)[1]["replay/value_loss"]

    losses = value_loss(states[-1].replay)
    assert np.diff(np.sort(losses)).min() > 1e-6
    counted = [m for m in metrics if m["replay/count"] > 3]
    means = np.array([m["replay/value_loss"] / m["replay/count"] for m in counted])
    assert len(means) > 5
    assert (abs(losses - means[:, None]).min(1) > 1e-6).all()


# --- updates ---


def test_update_by_hand():
    """One step on the rollout, then `count` steps on it again: the replay holds nothing else.

    RMSprop as PyTorch has it: the mean square starts at 0 and epsilon is added to its root.
    """
    config = config_of(
        **COUNTER, replay_fraction=1 / 6, sample_mult=1, replay_ratio=3.0, ent_coef=0.1,
        rms_decay=0.9, rms_eps=1e-3, max_grad_norm=0.3,
    )  # fmt: skip
    assert config.num_slots == config.warmup_slots == 1
    (before, after), (metrics,) = states_of(config, 1)
    network = p3o.ActorCritic(config, (2,), 2, True)
    params, count = before.params, int(metrics["replay/count"])
    assert count > 0
    sums = {}
    square = jax.tree.map(jnp.zeros_like, params)
    rate = config.learning_rate * 6 / 7
    for i in range(1 + count):
        loss = p3o.replay_loss if i else p3o.fresh_loss
        loss_fn = lambda p: loss(*network.apply(p, after.replay.obs), after.replay, config)  # noqa: B023
        grads, aux = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
        norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g: g * min(1.0, 0.3 / norm), grads)  # noqa: B023
        square = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, square, grads)
        params = jax.tree.map(
            lambda p, v, g: p - rate * g / (jnp.sqrt(v) + 1e-3), params, square, grads
        )
        assert norm > 0.3 or i
        aux["replay/grad_norm" if i else "losses/grad_norm"] = norm
        sums |= {name: sums.get(name, 0.0) + x for name, x in aux.items()}
    tiny.assert_close(after.params, params, rtol=1e-3, atol=1e-5)
    for name, total in sums.items():
        assert_allclose(metrics[name], total, rtol=1e-3, atol=1e-4)


def test_first_step_of_the_optimiser():
    """The mean square starts at 0, so a step is ten times the learning rate, as in PyTorch."""
    (before, after), (metrics,) = states_of(config_of(**COUNTER, replay_ratio=0.0), 1)
    square = after.opt_state[1].nu
    rate = float(metrics["charts/learning_rate"])
    step = jax.tree.map(lambda x, y: abs(x - y), before.params, after.params)
    wanted = jax.tree.map(lambda v: rate * 10 * jnp.sqrt(v) / (jnp.sqrt(v) + 1e-5), square)
    tiny.assert_close(step, wanted, rtol=1e-2, atol=1e-6)
    assert metrics["losses/grad_norm"] > 0.5
    assert_allclose(100 * sum(x.sum() for x in jax.tree.leaves(square)), 0.25, atol=1e-5)


def test_schedule_follows_updates():
    config = config_of(learning_rate=1.0, total_timesteps=100 * 32)
    algo = tiny.build("p3o", config)
    update = jax.jit(algo.update)
    state = jax.jit(algo.init)(jax.random.key(0))
    rates = [
        update(state._replace(update=jnp.int32(u)))[1]["charts/learning_rate"] for u in (0, 49, 99)
    ]
    assert_allclose(rates, [100 / 101, 51 / 101, 1 / 101])


def test_nothing_is_replayed_before_the_warm_up_ends():
    """Until then the run is that of A2C; afterwards it is not."""
    config = config_of(replay_fraction=1.0, warmup_fraction=0.6, sample_mult=2)
    assert (config.num_slots, config.warmup_slots) == (6, 4)
    states, metrics = states_of(config, 6)
    counts = np.array([m["replay/count"] for m in metrics])
    np.testing.assert_array_equal(counts, p3o.replay_counts(config))
    np.testing.assert_array_equal([m["charts/replay_steps"] for m in metrics], counts)
    assert not counts[:3].any()
    assert counts.any()
    plain, measured = states_of(dataclasses.replace(config, replay_ratio=0.0), 6)
    assert plain[0].replay is None
    assert not any(name.startswith("replay/") for name in measured[0])
    for update in range(4):
        own, theirs = states[update], plain[update]
        tiny.assert_close((own.params, own.opt_state), (theirs.params, theirs.opt_state))
        np.testing.assert_array_equal(*(jax.random.key_data(x.key) for x in (own, theirs)))
    kernels = [state[6].params["params"]["actor"]["kernel"] for state in (states, plain)]
    assert (kernels[0] != kernels[1]).any()


def test_the_agent_sees_standardised_observations():
    """As it acts in a rollout, and as an exported policy; by statistics of all rollouts before."""
    config = config_of(env="tiny:counter_discrete", replay_fraction=0.5)
    states, _ = states_of(config, 2)
    N, stats = config.num_envs, states[2].obs_stats
    first, second = (
        jax.tree.map(lambda x: x[i * N : (i + 1) * N], states[2].replay)  # noqa: B023
        for i in range(2)
    )
    network = p3o.ActorCritic(config, (2,), 2, True)
    policy, _ = network.apply(states[1].params, second.obs)
    assert_allclose(second.policy.logits, policy.logits[:, :-1], atol=1e-6)
    before = states[1].obs_stats  # a clip at 10 is far away
    raw = second.obs * jnp.sqrt(before.var + 1e-8) + before.mean
    rows = jnp.concatenate([first.obs[:, :-1], raw[:, :-1]]).reshape(-1, 2)
    assert_allclose(stats.mean, rows.mean(0), atol=1e-4)
    assert_allclose(stats.var, rows.var(0), atol=1e-4)

    algo, key = tiny.build("p3o", config), jax.random.key(0)
    act = lambda greedy: algo.act(algo.policy_of(states[2]), rows, key, greedy)
    logits = network.apply(states[2].params, stats.normalize(rows))[0].logits
    np.testing.assert_array_equal(act(True), logits.argmax(-1))
    np.testing.assert_array_equal(
        act(False), (logits + jax.random.gumbel(key, logits.shape)).argmax(-1)
    )


def test_rewards_are_scaled_by_raw_rewards():
    """Every reward of `counter` is 1, also after a rollout whose rewards were scaled."""
    config = config_of(env="tiny:counter_discrete", replay_fraction=0.5)
    states, _ = states_of(config, 2)
    done, scale = states[2].replay.done, common.RewardScale.empty(config.num_envs)
    for i in range(2):
        ended = done[i * config.num_envs : (i + 1) * config.num_envs].T
        scale = scale.add(jnp.ones(ended.shape), ended, config.gamma)
    assert abs(states[1].reward_scale.factor() - 1) > 0.05
    tiny.assert_close(states[2].reward_scale, scale)


# --- networks and configuration ---


def test_atari_network_has_the_published_size():
    config = config_of(hidden=(512,), activation="relu")
    network = p3o.ActorCritic(config, (84, 84, 4), 4, True)
    obs = jnp.zeros((2, 84 * 84 * 4), jnp.uint8)
    params = jax.eval_shape(network.init, jax.random.key(0), obs)
    assert sum(x.size for x in jax.tree.leaves(params)) == 865_413


@pytest.mark.parametrize(
    ("size", "kernels"), [(35, [(9, 16)]), (36, [(64, 32), (512, 64), (576, 32)])]
)
def test_convolutions_follow_the_size_of_the_image(size, kernels):
    """3 x 3 for small images; 8 x 8, 4 x 4 and 3 x 3 from 36 x 36 on, where one pixel is left."""
    torso = p3o.Torso(config_of(hidden=()), (size, size, 1))
    obs = jnp.zeros((2, size * size))
    features, params = jax.eval_shape(torso.init_with_output, jax.random.key(0), obs)
    layers = params["params"]
    assert [layers[f"Dense_{i}"]["kernel"].shape for i in range(len(layers))] == kernels
    assert features.shape == (2, 33 * 33 * 16 if size == 35 else 32)


def test_image_network():
    """Any leading axes; one torso; the step on breakout changes every layer."""
    config = config_of(env="breakout", hidden=(8,), activation="relu", normalize_obs=False)
    (before, after), _ = states_of(config, 1)
    assert after.replay.obs.dtype == bool
    network = p3o.ActorCritic(config, (10, 10, 4), 3, True)
    obs = after.replay.obs
    policy, value = network.apply(after.params, obs)
    assert policy.logits.shape == (*obs.shape[:2], 3)
    assert value.shape == obs.shape[:2]
    single = network.apply(after.params, obs[1, 2])
    assert_allclose(single[1], value[1, 2])
    assert_allclose(single[0].logits, policy.logits[1, 2])
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), before.params, after.params)
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_bytes_are_divided_by_255(dtype):
    """Of an Atari image; numbers that are no bytes, as normalised ones, are taken as they are."""
    network = p3o.ActorCritic(config_of(hidden=(4,)), (84, 84, 4), 4, True)
    obs = jax.random.randint(jax.random.key(1), (84 * 84 * 4,), 0, 256).astype(dtype)
    params = network.init(jax.random.key(0), obs)
    _, state = network.apply(params, obs, capture_intermediates=True)
    out = state["intermediates"]["torso"]["Dense_0"]["__call__"][0]
    kernel = params["params"]["torso"]["Dense_0"]["kernel"].reshape(8, 8, 4, 32)
    patch = obs.reshape(84, 84, 4)[4:12, 8:16] / (255.0 if dtype == jnp.uint8 else 1.0)
    expected = jnp.einsum("hwc,hwcf->f", patch, kernel)
    assert_allclose(out[1, 2], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (4, 2), (8, 4)])
def test_patches_times_a_matrix_are_a_convolution(size, stride):
    x = jax.random.normal(jax.random.key(0), (2, 13, 11, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 5))
    layout = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    out = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", None, None, layout)
    assert_allclose(p3o.patches(x, size, stride) @ kernel.reshape(-1, 5), out, atol=1e-4)


@pytest.mark.parametrize("obs_shape", [(32,), (4, 4, 2)])
def test_initial_weights(obs_shape):
    """Orthogonal: all singular values of a layer are its gain."""
    network = p3o.ActorCritic(config_of(hidden=(8,)), obs_shape, 3, True)
    layers = network.init(jax.random.key(0), jnp.zeros(32))["params"]
    shared = len(obs_shape) == 3
    gains = {"actor": 0.01, "critic": 1.0 if shared else math.sqrt(2)}
    for name, gain in gains.items():
        assert_allclose(jnp.linalg.svd(layers[name]["kernel"])[1], gain)
    torsos = ["torso"] if shared else ["actor_torso", "critic_torso"]
    assert set(layers) == {*gains, *torsos}
    for name in torsos:
        for layer in layers[name].values():
            assert_allclose(jnp.linalg.svd(layer["kernel"])[1], math.sqrt(2), atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "limit", "kl_coef"),
    [([], "ess", "1 - ess"), (["fixed_clip"], 1.0, "1 - ess"), (["no_kl"], "ess", 0.0)],
)
def test_ablations_take_out_one_part(preset, limit, kl_coef):
    """The largest ratio and the weight of the KL, as sums over the replayed minibatches."""
    changes = p3o.PRESETS[preset[0]] if preset else {}
    config = config_of(replay_fraction=1.0, total_timesteps=20 * 32, learning_rate=0.1, **changes)
    metrics = states_of(config, 20)[1]
    total = {k: sum(m[k] for m in metrics) for k in metrics[0] if k.startswith("replay/")}
    count, ess = total["replay/count"], total["replay/ess"]
    assert 0 < ess < 0.99 * count
    known = {"ess": ess, "1 - ess": count - ess, 1.0: count, 0.0: 0.0}
    assert_allclose(total["replay/ratio_limit"], known[limit], atol=1e-4)
    assert_allclose(total["replay/kl_coef"], known[kl_coef], atol=1e-4)


def test_a2c_is_p3o_without_a_replay_buffer():
    states, metrics = states_of(config_of(**p3o.PRESETS["a2c"]), 2)
    assert not jax.tree.leaves(states[-1].replay)
    assert not [name for name in metrics[-1] if name.startswith("replay/")]


def test_bytes_of_the_replay():
    """3 rollouts of 4 environments: 9 observations, 8 actions, logits, rewards and two flags."""
    init = jax.vmap(tiny.build("p3o", config_of()).init)
    replay = jax.eval_shape(init, jax.random.split(jax.random.key(0))).replay
    assert program.row_bytes(replay) == 3 * 4 * (9 * 4 * 4 + 8 * (4 + 2 * 4 + 4 + 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay_fraction": 1.5}, "replay_fraction=1.5: it should be less than or equal to 1"),
        ({"sample_mult": 0}, "sample_mult=0: it should be greater than 0"),
        ({"rms_decay": 1.0}, "rms_decay=1.0: it should be less than 1"),
        ({"max_ratio": -1.0}, "max_ratio=-1.0: it should be greater than or equal to 0"),
        ({"kl_direction": "forward"}, "kl_direction='forward': it should be 'pi_beta' or"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        p3o.make_train(config_of(**changes))


def test_settings_of_the_network():
    """The initial std, and the activation of the hidden layers."""
    obs = jnp.linspace(-2.0, 2.0, 15).reshape(5, 3)
    for activation in ("tanh", "relu"):
        config = config_of(log_std_init=-1.5, activation=activation, hidden=(4,))
        network = p3o.ActorCritic(config, (3,), 2, False)
        params = network.init(jax.random.key(0), obs)
        layers = params["params"]
        policy, value = network.apply(params, obs)
        assert_allclose(policy.log_std, np.full((5, 2), -1.5))
        hidden = getattr(jax.nn, activation)(obs @ layers["critic_torso"]["Dense_0"]["kernel"])
        assert_allclose(value, (hidden @ layers["critic"]["kernel"])[:, 0])


# --- learning ---


@pytest.mark.slow
def test_replay_helps_on_cartpole():
    """Return of the last tenth of the training episodes, with replay and without."""
    returns = {}
    for ratio in (2.0, 0.0):
        config = p3o.config_for("cartpole", total_timesteps=150_000, replay_ratio=ratio)
        train = jax.jit(jax.vmap(p3o.make_train(config)))
        metrics = train(jax.random.split(jax.random.key(0), 4))["metrics"]
        total, count = (metrics[f"episodes/{x}"][:, -60:].sum(1) for x in ("return", "count"))
        returns[ratio] = np.median(total / count)
    assert returns[2.0] > 400
    assert returns[2.0] > returns[0.0] - 20
