"""What every algorithm promises, whatever it does: reproducible, resumable, honest runs.

The launcher's program of a tiny run with two seeds serves most tests here; it compiles once for
each algorithm.
"""

import dataclasses
import json
import math
import typing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    ALGOS,
    ASYMMETRIC,
    GOALS,
    KINDS,
    OFFLINE,
    RANDOM,
    TASKS,
    arrays,
    assert_close,
    assert_same,
    balance,
    build,
    config_of,
    flags_of,
    module_of,
    program_of,
    row,
)

import envs
from algos import common, launch
from algos.launch import evaluation, policies, rundir
from algos.launch.program import Program
from algos.launch.rows import Rows, evaluation_keys
from envs import gymnax


class Lab(NamedTuple):
    name: str
    module: Any
    config: Any
    program: Program
    rows: Rows
    keys: jax.Array

    def start(self):
        """First state of seeds 0 and 1; a new one each time, since training donates it."""
        return self.program.init(self.keys, {})

    def train(self, state, *lengths):
        for length in lengths:
            state, sums = self.program.train(state, {}, jnp.int32(length), *self.program.data)
        return state, sums


# Tests of one algorithm run in one worker, where its program is compiled once.
each_algo = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in ALGOS]


@pytest.fixture(scope="module", params=each_algo)
def lab(request):
    name = request.param
    config = config_of(name)
    program, keys, _ = program_of(name, config)
    rows = Rows(np.arange(2), {}, ["", ""])
    return Lab(name, module_of(name), config, program, rows, keys)


@pytest.fixture(scope="module")
def trained(lab):
    """State after the whole run of 6 updates, and the sums of its metrics."""
    state, sums = lab.train(lab.start(), 6)
    return state, arrays(sums)


# --- seeds ---


def test_same_seed_gives_the_same_bits(lab, trained):
    assert_same(lab.train(lab.start(), 6)[0], trained[0])


def test_seeds_differ_in_parameters(lab, trained):
    policies = lab.program.policies(trained[0])
    for policy in (lab.program.policies(lab.start()), policies):
        kernels = [x for k, x in arrays(policy).items() if "kernel" in k]
        assert kernels
        assert all((x[0] != x[1]).any() for x in kernels)


def test_seeds_differ_in_actions(lab):
    """Two rows that share all but their key: cartpole is deterministic, only actions can differ."""
    if lab.name in OFFLINE:
        pytest.skip("nothing is collected")
    state = lab.start()
    twins = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]) if x.ndim else x, state)
    twins = jax.device_put(twins._replace(key=state.key), jax.tree.map(lambda x: x.sharding, state))
    obs = lab.train(twins, 1)[0].obs
    assert (obs[0] != obs[1]).any(-1).mean() > 0.5


def test_a_row_does_not_depend_on_the_others(lab, trained):
    """Seed 1 in the first row, beside itself, is seed 1 in the second row, beside seed 0."""
    twins = lab.program.init(jnp.stack([lab.keys[1]] * 2), {})
    state, _ = lab.train(twins, 6)
    for i in range(2):
        assert_same(row(state, i), row(trained[0], 1))


@pytest.mark.slow
def test_a_row_of_a_launch_is_the_pure_function_of_its_seed(lab, trained):
    """A run alone, from `make_train`, is a row of the launch in its state and its metrics."""
    train = jax.jit(lab.module.make_train(lab.config))
    result = train(jax.random.key(1), None, *lab.program.data)
    assert_close(result["state"], row(trained[0], 1), rtol=1e-3, atol=1e-4)
    for name, totals in trained[1].items():
        name = name[2:-2]
        metric = result["metrics"][name]
        expected = metric.max() if name.endswith("/max") else metric.sum()
        np.testing.assert_allclose(totals[1], expected, rtol=1e-2, atol=1e-3, err_msg=name)


# --- chunks, checkpoints, compilations ---


def test_chunk_length_changes_nothing(lab, trained):
    assert_same(lab.train(lab.start(), 1, 2, 3)[0], trained[0])


def test_save_load_continue_is_continue(lab, trained, tmp_path):
    state, _ = lab.train(lab.start(), 2)
    rundir.save_arrays(tmp_path / "state.npz", rundir.flatten(state), {"update": 2})
    template = jax.eval_shape(lab.program.init, lab.keys, {})
    loaded, meta = rundir.load_tree(tmp_path / "state.npz", template)
    assert meta == {"update": 2}
    assert_same(loaded, state)
    assert_same(lab.train(loaded, 4)[0], trained[0])


