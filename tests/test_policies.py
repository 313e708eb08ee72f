"""What reads a run: exported policies, curves."""

import ast
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import envs
from algos.launch import policies, report, rundir
from envs import wrappers

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]

PAGE = Path(__file__).parents[1] / "docs" / "policies.md"


def test_a_policy_that_is_not_there(whole):
    with pytest.raises(ValueError, match=r"policy_s007.npz does not exist; there: policy_s000.npz"):
        policies.load_policy(whole[0] / "policy_s007.npz")
    with pytest.raises(ValueError, match=r"is a folder, name a policy; there: policy_s000.npz"):
        policies.load_policy(whole[0])
    with pytest.raises(ValueError, match="not a run directory"):
        rundir.read_run(whole[0] / "plots")
    checkpoint = next((whole[0] / "checkpoints").glob("*.npz"))
    with pytest.raises(ValueError, match=r"npz is no policy: name policy_sNNN.npz or partial"):
        policies.load_policy(checkpoint)


def test_an_unfinished_run_says_why_it_has_no_policies(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"there: no policies: its run .* --resume it"):
        policies.load_policy(tmp_path / "policy_s000.npz")


def test_a_policy_of_a_dead_seed_is_refused(whole, tmp_path):
    path = tmp_path / "policy_s001.npz"
    with np.load(whole[0] / path.name) as file:
        dead = {k: x if k == "__meta__" else np.full_like(x, np.nan) for k, x in file.items()}
    np.savez(path, **dead)
    with pytest.raises(ValueError, match=r"policy_s001\.npz is of a dead seed: its parameters"):
        policies.load_policy(path)


def test_a_run_without_an_evaluation_says_so(whole, tmp_path):
    for name in ("config.json", "meta.json"):
        shutil.copy(whole[0] / name, tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path} has no evaluation yet"):
        rundir.read_run(tmp_path)


def test_curves_and_groups(whole):
    run = rundir.read_run(whole[0])
    middle, lo, hi = report.curve_of(run.returns)
    np.testing.assert_allclose(middle, run.returns.mean((0, 2)))
    assert ((lo <= middle) & (middle <= hi)).all()
    swept = run._replace(labels=["b", "a"])
    assert [(x, i.tolist()) for x, i in report.groups(swept)] == [("b", [0]), ("a", [1])]


# --- observations and actions ---


def test_a_policy_takes_numbers_of_any_kind(whole):
    act = policies.load_policy(whole[0] / "policy_s000.npz")
    rows = [[0.0, 1.0, 0.0, -1.0], [0.0, -3.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0]]
    expected = act(np.float32(rows))
    assert type(expected) is np.ndarray
    assert (expected.shape, expected.dtype) == ((3,), np.int32)
    expected += 0  # it may be written to
    for given in (rows, np.array(rows), np.array(rows, int), jnp.array(rows, jnp.bfloat16)):
        np.testing.assert_array_equal(act(given), expected)
        alone = act(given[1])
        assert (type(alone), alone.shape) == (np.ndarray, ())
        assert alone == expected[1]


@pytest.mark.parametrize(
    ("obs", "message"),
    [
        (np.zeros(3), r"obs has shape \[3\]: \[4\] or \[N, 4\] is wanted"),
        (np.zeros((2, 3)), r"obs has shape \[2, 3\]: \[4\] or"),
        (np.zeros((2, 2, 4)), r"obs has shape \[2, 2, 4\]: \[4\] or"),
        (0.0, r"obs has shape \[\]: \[4\] or"),
        ([0, 0, np.nan, 0], r"obs\[2\] is nan: a finite float32 is wanted"),
        (np.array([[0, 0, 0, 0], [0, 0, 0, -np.inf]]), r"obs\[1, 3\] is -inf: a finite float32"),
        ([0, 1e39, 0, 0], r"obs\[1\] is 1e\+39: a finite float32 is wanted"),
        (["1", "2", "3", "4"], r"obs is \['1', '2', '3', '4'\]: an array of numbers is wanted"),
        ([None] * 4, r"obs is \[None, .*: an array of numbers"),
        ({"obs": 1}, r"obs is {'obs': 1}: an array of numbers"),
        ([[0, 0, 0, 0], [0]], r"obs is \[\[0, 0, 0, 0\], \[0\]\]: an array of numbers"),
        ([1j] * 4, r"obs is \[1j, 1j, 1j, 1j\]: an array of numbers"),
    ],
)
def test_a_policy_says_what_is_wrong_with_an_observation(whole, obs, message):
    act = policies.load_policy(whole[0] / "policy_s000.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, of numbers that are too large
        with pytest.raises(ValueError, match=message) as error:
            act(obs)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_a_number_is_no_key(whole):
    act = policies.load_policy(whole[0] / "policy_s000.npz")
    for wrong in (jnp.int32(0), jnp.zeros(2), jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match=r"jax\.random\.key\(SEED\) is wanted"):
            act(np.zeros(4), wrong)
    key = jax.random.key(1)
    assert act(np.zeros(4), key) == act(np.zeros(4), jax.random.key_data(key))
    with pytest.raises(ValueError, match=r"key is 7: jax\.random\.key\(SEED\) is wanted"):
        act(np.zeros(4), 7)


def test_observations_have_the_type_that_the_task_gives():
    """P3O divides bytes by 255: numbers from 0 to 255 of another type are to be bytes, too."""
    wanted = {"size": 3, "dtype": "uint8"}
    cast = policies.check_obs([0.0, 3.0, 255.0], wanted)
    assert (cast.dtype, cast.tolist()) == (np.uint8, [0, 3, 255])
    for bad in (256, -1, 0.5, np.nan):
        with pytest.raises(ValueError, match=rf"obs\[1\] is {bad}: a finite uint8 is wanted"):
            policies.check_obs([0, bad, 0], wanted)


def test_continuous_actions_are_clipped():
    algo = SimpleNamespace(act=lambda policy, obs, key, greedy: policy * obs)
    act = policies.act_of(wrappers.wrap(tiny.counter(), "counter", 1, stagger=False), algo, 3.0)
    np.testing.assert_array_equal(act(jnp.array([0.25, -1.0])), [0.75, -1.0])


# --- the file ---


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=f"^{tmp_path}/policy.npz does not exist"):
        policies.load_policy("~/policy.npz")


