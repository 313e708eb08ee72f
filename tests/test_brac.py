"""Behaviour regularised actor-critic: divergences, targets, multipliers, clones, updates."""

import json
import math
import re
import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

import envs
from algos import brac, common
from algos.launch import cli, datasets, policies, rundir
from algos.launch.program import row_bytes
from algos.launch.rows import make_rows

# In one worker, so that updates are compiled once.
pytestmark = pytest.mark.xdist_group("test_brac")

assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
config_of = partial(tiny.config_of, "brac")


def gaussian(mean, std, n=1):
    """A policy of one action, the same in n states."""
    broadcast = lambda x: jnp.full((n, 1), x, jnp.float32)
    return common.TanhGaussian(broadcast(mean), broadcast(std))


# --- maximum mean discrepancy ---


def test_mmd_by_hand():
    x = jax.random.uniform(jax.random.key(0), (4, 3, 2), minval=-1.0)
    y = jax.random.uniform(jax.random.key(1), (4, 3, 2), minval=-1.0)
    assert_close(brac.squared_mmd(x, x), 0.0)
    apart = jnp.ones((4, 3, 2)) * 0.5
    assert_close(brac.squared_mmd(apart, -apart), 2 * (1 - math.exp(-0.1)))
    assert_close(brac.squared_mmd(x, y), brac.squared_mmd(y, x))
    assert (brac.squared_mmd(x, y) > 0).all()
    assert brac.squared_mmd(x, y).shape == (3,)


def test_mmd_of_one_distribution_is_biased():
    """Draws are compared with themselves too: 2 (1 - E k) / 4 for uniform laws, h = 2 / 20."""
    x, y = jax.random.uniform(jax.random.key(0), (2, 4, 200_000, 1), minval=-1.0, maxval=1.0)
    h = 2 / 20
    expected = (1 - 2 * (h - 1 + math.exp(-h)) / h**2) / 2
    assert_close(expected, 0.016258, rtol=1e-4)
    assert_close(brac.squared_mmd(x, y).mean(), expected, rtol=0, atol=2e-4)


# --- Kullback-Leibler divergence ---

KL = math.log(0.8 / 0.5) + (0.25 + 0.09) / 1.28 - 0.5  # of N(0.3, 0.5) from N(0, 0.8)


def estimated_kl(policy, clone, draws=brac.NUM_DRAWS):
    noise = jax.random.normal(jax.random.key(0), (draws, *policy.mean.shape))
    return brac.kl_estimate(policy, clone, policy.sample(noise))


def test_kl_is_that_of_the_gaussians():
    assert_close(KL, 0.235629, rtol=1e-5)
    estimate = estimated_kl(gaussian(0.3, 0.5, 100_000), gaussian(0.0, 0.8, 100_000))
    assert estimate.shape == (100_000,)
    assert_close(estimate.mean(), KL, rtol=0, atol=0.01)
    same = gaussian(0.3, 0.5, 100_000)
    assert_close(estimated_kl(same, same).mean(), 0.0, rtol=0, atol=0.005)


def test_saturated_draws_look_further_away():
    """The clone's density is that of the clipped action, and passes no gradient to the draw."""
    u = jnp.full((1, 1, 1), 5.0)
    policy = gaussian(4.0, 1.0)
    stored = policy.log_prob(jnp.full((1, 1), math.atanh(0.999)))
    assert_close(
        brac.kl_estimate(policy, policy, u), policy.log_prob(u)[0] - stored, rtol=1e-3, atol=1e-3
    )
    of_clone = lambda u: brac.given_log_prob(policy, jnp.tanh(u)).sum()
    assert_close(jax.grad(of_clone)(u), 0.0)
    assert np.abs(jax.grad(of_clone)(jnp.full((1, 1, 1), 1.0))).min() > 0.1


@pytest.mark.parametrize("action", [-1.0, 1.0])
def test_density_on_the_bounds_is_finite(action):
    policy = gaussian(0.3, 0.5)
    inside = brac.given_log_prob(policy, jnp.full((1, 1), 0.999 * action))
    assert np.isfinite(inside).all()
    assert_close(brac.given_log_prob(policy, jnp.full((1, 1), action)), inside, rtol=1e-4)