def test_one_compilation_each(lab):
    """What is handed back is, in every type and sharding, what was given: no call compiles anew."""
    kinds = lambda tree: jax.tree.map(lambda x: (x.aval, x.sharding), tree)
    state = lab.start()
    given = kinds(state)
    for length in (1, 2):
        state, _ = lab.train(state, length)
        assert kinds(state) == given
    plays = lab.program.begin(evaluation_keys(lab.rows, 0))
    given = kinds(plays)
    assert kinds(lab.program.play(state, plays, jnp.int32(1))) == given


def evaluated(lab, state, number=0):
    """Returns [R, K] of each policy in an evaluation of this number."""
    plays = lab.program.begin(evaluation_keys(lab.rows, number))
    plays = lab.program.play(state, plays, jnp.int32(2**31 - 1))
    return {name: play.returns for name, play in plays.items()}


def test_evaluation_changes_nothing(lab, trained):
    state, _ = lab.train(lab.start(), 3)
    before = arrays(state)
    first = evaluated(lab, state)
    assert_same(evaluated(lab, state), first)
    assert arrays(state).keys() == before.keys()
    assert all(np.array_equal(x, before[k]) for k, x in arrays(state).items())
    assert_same(lab.train(state, 3)[0], trained[0])


# --- metrics ---


def test_metrics_are_finite_and_named(lab, trained):
    _, sums = trained
    names = {name[2:-2] for name in sums}
    wanted = {"health/finite"}
    if lab.name not in OFFLINE:
        wanted |= {"episodes/count", "episodes/return", "episodes/length", "health/env_nan"}
    if lab.name == "bnpo":  # each brain has its own losses, and no schedule
        wanted |= {"brain0/policy_loss", "brain1/policy_loss"}
    else:
        wanted |= {"losses/policy_loss", "charts/learning_rate"}
    assert names >= wanted
    groups = {name.split("/")[0] for name in names}
    known = {"charts", "episodes", "health", "losses", "ratios", "replay", "brain0", "brain1"}
    assert groups <= known
    assert all(np.isfinite(x).all() for x in sums.values())
    assert (sums["['health/finite']"] == 6).all()


def test_metrics_are_scalars_whatever_the_batch(lab):
    shapes = []
    for size in (4, 8):
        batch = {"batch_size" if lab.name in OFFLINE else "num_envs": size}
        algo = build(lab.name, dataclasses.replace(lab.config, **batch))
        state = jax.eval_shape(algo.init, jax.random.key(0))
        new_state, metrics = jax.eval_shape(algo.update, state, *lab.program.data)
        shapes.append(metrics)
        assert all(x.shape == () for x in metrics.values())
        same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
        assert jax.tree.all(jax.tree.map(same, state, new_state))
    assert shapes[0].keys() == shapes[1].keys()


def test_reward_scaling_leaves_logged_returns_alone(lab, trained):
    if lab.name in OFFLINE:
        pytest.skip("nothing is collected")
    _, sums = trained
    settings = vars(lab.config)
    assert (
        settings.get("normalize_reward")
        or settings.get("reward_scale", 1) != 1
        or settings.get("reward_kind", "env") != "env"
    )
    assert (sums["['episodes/count']"] > 0).all()
    # Cartpole pays 1 for each step.
    np.testing.assert_array_equal(sums["['episodes/return']"], sums["['episodes/length']"])


def test_a_dead_seed_is_reported(lab):
    """By its parameters: those of row 0 are NaN."""
    state = lab.start()
    spoil = lambda x: x.at[0].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x
    shardings = jax.tree.map(lambda x: x.sharding, state.params)
    params = jax.device_put(jax.tree.map(spoil, state.params), shardings)
    _, sums = lab.train(state._replace(params=params), 1)
    np.testing.assert_array_equal(sums["health/finite"], [0, 1])


@pytest.mark.parametrize("name", ALGOS)
def test_at_least_the_wanted_steps_are_taken(name):
    config = config_of(name)
    longer = dataclasses.replace(config, total_timesteps=config.steps_per_update + 1)
    assert longer.num_updates == 2