def test_numbers_of_numpy_and_paths_as_text(tmp_path):
    """As a search of one's own has them."""
    config = tiny.config_of("ppo", learning_rate=np.float32(1e-3))
    env = tiny.module_of("ppo").make_env(config)
    algo = tiny.module_of("ppo").build(config, env)
    policy = algo.policy_of(algo.init(jax.random.key(0)))
    path = str(tmp_path / "mine.npz")
    interface = policies.interface_of(env)
    record = {"seed": np.int64(3)}
    policies.save_policy(path, rundir.flatten(policy), "ppo", config, interface, record)
    assert policies.describe_policy(Path(path))["seed"] == 3
    tiny.assert_same(policies.read_policy(path)[2], policy)


@pytest.mark.parametrize("name", tiny.ALGOS)
def test_a_policy_needs_its_file_alone(name, tmp_path, monkeypatch):
    """Neither its run directory nor its task, and it acts as the algorithm does in that task."""
    path = tiny.write_policy(tmp_path / "mine.npz", name)
    config = tiny.config_of(name)
    env = tiny.module_of(name).make_env(config)
    algo = tiny.module_of(name).build(config, env)
    template = algo.policy_of(jax.eval_shape(algo.init, jax.random.key(0)))
    policy, _ = rundir.load_tree(path, template)
    monkeypatch.setattr(envs, "make", None)
    act = policies.load_policy(path)
    obs, key = jax.random.normal(jax.random.key(1), (5, env.obs_size)), jax.random.key(0)
    expected = algo.act(policy, obs, key, True)
    expected = expected if env.discrete else jnp.clip(expected, -1.0, 1.0)
    np.testing.assert_allclose(act(obs), expected, rtol=1e-5, atol=1e-6)


def test_a_file_describes_its_policy(whole):
    about = policies.describe_policy(whole[0] / "policy_s001.npz")
    assert (about["format"], about["algo"], about["seed"], about["step"]) == (1, "ppo", 1, 192)
    assert rundir.from_json(tiny.module_of("ppo").Config, about["config"]) == tiny.config_of("ppo")
    assert about["obs"] == {"size": 4, "shape": [4], "dtype": "float32"}
    assert about["action"] == {"size": 2, "discrete": True}


@pytest.mark.parametrize("task", ["gym/Humanoid-v5", "gym/Pusher-v5", "gymnax/Pendulum-v1"])
def test_a_file_has_the_range_of_gymnasiums_actions(task):
    action = policies.interface_of(envs.make(task, 1))["action"]
    space = gymnasium.make(task.partition("/")[2]).action_space
    assert (action["low"], action["high"]) == (-1.0, 1.0)
    np.testing.assert_array_equal(np.float32(action["task_low"]), space.low)
    np.testing.assert_array_equal(np.float32(action["task_high"]), space.high)