# --- dual divergences ---


def test_dual_kl_by_hand():
    zero, one = jnp.zeros(1), jnp.full(1, math.log(math.e - 1))
    assert_close(
        brac.dual_divergence("dual_kl", zero, zero), math.log(math.log(2)) + 1 - math.log(2)
    )
    assert_close(brac.dual_divergence("dual_kl", one, one), 0.0)


def test_dual_kl_is_greatest_at_the_ratio():
    a = np.linspace(-8, 8, 20_001)
    p, b = stats.norm.pdf(a, 0.3, 0.5), stats.norm.pdf(a, 0.0, 0.8)
    ratio = np.log(np.expm1(np.clip(p / b, 1e-12, None)))

    def bound(judged):
        with jax.enable_x64(True):
            judged = jnp.asarray(judged, jnp.float64)
            own = np.asarray(brac.dual_divergence("dual_kl", judged, jnp.zeros(())))
            given = np.asarray(brac.dual_divergence("dual_kl", jnp.zeros(()), judged))
        constant = math.log(math.log(2) + 1e-8) + 1 - math.log(2)
        # the two terms apart: log h(a) - log h(0) under p, and h(0) - h(a) under b
        own, given = own - constant, given - constant
        return np.trapezoid(own * p + given * b, a) + constant

    assert_close(bound(ratio), KL, rtol=0, atol=2e-6)
    for bump in (0.3 * np.sin(a), 0.2 * np.ones_like(a), -0.1 * a):
        assert bound(ratio + bump) < KL - 1e-4


@pytest.mark.parametrize(("norm", "penalty"), [(3.0, 20.0), (0.5, 0.0)])
def test_gradient_penalty_of_a_linear_critic(norm, penalty):
    direction = jnp.array([0.6, 0.8])
    own, given = jax.random.uniform(jax.random.key(0), (2, 5, 2), minval=-1.0)

    def loss(weights, between):
        weight = jnp.full((5, 1), between)
        return brac.gradient_penalty(lambda action: action @ weights, own, given, weight)

    for between in (0.0, 0.3, 1.0):
        assert_close(loss(norm * direction, between), penalty)
        expected = 20.0 * direction if penalty else 0.0 * direction
        assert_close(jax.grad(loss)(norm * direction, between), expected)


def test_slopes_are_taken_between_the_two_actions():
    own, given = jnp.array([[0.0]]), jnp.array([[1.0]])
    slope = lambda weight: brac.gradient_penalty(
        lambda action: (action[:, 0] ** 2) * 2, own, given, jnp.array([[weight]])
    )
    assert_close([slope(0.0), slope(0.5), slope(1.0)], [0.0, 5.0, 45.0])  # slopes 0, 2, 4


def test_wasserstein_of_two_points():
    own, given = jnp.array([0.4]), jnp.array([-0.3])
    assert_close(brac.dual_divergence("wasserstein", own, given), 0.7)


# --- targets and losses ---


def test_mix():
    value = jnp.array([[1.0], [3.0]])
    assert_close([brac.mix(value, w)[0] for w in (1.0, 0.75, 0.0)], [1.0, 1.5, 3.0])


@pytest.mark.parametrize(("min_weight", "target"), [(1.0, 10.9), (0.75, 11.395)])
def test_targets_by_hand(min_weight, target):
    value = brac.mix(jnp.array([[10.0, 10.0], [12.0, 12.0]]), min_weight)
    step = jnp.ones(2), jnp.array([False, True])  # reward, terminated
    targets = lambda value: brac.td_target(*step, value, 0.99)
    assert_close(targets(value), [target, 1.0])
    assert_close(targets(value.at[1].set(jnp.nan)), [target, 1.0])  # nothing of it enters
    gradient = jax.grad(lambda value: targets(value).sum())(value)
    assert_close(gradient, 0.0)