@pytest.mark.parametrize("name", [x for x in ALGOS if x not in OFFLINE])
def test_environments_do_not_reach_their_time_limit_together(name):
    """Except those of BNPO, which learns from whole episodes."""
    env = module_of(name).make_env(config_of(name, num_envs=16))
    elapsed = env.reset(jax.random.key(0))[1].inner.inner.elapsed
    assert (len(np.unique(elapsed)) > 1) == (name != "bnpo")


def test_schedule_ends_where_the_run_ends(lab, trained):
    if not hasattr(lab.config, "anneal_lr"):
        pytest.skip("no schedule")
    done = np.arange(1, 7) / 7 if lab.name == "p3o" else np.arange(6) / 6
    rates = lab.config.learning_rate * (1 - done)
    np.testing.assert_allclose(trained[1]["['charts/learning_rate']"], rates.sum(), rtol=1e-5)


# --- randomness ---


@pytest.mark.parametrize("kind", TASKS)
def test_no_key_is_used_twice(lab, kind):
    if kind not in KINDS[lab.name]:
        pytest.skip(f"no {kind} actions")
    env = lab.config.env if lab.name in GOALS | OFFLINE else TASKS[kind]
    config = dataclasses.replace(lab.config, env=env)
    algo = build(lab.name, config)
    eval_env = envs.make(env, 2, stagger=False, reset_mode="cached")

    def evaluate(keys, policies):
        return evaluation.evaluate(algo.act, policies, eval_env, keys)

    def sample(key, policy, obs):
        return algo.act(policy, obs, key, False)

    key = jax.random.key(0)
    state = jax.eval_shape(algo.init, key)
    policy = jax.eval_shape(algo.policy_of, state)
    twice = lambda key: jax.random.normal(key) + jax.random.normal(key)
    with jax.debug_key_reuse(True):
        with pytest.raises(jax.errors.KeyReuseError):  # the checker sees what it should
            jax.jit(twice)(key)
        jax.jit(lab.module.make_train(config)).trace(key, None, *lab.program.data)
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), policy)
        jax.jit(evaluate).trace(jax.random.split(key, 1), rows)
        jax.jit(sample).trace(key, policy, jnp.zeros((2, eval_env.obs_size)))


@pytest.mark.slow
def test_ratio_is_one_before_any_step(lab):
    """Continuous actions, held noise, statistics that move: without learning ratios stay at 1."""
    known = typing.get_type_hints(lab.module.Config)
    changes = {"learning_rate": 0.0, "clip_eps": 1e-5, "noise_interval": 4}
    if not changes.keys() <= known.keys():
        pytest.skip("no surrogate with a ratio")
    config = dataclasses.replace(lab.config, env="pendulum", total_timesteps=3 * 32, **changes)
    train = jax.jit(lab.module.make_train(config))
    metrics = train(jax.random.key(0))["metrics"]
    np.testing.assert_array_equal(metrics["losses/clip_fraction"], 0.0)
    assert np.abs(metrics["losses/approx_kl"]).max() < 1e-6


# --- configuration ---


def test_an_actor_never_sees_what_only_a_critic_may(lab):
    config = dataclasses.replace(lab.config, env="test_contracts:privileged")
    if lab.name in OFFLINE | GOALS:
        pytest.skip("its tiny tasks have no such entries")
    if "continuous" not in KINDS[lab.name]:
        config = dataclasses.replace(lab.config, env="test_contracts:privileged_discrete")
    env = lab.module.make_env(config)
    if lab.name not in ASYMMETRIC:
        assert (env.obs_size, env.privileged_size) == (4, 0)
        return
    assert (env.obs_size, env.privileged_size) == (5, 1)
    algo = lab.module.build(config, env)
    policy = algo.policy_of(jax.jit(algo.init)(jax.random.key(0)))
    obs = jax.random.normal(jax.random.key(1), (5, 5))
    for greedy in (True, False):
        act = lambda obs: algo.act(policy, obs, jax.random.key(2), greedy)  # noqa: B023
        np.testing.assert_array_equal(act(obs), act(obs.at[:, -1].add(1.0)))
        np.testing.assert_array_equal(act(obs), act(obs[:, :-1]))
        assert (act(obs) != act(obs.at[:, 0].add(1.0))).any()


def privileged(discrete=False):
    """A task whose observation ends with one entry that only a critic may see."""
    raw = gymnax.make("CartPole-v1") if discrete else balance()
    see = lambda obs: jnp.append(obs, 7.0)

    def reset(key):
        obs, state = raw.reset(key)
        return see(obs), state

    def step(*args):
        obs, *rest = raw.step(*args)
        return see(obs), *rest

    return raw._replace(reset=reset, step=step, obs_size=5, obs_shape=(5,), privileged_size=1)