def test_a_stand_in_has_the_shapes_of_the_task():
    pictures, plain = envs.make("breakout", 4), tiny.counter()
    hidden, plain = (
        wrappers.wrap(raw, "counter", 4, stagger=False, privileged=True)
        for raw in (plain._replace(privileged_size=1), plain)
    )
    for env in (pictures, hidden, plain):
        interface = policies.interface_of(env)
        other = policies.stand_in(tiny.config_of("ppo"), json.loads(json.dumps(interface)))
        assert policies.interface_of(other) == interface
        assert other.obs_size == env.obs_size
        shapes = lambda env: jax.eval_shape(env.reset, jax.random.key(0))[0]
        assert shapes(other) == shapes(env)
    assert policies.interface_of(pictures)["obs"]["dtype"] == "bool"
    assert policies.interface_of(hidden)["obs"] == {
        "size": 1,
        "shape": [1],
        "dtype": "float32",
        "privileged_size": 1,
    }
    unscaled = {"low": -1.0, "high": 1.0, "task_low": [-1.0, -1.0], "task_high": [1.0, 1.0]}
    assert policies.interface_of(plain)["action"] == {"size": 2, "discrete": False} | unscaled


def rewrite(path, change):
    """Give a policy's file other metadata."""
    arrays, meta = rundir.load_arrays(path)
    rundir.save_arrays(path, arrays, change(meta))


def test_a_policy_of_an_older_version_can_be_loaded(copy):
    """Its configuration is in config.json alone, which may have fields that are gone."""
    path, rows = copy / "policy_s000.npz", np.random.default_rng(0).normal(size=(50, 4))
    expected = policies.load_policy(path)(rows)
    rewrite(path, lambda meta: {name: meta[name] for name in ("seed", "label", "step", "return")})
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["clip_epsilon"] = 0.2
    (copy / "config.json").write_text(json.dumps(saved))
    np.testing.assert_array_equal(policies.load_policy(path)(rows), expected)
    (copy / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"is no policy: .* of an old version needs the config.json"
    ):
        policies.load_policy(path)


@pytest.mark.parametrize("name", ["format", "algo", "config", "obs", "action"])
def test_a_policy_with_damaged_metadata_is_named(copy, name):
    path = copy / "policy_s000.npz"
    rewrite(path, lambda meta: meta | {name: None})
    with pytest.raises(ValueError, match=f"no policy: its metadata have no {name}"):
        policies.load_policy(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"gamma": "x"}}, r"policy_s000.npz: gamma='x': .* number"),
        ({"algo": "poo"}, r"policy_s000.npz is of the algorithm poo: did you mean ppo"),
    ],
)
def test_a_damaged_value_of_a_policy_is_named_with_its_file(copy, changes, message):
    rewrite(copy / "policy_s000.npz", lambda meta: meta | changes)
    with pytest.raises(ValueError, match=message):
        policies.load_policy(copy / "policy_s000.npz")


def test_a_policy_plays_in_a_program_with_double_precision(tmp_path):
    """Its draws are the same too: normal numbers of double precision would be others."""
    path = tiny.write_policy(tmp_path / "mine.npz", "sac")
    rows = np.random.default_rng(0).normal(size=(50, 4))
    act = policies.load_policy(path)
    expected = act(rows), act(rows, jax.random.key(0))
    with jax.enable_x64(True):
        act = policies.load_policy(path)
        tiny.assert_same((act(rows), act(rows, jax.random.key(0))), expected)


def test_a_policy_of_another_file_warns(copy):
    """It still acts; that of the present file does not warn."""
    path, rows = copy / "policy_s000.npz", np.random.default_rng(0).normal(size=(50, 4))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        expected = policies.load_policy(path)(rows)
        assert not [x for x in given if "has changed" in str(x.message)]
        rewrite(path, lambda meta: meta | {"source": "of another ppo.py"})
        found = policies.load_policy(path)(rows)
    told = [str(x.message) for x in given if x.category is UserWarning]
    assert len(told) == 1
    assert told[0].startswith("algos/ppo.py has changed since it exported this policy")
    np.testing.assert_array_equal(found, expected)


def test_a_policy_of_a_newer_version_is_refused(copy):
    path = copy / "policy_s000.npz"
    rewrite(path, lambda meta: meta | {"format": 2})
    with pytest.raises(ValueError, match=r"has format 2, and this PurePO reads 1: update it"):
        policies.load_policy(path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ppo", {"env": "cartpole"}),
        ("ppo", {"env": "pendulum", "activation": "relu", "hidden": (8, 4)}),
        ("bpo", {"env": "pendulum", "normalize_obs": False}),
    ],
)
def test_the_docs_play_a_policy_with_numpy_alone(name, changes, tmp_path, monkeypatch):
    path = tiny.write_policy(tmp_path / "policy_s000.npz", name, **changes)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "np.load" in block]
    imports = [x for x in ast.walk(ast.parse(code)) if isinstance(x, (ast.Import, ast.ImportFrom))]
    assert [ast.unparse(x) for x in imports] == ["import json", "import numpy as np"]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    size = policies.describe_policy(path)["obs"]["size"]
    obs = np.random.default_rng(1).normal(size=(50, size))
    expected = policies.load_policy(path)(obs)
    assert len(np.unique(expected)) > 1
    np.testing.assert_allclose(names["act"](obs), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(names["act"](obs[0]), expected[0], rtol=1e-5, atol=1e-6)