def test_critics_share_one_loss():
    value, target = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, 0.0])
    assert_close(brac.critic_loss(value, target), (0 + 4) / 2 + (4 + 16) / 2)


def test_policy_loss_by_hand():
    value, log_prob = jnp.array([1.0, 3.0]), jnp.array([0.5, -0.5])
    loss = partial(brac.policy_loss, value, log_prob, jnp.array([0.2, 0.4]))
    assert_close(loss(0.1, 2.0, False), 2.0 * 0.3 - 2.0)
    assert_close(loss(0.1, 2.0, True), 2.0 * 0.3)
    assert_close(jax.grad(lambda t, a: loss(t, a, False), (0, 1))(0.1, 2.0), 0.0)


# --- multipliers ---


@pytest.mark.parametrize("surplus", [0.5, -0.5])
def test_multipliers_follow_what_they_hold(surplus):
    """Descent raises alpha with the divergence, and lowers the temperature with the entropy."""
    alpha = lambda alpha: brac.alpha_loss(alpha, jnp.full(3, 0.2 + surplus), 0.2)
    temperature = lambda t: brac.temperature_loss(t, jnp.full(3, 1.0 - surplus), -1.0)
    assert_close(jax.grad(alpha)(1.0), -surplus)
    assert_close(jax.grad(temperature)(1.0), surplus)


@pytest.mark.parametrize(
    ("x", "high", "slope", "passed"),
    [
        *[(-0.1, 500.0, 1.0, 0.0), (-0.1, 500.0, -1.0, -1.0), (0.0, 500.0, 1.0, 0.0)],
        *[(500.0, 500.0, 1.0, 1.0), (500.0, 500.0, -1.0, 0.0), (500.2, 500.0, 1.0, 1.0)],
        *[(0.0, math.inf, 1.0, 0.0), (0.0, math.inf, -1.0, -1.0), (7.0, math.inf, 1.0, 1.0)],
    ],
)
def test_a_multiplier_outside_its_range_can_come_back(x, high, slope, passed):
    assert_close(jax.grad(brac.bounded)(jnp.float32(x), slope, high), passed)


# --- an update ---

CLONED = {"divergence": "kl", "behavior": "clones"}


@cache
def update_of(config):
    """A compiled update of one seed: state, rows, *clone -> state, metrics."""
    return jax.jit(tiny.build("brac", config).update)


def first_state(config, seed=0):
    return tiny.build("brac", config).init(jax.random.key(seed))


def rows_of(seed=0, n=64):
    dataset = tiny.transitions(n, seed=seed)
    columns = dataset._asdict() | {"clone": None}
    return brac.Batch(*(jax.tree.map(jnp.asarray, columns[name]) for name in brac.Batch._fields))


def actor_of(config, seed):
    """Parameters of a policy that is nobody's."""
    actor = brac.Actor(config, 1)
    return actor.init(jax.random.key(seed), jnp.zeros((1, 4)))


def shifted(params, by=1.0):
    return jax.tree.map(lambda x: x + by, params)


def test_what_is_trained():
    """The rest has no optimiser: test_brac_update.py has steps of all."""
    multipliers = {"train_alpha": True, "target_divergence": 0.1, "train_temperature": True}
    own = {"dual_kl": {"divergence"}, "kl": set()}
    for divergence, also in own.items():
        clone = "clones" if divergence == "kl" else ""
        config = partial(config_of, divergence=divergence, behavior=clone)
        assert first_state(config()).opt_state.keys() == {"critic", "actor", *also}
        trained = first_state(config(**multipliers)).opt_state.keys()
        assert trained == {"critic", "actor", "alpha", "temperature", *also}


def test_targets_start_as_copies():
    state = first_state(config_of())
    tiny.assert_same(state.target_params, {"critic": state.params["critic"]})