privileged_discrete = partial(privileged, discrete=True)


def test_build_does_not_change_the_config(lab):
    config = config_of(lab.name)
    before = dataclasses.asdict(config)
    algo = build(lab.name, config)
    jax.eval_shape(algo.update, jax.eval_shape(algo.init, jax.random.key(0)), *lab.program.data)
    assert dataclasses.asdict(config) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_envs = 1


def test_presets_are_valid(lab):
    """Every preset makes a configuration that passes all checks, and with its own values."""
    assert lab.module.PRESETS
    for preset, values in lab.module.PRESETS.items():
        changes = {"dataset": "any"} if lab.name in OFFLINE else {}
        if lab.name == "brac" and values.get("divergence", "kl") in ("kl", "mmd"):
            changes["behavior"] = "any"  # of a clone
        try:
            envs.canonical(preset)
            config = lab.module.config_for(preset, **changes)
        except ValueError:
            config = lab.module.config_for(lab.config.env, preset, **changes)
        for field, value in values.items():
            assert getattr(config, field) == value, (preset, field)


def test_fields_of_traceable_can_be_traced(lab):
    train = lab.module.make_train(lab.config)
    hparams = {k: jnp.float32(getattr(lab.config, k)) for k in lab.module.TRACEABLE}
    jax.eval_shape(train, jax.random.key(0), hparams, *lab.program.data)
    with pytest.raises(ValueError, match="num_envs"):
        jax.eval_shape(train, jax.random.key(0), {"num_envs": jnp.int32(3)}, *lab.program.data)


def test_a_policy_is_the_same_whatever_is_swept(lab, trained):
    """Evaluation and export know a row's state, and not its values of what is swept."""
    known = {k: getattr(lab.config, k) for k in lab.module.TRACEABLE}
    other = {k: 0.1 + 0.6 * x for k, x in known.items()}
    assert not [k for k in known if other[k] == known[k]]
    env = lab.module.make_env(lab.config)
    configs = [dataclasses.replace(lab.config, **x) for x in ({}, other)]
    algos = [lab.module.build(config, env) for config in configs]
    policy, same = (algo.policy_of(row(trained[0], 0)) for algo in algos)
    assert_same(policy, same)
    obs = jnp.linspace(-1.0, 1.0, 20)
    for name in ("act", *algos[0].further):
        for greedy in (True, False):
            acts = (algo._asdict().get(name) or algo.further[name] for algo in algos)
            args = policy, obs.reshape(5, 4), jax.random.key(0), greedy
            assert_same(*({"action": act(*args)} for act in acts))


def test_a_policy_draws_its_actions_unless_it_is_greedy(lab, trained):
    algo = build(lab.name, lab.config)
    policy, obs = algo.policy_of(row(trained[0], 0)), jnp.full((64, 4), 0.1)
    act = lambda greedy: np.unique(algo.act(policy, obs, jax.random.key(0), greedy), axis=0)
    assert len(act(False)) > 1
    assert lab.name in RANDOM or len(act(True)) == 1


# --- the file as a program ---


def check_means(line, sums, num_updates):
    """What is logged of 3 updates: means over them, or over episodes and replayed minibatches."""
    sums = {name[2:-2]: x for name, x in sums.items()}
    for name, total in sums.items():
        count = sums.get(name.split("/")[0] + "/count")
        if count is not None:
            total = total / np.where(count > 0, count, np.nan)
        elif name != "health/env_nan" and not name.endswith("/max"):
            total = total / num_updates
        if not name.endswith("/count"):
            logged = np.array(line[name.replace("episodes/", "charts/episodic_")], float)
            np.testing.assert_allclose(logged, total, rtol=1e-5, err_msg=name)