@pytest.mark.filterwarnings("ignore:divergence=none")
def test_warm_policies_see_no_critic():
    """Two gradient steps an update, steps 0 to 2 are warm: of the second update one is not."""
    config = config_of(divergence="none", gradient_steps=2, warm_start=2)
    state, update = first_state(config), update_of(config)
    other = state._replace(params=state.params | {"critic": shifted(state.params["critic"])})
    after, _ = update(state, rows_of())
    tiny.assert_same(after.params["actor"], state.params["actor"])  # and there is no divergence
    tiny.assert_same(update(other, rows_of())[0].params["actor"], state.params["actor"])
    later, _ = update(after, rows_of())
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), later.params, state.params)["actor"]
    # Adam's step for one gradient after three of zero; with two it would be longer.
    step = 0.1 / (1 - 0.9**4) / math.sqrt(0.001 / (1 - 0.999**4)) * config.learning_rate
    assert_close(max(jax.tree.leaves(moved)), step, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:warm_start=")
def test_the_clone_is_what_the_policy_is_drawn_to():
    """A policy that is its clone's copy feels nothing on average; another one moves to it."""
    config = config_of(**CLONED, gradient_steps=32, warm_start=10**9, learning_rate=3e-3)
    clone = actor_of(config, 7)
    state, update = first_state(config), update_of(config)
    first = update(state, rows_of(), clone)[1]["losses/divergence"]
    for _ in range(10):
        state, metrics = update(state, rows_of(), clone)
    assert metrics["losses/divergence"] < 0.2 * first
    start = first_state(config)
    without = start._replace(params=start.params | {"alpha": jnp.float32(0.0)})
    after, _ = update(without, rows_of(), clone)
    tiny.assert_same(after.params["actor"], start.params["actor"])
    copy = start._replace(params=start.params | {"actor": clone})
    _, metrics = update(copy, rows_of(), clone)
    assert abs(metrics["losses/divergence"]) < 0.2 * first


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["mmd", "wasserstein", "none"])
def test_other_divergences_run(divergence):
    config = config_of(divergence=divergence, behavior="clones" if divergence == "mmd" else "")
    clone = (actor_of(config, 7),) if config.cloned else ()
    state, metrics = update_of(config)(first_state(config), rows_of(), *clone)
    assert metrics["health/finite"]
    assert ("divergence" in state.params) == (divergence == "wasserstein")
    assert (metrics["losses/divergence"] == 0.0) == (divergence == "none")


@pytest.mark.parametrize("value_penalty", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_the_penalty_of_the_next_state(value_penalty):
    """A larger weight lowers the targets if, and only if, the value is penalised."""
    targets = []
    for alpha in (0.0, 3.0):
        config = config_of(**CLONED, gradient_steps=1, alpha=1.0, value_penalty=value_penalty)
        state = first_state(config)
        state = state._replace(params=state.params | {"alpha": jnp.float32(alpha)})
        metrics = update_of(config)(state, rows_of(), actor_of(config, 7))[1]
        targets.append(metrics["losses/target"])
    assert (targets[1] < targets[0] - 0.1) == bool(value_penalty)


def test_max_q_plays_the_preferred_draw():
    config = config_of()
    algo = tiny.build("brac", config)
    policy = algo.policy_of(first_state(config))
    obs = jax.random.normal(jax.random.key(0), (6, 4))
    key = jax.random.key(1)
    actor, critic = brac.Actor(config, 1), brac.Critic(config, 2)
    distribution = actor.apply(policy["actor"], obs)
    noise = jax.random.normal(key, (10, *distribution.mean.shape))
    draws = jnp.tanh(distribution.sample(noise))
    value = np.array([critic.apply(policy["critic"], obs, a)[0] for a in draws])
    expected = np.asarray(draws)[value.argmax(0), np.arange(6)]
    assert_close(algo.further["max_q"](policy, obs, key, True), expected)
    assert_close(algo.act(policy, obs, key, True), jnp.tanh(distribution.mean))


# --- clones ---


@pytest.fixture
def clones(tmp_path):
    return tiny.write_clones(tmp_path / "clones")


def test_every_seed_takes_its_own_clone(clones):
    config = config_of(divergence="kl", behavior=str(clones))
    rows, own = tiny.build("brac", config).data(np.array([4, 3, 4]))
    assert len(rows) == len(own) == 1
    kernel = lambda seed: jax.tree.leaves(actor_of(config, seed))[1]
    for i, seed in enumerate((4, 3, 4)):
        np.testing.assert_array_equal(jax.tree.leaves(own[0])[1][i], kernel(seed))


def test_rows_of_a_program_have_clones_and_share_a_dataset(clones):
    config = config_of(divergence="kl", behavior=str(clones))
    program, keys, hparams = tiny.program_of("brac", config, (3, 4))
    rows, clone = program.data
    assert rows.obs.sharding.is_fully_replicated
    assert {x.shape[0] for x in jax.tree.leaves(clone)} == {2}
    assert rows.clone is None
    assert sum(x.nbytes for x in jax.tree.leaves(rows)) == 64 * (4 * (4 + 1 + 1 + 4 + 1) + 1)
    assert row_bytes(clone) == 4 * (4 * 8 + 8 + 8 * 2 + 2)  # the weights of a clone
    state = jax.eval_shape(program.init, keys, hparams)
    jax.eval_shape(program.train, state, hparams, jnp.int32(1), rows, clone)


@pytest.mark.parametrize(
    ("changes", "seeds", "message"),
    [
        ({"behavior": "nowhere"}, [3], "nowhere is not a run directory"),
        ({}, [3, 5], r"has no seed 5 but \[3, 4\]: clone the same seeds"),
        ({"hidden": (16,)}, [3], r"has hidden=\[8\], the policy \[16\]: make them equal"),
        ({"env": "pendulum"}, [3], "is of bc on tiny:balance: give a run of bc on"),
    ],
)
def test_missing_and_foreign_clones_are_named(clones, changes, seeds, message):
    config = config_of(**{"divergence": "kl", "behavior": str(clones)} | changes)
    env = envs.make(config.env, 1)
    with pytest.raises(ValueError, match=message):
        datasets.load_clones(config.behavior, env, config.hidden, seeds)


def test_clones_of_a_sweep_or_of_dead_seeds_are_refused(clones):
    load = partial(datasets.load_clones, str(clones), envs.make("tiny:balance", 1), (8,))
    path = clones / "policy_s001.npz"
    with np.load(path) as file:
        dead = {k: np.full_like(x, np.nan) for k, x in file.items() if k != "__meta__"}
    rundir.save_arrays(path, dead, {})
    load([3])
    with pytest.raises(ValueError, match=r"policy_s001\.npz is of a dead seed"):
        load([3, 4])
    path = clones / "config.json"
    saved = json.loads(path.read_text())
    saved["rows"]["seeds"] = [3, 3]
    rundir.write_json(path, saved)
    with pytest.raises(ValueError, match="has several policies of each seed, for it is a sweep"):
        load([3])


def test_the_clone_of_a_seed_is_read_once(clones, monkeypatch):
    read, read_policy = [], policies.read_policy
    monkeypatch.setattr(
        policies, "read_policy", lambda path: read.append(path) or read_policy(path)
    )
    env = envs.make("tiny:balance", 1)
    datasets.load_clones(str(clones), env, (8,), np.array([3, 4, 3, 4]))
    assert [path.name for path in read] == ["policy_s000.npz", "policy_s001.npz"]


def test_a_clone_that_was_not_finished_is_named(clones):
    (clones / "policy_s001.npz").unlink()
    with pytest.raises(ValueError, match=r"policy_s001\.npz does not exist"):
        datasets.load_clones(str(clones), envs.make("tiny:balance", 1), (8,), [3, 4])


# --- configuration ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ""}, r"dataset='': give --dataset PATH"),
        (
            {"divergence": "kl"},
            r"behavior='': give --behavior RUN_DIR of bc.py, or --preset dual",
        ),
        ({"gradient_steps": 0}, "gradient_steps=0: it should be greater than 0"),
        ({"num_critics": 0}, "num_critics=0: it should be greater than 0"),
        ({"divergence_steps": 0}, "divergence_steps=0: it should be greater than 0"),
        ({"behavior": "clones"}, "dual_kl uses no clone"),
        ({"train_alpha": True}, "target_divergence=0: it has to be positive with --train-alpha"),
        ({"target_divergence": 0.1}, "target_divergence=0.1: .*, and 0 without it"),
        ({"warm_start": -(2**31)}, "warm_start=-2147483648: it should be less than"),
        ({"train_alpha": True, "divergence": "none"}, "divergence=none: leave --train-alpha out"),
        ({"env": "cartpole"}, "discrete actions"),
    ],
)
def test_bad_input_is_one_error(changes, message):
    with pytest.raises(ValueError, match=message):
        brac.make_train(config_of(**changes))