def test_command_line_end_to_end(lab, trained, tmp_path, signals):
    """A complete run directory with the very state of the pure program; its policies load."""
    run_dir = tmp_path / "run"
    argv = ["--num-seeds", "2", "--eval-episodes", "2", "--num-evals", "2", "--final-episodes"]
    argv += [
        "5",
        "--checkpoint-every",
        "1",
        "--verbose",
        "0",
        "--run-dir",
        str(run_dir),
        *flags_of(lab.config),
    ]
    launch.main(lab.name, argv)

    written = {str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()}
    assert written == {
        ".lock",
        "config.json",
        "meta.json",
        "metrics.jsonl",
        "eval.npz",
        "final.npz",
        "checkpoints/000000003.npz",
        "checkpoints/000000006.npz",
        "policy_s000.npz",
        "policy_s001.npz",
        "plots/curve.png",
        "done.json",
    }
    template = jax.eval_shape(lab.program.init, lab.keys, {})
    state, _ = rundir.load_tree(run_dir / "checkpoints" / "000000006.npz", template)
    assert_same(state, trained[0])

    run = rundir.read_run(run_dir)
    assert run.algo == lab.name
    assert rundir.from_json(lab.module.Config, run.config) == lab.config
    assert run.steps.tolist() == [0, 96, 192]
    assert run.returns.shape == run.lengths.shape == (2, 3, 2)
    others = evaluated(lab, state, number=6)  # of updates
    np.testing.assert_array_equal(run.returns[:, -1], others.pop(""))
    assert run.final.shape == (2, 6)  # three parts of two episodes
    np.testing.assert_array_equal(run.final[:, :2], run.returns[:, -1])
    assert run.further.keys() == run.final_further.keys() == others.keys()
    for policy, played in others.items():
        np.testing.assert_array_equal(run.further[policy][:, -1], played)
        known = run.done["results"][0]["further"][policy]
        np.testing.assert_allclose(known["per_seed"], run.final_further[policy].mean(1))
    assert run.done["steps"] == 192
    with open(run_dir / "metrics.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [line["global_step"] for line in lines] == [0, 96, 96, 192, 192, 192]
    for policy in others:
        assert f"eval/{policy}_return" in lines[-2]
        assert f"final/{policy}_return" in lines[-1]
    check_means(lines[1], arrays(lab.train(lab.start(), 3)[1]), 3)

    env = lab.module.make_env(lab.config)
    algo = lab.module.build(lab.config, env)
    bounded = lambda action: action if env.discrete else jnp.clip(action, -1.0, 1.0)
    obs = jax.random.normal(jax.random.key(1), (5, 4))
    for i in range(2):
        act = policies.load_policy(run_dir / f"policy_s00{i}.npz")
        policy = row(lab.program.policies(trained[0]), i)
        same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        same(act(obs), bounded(algo.act(policy, obs, jax.random.key(0), True)))
        key = jax.random.key(7)
        same(act(obs, key), bounded(algo.act(policy, obs, key, False)))
        if lab.name not in RANDOM:  # else draws depend on how many there are
            same(act(obs[0]), act(obs)[0])


# --- bad numbers ---

# Fields that may be negative; counts that may be 0.
SIGNED = {"ent_coef", "log_std_init", "vmin", "vmax", "target_entropy_mult", "reward_range"}
SIGNED |= {"warm_start"}
MAY_BE_0 = {"learning_starts", "warm_start"}


@pytest.mark.parametrize("name", ALGOS)
def test_values_outside_their_bounds_are_refused(name):
    config = config_of(name)
    common.check(config)

    def refused(field, value):
        with pytest.raises(ValueError, match=f"{field}="):
            common.check(dataclasses.replace(config, **{field: value}))

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        number = value[0] if isinstance(value, tuple) and value else value
        as_given = lambda x, value=value: (x,) * len(value) if isinstance(value, tuple) else x
        refused(field.name, as_given(object()))
        if isinstance(number, str) and field.name not in ("env", "dataset", "behavior"):
            refused(field.name, as_given("no such word"))
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if field.name not in SIGNED:
            refused(field.name, as_given(-1))
        if isinstance(number, float):
            refused(field.name, as_given(math.nan))
        elif field.name not in MAY_BE_0:
            refused(field.name, as_given(0))


@pytest.mark.parametrize("name", [x for x in ALGOS if x not in OFFLINE])
def test_start_states_are_drawn_anew_in_every_update(name):
    """Else a launch on a task whose starts are cached would see N of them in its whole life."""
    config, drawn = config_of(name), []
    env = module_of(name).make_env(config)
    refresh = lambda key, state: drawn.append("refresh") or env.refresh(key, state)
    reset = lambda key: drawn.append("reset") or env.reset(key)
    algo = module_of(name).build(config, env._replace(refresh=refresh, reset=reset))
    state = jax.eval_shape(algo.init, jax.random.key(0))
    drawn.clear()
    jax.eval_shape(algo.update, state)
    assert drawn