def test_a_run_whose_policy_never_sees_a_critic_is_warned_of():
    """Two updates of 32 gradient steps, numbers 0 to 63: the last one is warm, or is not."""
    steps = {"gradient_steps": 32, "total_timesteps": 50}
    with pytest.warns(UserWarning, match="warm_start=63: .* in all 64 gradient steps"):
        common.check(config_of(**steps, warm_start=63))
    with pytest.warns(UserWarning, match="divergence=none has no loss in a warm start"):
        common.check(config_of(**steps, warm_start=0, divergence="none"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        common.check(config_of(**steps, warm_start=62))
        common.check(config_of(**steps, warm_start=-1, divergence="none"))
        common.check(config_of(**steps, warm_start=0, divergence="none", temperature=0.1))


@pytest.mark.parametrize(
    ("argv", "sweep"),
    [
        (["--alpha", "0.1", "1"], ("alpha=0.1,1",)),
        (["--alpha", "0.1"], ()),
        (["--alpha", "0.1,1"], ("alpha=0.1,1",)),
        (["--alpha=0.1,1", "2"], ("alpha=0.1,1,2",)),
        (
            ["--alpha", "0", "1", "--critic_lr", "1e-3", "1e-4"],
            ("alpha=0,1", "critic_lr=1e-3,1e-4"),
        ),
        (["--alpha", "1", "3", "--sweep", "gamma=0.9,0.99"], ("alpha=1,3", "gamma=0.9,0.99")),
        (["--sweep=gamma=0.9,0.99", "--alpha", "1", "3"], ("gamma=0.9,0.99", "alpha=1,3")),
        (["--sweep", "gamma=0.9,1", "--sweep=alpha=1,3"], ("gamma=0.9,1", "alpha=1,3")),
        (["--alpha=0.1"], ()),
        (["--hidden", "16", "16", "--seed", "3"], ()),
    ],
)
def test_several_values_of_a_number_are_a_sweep(argv, sweep):
    argv = ["--dataset", "any", "--preset", "dual", *argv]
    config, chosen = cli.parse("brac", brac.Config, brac.PRESETS, argv)
    assert chosen.sweep == sweep
    if not sweep:
        assert (config.alpha, config.hidden) in ((0.1, (200, 200)), (10.0, (16, 16)))


@pytest.mark.parametrize("again", [["--alpha", "5"], ["--alpha=5"], ["--alpha", "5", "7"]])
def test_a_field_that_is_swept_is_given_once(again):
    with pytest.raises(ValueError, match="--alpha is given twice"):
        cli.parse("brac", brac.Config, brac.PRESETS, ["--alpha", "1", "3", *again])


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("alpha", (-1.0, 1000.0)),
        ("min_weight", (-0.1, 3.0)),
        *[(field, (-1.0,)) for field in ("critic_lr", "multiplier_lr", "temperature")],
        ("value_penalty", (-3.0,)),
        ("target_divergence", (-1.0,)),
        ("hidden", ((0,),)),
        ("critic_hidden", ((0,),)),
    ],
)
def test_values_out_of_bounds_are_refused(field, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{field}={value}: it should be ")):
            common.check(config_of(**{field: value}))
        if field in brac.TRACEABLE:
            chosen = cli.Launch(sweep=(f"{field}=0.5,{value}",))
            with pytest.raises(ValueError, match=f"{field}={value}: it should be "):
                make_rows(chosen, config_of(), brac.TRACEABLE)
