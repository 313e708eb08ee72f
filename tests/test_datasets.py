"""Datasets: what is read is what was written, episodes of others are cut right, bad ones named."""

import json
import re
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

import envs
from algos import bc
from algos.launch import datasets
from algos.launch.datasets import Dataset

ENV = envs.make("tiny:balance", 1)  # 4 observations, 1 action


def write(path, dataset, env="tiny:balance"):
    datasets.write(path, dataset, {"env": env})
    return str(path)


def changed(**changes):
    return tiny.transitions(20)._replace(**changes)


# --- our files ---


def test_what_is_read_is_what_was_written(tmp_path):
    dataset = tiny.transitions(20)
    source = write(tmp_path / "data.npz", dataset)
    tiny.assert_same(datasets.load(source, ENV), dataset)
    assert datasets.read(tmp_path / "data.npz")[1] == {"env": "tiny:balance"}


@pytest.mark.parametrize("name", ["pendulum?max_steps=50", "gymnax/Pendulum-v1?max_steps=50"])
def test_a_task_may_have_any_of_its_names(tmp_path, name):
    source = write(tmp_path / "data.npz", tiny.transitions(20, 3, 1), name)
    datasets.load(source, envs.make("pendulum?max_steps=50", 1))
    with pytest.raises(ValueError, match=r"is of pendulum\?max_steps=50 |is of gymnax/.*=50 "):
        datasets.load(source, envs.make("pendulum", 1))


def test_a_task_that_is_unknown_here_is_another(tmp_path):
    source = write(tmp_path / "data.npz", tiny.transitions(20), "elsewhere/Task")
    with pytest.raises(ValueError, match=r"is of elsewhere/Task .*, not tiny:balance"):
        datasets.load(source, ENV)


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.npz", tiny.transitions(300, 3, 1), "pendulum")
    page = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace('dataset="mine.npz"', 'dataset="mine.npz", total_timesteps=100')
    seeds = np.arange(2)
    names = {"bc": bc, "seeds": seeds, "keys": jax.vmap(jax.random.key)(seeds), "jax": jax}
    exec(code, names)
    assert names["result"]["metrics"]["losses/policy_loss"].shape == (2, 1)


def with_value(name, row, value):
    x = getattr(tiny.transitions(20), name).copy()
    x[row] = value
    return {name: x}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (tiny.transitions(0), r"data.npz has no rows"),
        (
            tiny.transitions(20, 3, 2),
            r"has obs \[20, 3\], action \[20, 2\], and tiny:balance needs",
        ),
        (changed(reward=np.zeros(19, np.float32)), r"as many rows of each"),
        (changed(next_action=np.zeros((20, 2), np.float32)), r"as many rows of each"),
        (changed(**with_value("obs", 7, np.nan)), r"obs is not finite in 1 rows, first 7"),
        (
            changed(**with_value("reward", [3, 9], np.inf)),
            r"reward is not finite in 2 rows, first 3",
        ),
        (
            changed(**with_value("action", 5, -1.7)),
            r"outside \[-1, 1\] in 1 rows, first 5: the largest is 1.7,",
        ),
        (changed(**with_value("next_action", 5, 1.01)), r"next_action is outside"),
        (changed(obs=np.float32(1.0)), r"has obs \[\], action"),
        (changed(reward=np.array(["1"] * 20)), r"reward is <U1, and float is needed"),
        (changed(terminated=np.zeros(20, np.float32)), r"terminated is float32, and bool is"),
        (changed(**with_value("truncated", 4, True)), r"1 rows, first 4, are terminated and trunc"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, dataset, message):
    source = write(tmp_path / "data.npz", dataset)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(source, ENV)
    assert "\n" not in str(error.value)


def test_a_wrong_shape_is_named(tmp_path):
    source = write(tmp_path / "data.npz", changed(reward=np.zeros((20, 1), np.float32)))
    with pytest.raises(ValueError, match=r"as many rows of each; reward is \[20, 1\]"):
        datasets.load(source, ENV)


@pytest.mark.parametrize("dtype", [">f4", "<f8", "f2", np.longdouble])
def test_floats_of_every_precision_and_byte_order_become_float32(tmp_path, dtype):
    dataset = tiny.transitions(20)
    obs = (dataset.obs * 8).round() / 8  # exact in all of them
    source = write(tmp_path / "data.npz", dataset._replace(obs=obs.astype(dtype)))
    tiny.assert_same(datasets.load(source, ENV), dataset._replace(obs=obs))


def test_what_float32_cannot_hold_is_refused(tmp_path):
    obs = tiny.transitions(20).obs.astype(np.float64)
    obs[3] = 1e300
    source = write(tmp_path / "data.npz", changed(obs=obs))
    with pytest.raises(ValueError, match="obs is not finite in 1 rows, first 3, as float32"):
        datasets.load(source, ENV)


def test_an_episode_that_is_too_long_is_warned_of(tmp_path):
    """tiny:balance stops after 20 steps; rows without ends are one episode."""
    n = ENV.max_steps + 1
    ends = {"terminated": np.zeros(n, bool), "truncated": np.zeros(n, bool)}
    dataset = tiny.transitions(n)._replace(**ends)
    cut = dataset._replace(truncated=np.arange(n) == 9)
    warned = []
    for data in (dataset, cut):
        with warnings.catch_warnings(record=True, action="always") as caught:
            loaded = datasets.load(write(tmp_path / "data.npz", data), ENV)
        assert len(loaded.obs) == n  # a warning refuses nothing
        warned.append([str(x.message) for x in caught])
    (message,), none = warned
    assert re.search(rf"episode of {n} steps, .* stops at {n - 1}: are its", message)
    assert none == []


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data.npz", tiny.transitions(20))
    assert len(datasets.load("~/data.npz", ENV).obs) == 20


def test_actions_on_the_bounds_are_accepted(tmp_path):
    source = write(tmp_path / "data.npz", changed(**with_value("action", 5, -1.0)))
    assert datasets.load(source, ENV).action[5] == -1.0


def harmed(path, harm):
    write(path, tiny.transitions(20))
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif harm == "foreign":
        path.write_text("not at all")
    elif harm == "other arrays":
        np.savez(path, x=np.zeros(3), __meta__="{}")
    elif harm == "pickled":
        np.savez(path, **{name: np.array([{}]) for name in (*Dataset._fields, "__meta__")})
    elif harm == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif harm == "missing":
        path.unlink()
    elif harm == "a folder":
        path.unlink()
        path.mkdir()
    elif harm.startswith("{") or harm.startswith("["):
        np.savez(path, **tiny.transitions(20)._asdict(), __meta__=harm)
    elif harm == "another task":
        write(path, tiny.transitions(20), env="brax/hopper")
    return str(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("truncated", "damaged or not ours"),
        ("foreign", "damaged or not ours"),
        ("other arrays", "no __meta__|no action, next_action"),
        ("pickled", "damaged or not ours"),
        ("one array", r"not ours \(it is no .npz of plain arrays\)"),
        ('{"of": 1}', "its metadata names no env"),
        ('["env"]', "no __meta__"),
        ("missing", "does not exist, or is not a file"),
        ("a folder", "does not exist, or is not a file"),
        (
            "another task",
            r"is of brax/hopper \(obs \[20, 4\], action \[20, 1\]\), not tiny:balance",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path, harm, message):
    source = harmed(tmp_path / "data.npz", harm)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(source, ENV)
    assert "\n" not in str(error.value)


def loads_or_says_why(path):
    """Whether the file is a dataset, or is refused in one line that names it."""
    said = ""
    try:
        datasets.load(str(path), ENV)
    except ValueError as error:
        said = str(error)
    return not said or (str(path) in said and "\n" not in said)


fuzz = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes the file
)
harms = st.lists(st.tuples(st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 255)), max_size=9)


@pytest.mark.parametrize("layout", ["ours", "flat", "minari"])
@fuzz
@given(harms=harms, kept=st.floats(0.0, 1.0))
def test_any_damage_loads_or_is_refused_in_one_line(tmp_path, layout, harms, kept):
    path = tmp_path / ("data.npz" if layout == "ours" else "data.hdf5")
    if layout == "ours":
        write(path, tiny.transitions(20))
    else:
        {"flat": flat_file, "minari": minari_file}[layout](path)
    content = bytearray(path.read_bytes())
    for where, byte in harms:
        content[int(where * len(content))] = byte
    path.write_bytes(content if kept > 0.5 else content[: int(kept * len(content))])
    assert loads_or_says_why(path)


@fuzz
@given(
    name=st.sampled_from(Dataset._fields),
    array=st_np.arrays(
        dtype=st.one_of(st_np.floating_dtypes(), st_np.integer_dtypes(), st_np.boolean_dtypes()),
        shape=st_np.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20),
    ),
)
def test_any_array_loads_or_is_refused_in_one_line(tmp_path, name, array):
    write(tmp_path / "data.npz", changed(**{name: array}))
    assert loads_or_says_why(tmp_path / "data.npz")


def test_discrete_actions_are_refused(tmp_path):
    source = write(tmp_path / "data.npz", tiny.transitions(20, 4, 2), "gymnax/CartPole-v1")
    with pytest.raises(ValueError, match="discrete actions"):
        datasets.load(source, envs.make("cartpole", 1))


# --- episodes of others ---

# Episodes of 3, 4 and 3 steps: the first fails, the second is cut by the clock, the third by the
# end of collection. An observation is ten times the episode plus the step, an action a hundredth.
EPISODES = [(0, 3, True), (1, 4, False), (2, 3, False)]
ROWS = {  # obs, next_obs, next_action, of the rows that are kept
    "obs": [0, 1, 2, 10, 11, 12, 20, 21],
    "next_obs": [1, 2, 3, 11, 12, 13, 21, 22],
    "terminated": [0, 0, 1, 0, 0, 0, 0, 0],
    "truncated": [0, 0, 0, 0, 0, 1, 0, 1],
}


def arrays_of(episode, length):
    obs = np.repeat(10.0 * episode + np.arange(length + 1)[:, None], 4, 1)
    return obs, obs[:-1, :1] / 100, np.arange(length) + 0.5


def assert_rows(dataset, final=3):
    """The rows of both episodes; `final` is the observation after the failure."""
    wanted = {name: np.array(x, float) for name, x in ROWS.items()}
    wanted["next_obs"][2] = final
    for name in ("obs", "next_obs"):
        np.testing.assert_array_equal(
            getattr(dataset, name), np.repeat(wanted[name][:, None], 4, 1)
        )
    for name in ("terminated", "truncated"):
        np.testing.assert_array_equal(getattr(dataset, name), wanted[name].astype(bool))
    np.testing.assert_allclose(dataset.action[:, 0], wanted["obs"] / 100)
    going_on = ~dataset.terminated  # after a failure any action will do
    np.testing.assert_allclose(dataset.next_action[going_on, 0], wanted["next_obs"][going_on] / 100)
    np.testing.assert_array_equal(dataset.reward, [0.5, 1.5, 2.5, 0.5, 1.5, 2.5, 0.5, 1.5])
    assert {x.dtype for x in dataset} == {np.dtype(np.float32), np.dtype(bool)}


def test_the_last_step_of_a_truncated_episode_is_left_out():
    assert_rows(datasets.from_episodes((*arrays_of(i, n), end) for i, n, end in EPISODES))
    dataset = datasets.from_episodes([(*arrays_of(0, 1), True), (*arrays_of(1, 1), False)])
    assert dataset.terminated.tolist() == [True]
    with pytest.raises(ValueError, match="no episode has two steps"):
        datasets.from_episodes([(*arrays_of(1, 1), False)])


def test_what_is_written_as_episodes_comes_back():
    """Minari holds no action after the end: of cut episodes the last step is lost on the way."""
    dataset = datasets.from_episodes((*arrays_of(i, n), end) for i, n, end in EPISODES)
    episodes = list(datasets.to_episodes(dataset))
    assert [len(action) for _, action, _, _ in episodes] == [3, 3, 2]
    assert all(len(obs) == len(action) + 1 for obs, action, _, _ in episodes)
    again = datasets.from_episodes(episodes)
    kept = [0, 1, 2, 3, 4, 6]
    assert again.truncated.tolist() == [False] * 4 + [True] * 2
    tiny.assert_same(
        again._replace(truncated=dataset.truncated[kept]), Dataset(*(x[kept] for x in dataset))
    )


def flat_file(path, last_flagged=True):
    """D4RL's layout: the observation after the last step of an episode is not in it."""
    h5py = pytest.importorskip("h5py")
    parts = [arrays_of(i, n) for i, n, _ in EPISODES]
    with h5py.File(path, "w") as file:
        file["observations"] = np.concatenate([obs[:-1] for obs, _, _ in parts])
        file["actions"] = np.concatenate([action for _, action, _ in parts])
        file["rewards"] = np.concatenate([reward for _, _, reward in parts])
        file["terminals"] = np.arange(10) == 2
        # Step 2 is flagged as both: it failed.
        file["timeouts"] = np.isin(np.arange(10), [2, 6, 9] if last_flagged else [2, 6])
    return str(path)


def minari_file(path):
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for i, n, end in EPISODES:
            group = file.create_group(f"episode_{i}")
            group["observations"], group["actions"], group["rewards"] = arrays_of(i, n)
            last = np.arange(n) == n - 1
            group["terminations"], group["truncations"] = last & end, last & (not end)
    return str(path)


def test_d4rl_files(tmp_path):
    for last_flagged in (True, False):  # the end of collection cuts an episode too
        source = flat_file(tmp_path / "flat.hdf5", last_flagged)
        assert_rows(datasets.load(source, ENV), final=2)


def test_minari_files(tmp_path, monkeypatch):
    minari_file(tmp_path / "tiny" / "balance-v0" / "data" / "main_data.hdf5")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert_rows(datasets.load("minari:tiny/balance-v0", ENV))
    with pytest.raises(ValueError, match=r"no Minari dataset 'tiny/balanc' .*: tiny/balance-v0$"):
        datasets.load("minari:tiny/balanc", ENV)
    other = minari_file(tmp_path / "other.hdf5")
    with pytest.raises(ValueError, match=r"has obs \[8, 4\].* needs obs \[n, 3\]"):
        datasets.load(other, envs.make("pendulum", 1))


def test_actions_of_others_are_scaled_from_the_tasks_range(tmp_path):
    """[-0.4, 0.4] as in Humanoid-v5; a range of its own for each dimension; no range; [-1, 1]."""
    source = flat_file(tmp_path / "flat.hdf5")
    plain = datasets.load(source, ENV)
    for low, high in ((-0.4, 0.4), (-2.0, 4.0)):
        h5py = pytest.importorskip("h5py")
        with h5py.File(source, "r+") as file:
            kept = file["actions"][()]
            file["actions"][...] = low + (high - low) * (kept + 1) / 2
        scaled = datasets.load(source, ENV._replace(action_range=[[low], [high]]))
        for name in ("action", "next_action"):
            mine, wanted = getattr(scaled, name), getattr(plain, name)
            np.testing.assert_allclose(mine, wanted, atol=1e-6)
            assert mine.dtype == np.float32
        with h5py.File(source, "r+") as file:
            file["actions"][...] = kept
    tiny.assert_same(datasets.load(source, ENV._replace(action_range=[[-1.0], [1.0]])), plain)


def test_hdf5_is_known_by_its_suffix_and_by_its_first_bytes(tmp_path):
    for name in ("flat.H5", "flat.HDF5", "flat.data", "flat"):
        assert_rows(datasets.load(flat_file(tmp_path / name), ENV), final=2)


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        ("flat", "timeouts", "has no timeouts, so nobody knows where episodes were cut"),
        ("flat", "terminals", ": it has no terminals"),
        ("minari", "episode_1/terminations", "terminations"),
        ("minari", "episode_1/observations", "observations have the parts goal, place: an array"),
        ("minari", "episode_1/rewards", ": episode_1 has no rewards"),
    ],
)
def test_hdf5_without_a_part_is_refused_by_its_name(tmp_path, layout, name, message):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "data.hdf5"
    {"flat": flat_file, "minari": minari_file}[layout](path)
    with h5py.File(path, "a") as file:
        del file[name]
        if "parts" in message:
            file[f"{name}/goal"] = file[f"{name}/place"] = np.zeros((5, 2))
    with pytest.raises(ValueError, match=message) as error:
        datasets.load(str(path), ENV)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "name", "value", "message"),
    [
        ("flat", "terminals", np.full(10, np.nan), "terminals has values beside 0 and 1"),
        ("flat", "timeouts", np.full(10, 0.5), "timeouts has values beside 0 and 1"),
        ("flat", "terminals", np.zeros((10, 1)), r"terminals is \[10, 1\], and \[10\] is needed"),
        ("flat", "rewards", np.zeros(12), "it has 10 observations, 10 actions, 12 rewards"),
        ("flat", "actions", np.zeros((9, 1)), "it has 10 observations, 9 actions, 10 rewards"),
        (
            "flat",
            "observations",
            np.zeros((10, 4), complex),
            "observations are complex128: numbers",
        ),
        ("flat", "rewards", np.full(10, b"1.0"), r"rewards are \|S3: numbers are needed"),
        ("flat", "observations", np.zeros((0, 4)), "observations has no rows"),
        (
            "minari",
            "episode_1/rewards",
            np.zeros(9),
            r"an episode has 5 observations, 4 actions and 9",
        ),
        ("minari", "episode_1/terminations", np.full(4, 2.0), "terminations has values beside 0"),
        ("minari", "episode_1/terminations", [0, 1, 0, 0], "episode_1 goes on after a step that"),
        ("minari", "episode_1/truncations", [0, 1, 0, 0], "episode_1 goes on after a step that"),
    ],
)
def test_hdf5_that_does_not_fit_together_is_refused(tmp_path, layout, name, value, message):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "data.hdf5"
    {"flat": flat_file, "minari": minari_file}[layout](path)
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = value
    with pytest.raises(ValueError, match=message):
        datasets.load(str(path), ENV)


def test_minaris_folder_needs_no_home_where_it_is_named(tmp_path, monkeypatch):
    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert datasets.minari_root() == tmp_path
    monkeypatch.setenv("MINARI_DATASETS_PATH", "")
    with pytest.raises(ValueError, match="Could not determine home"):
        datasets.minari_root()


def test_hdf5_of_another_layout_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["data/demo_0/actions"] = file["episode_x"] = np.zeros((5, 1))
    with pytest.raises(ValueError, match="it has neither observations, as D4RL's files, nor"):
        datasets.load(str(tmp_path / "data.hdf5"), ENV)


def test_episodes_are_read_in_the_order_of_their_numbers():
    names = [f"episode_{i}" for i in (0, 1, 10, 2)]
    one = {"observations": [[0.0]], "actions": [[0.0]], "terminations": [1], "truncations": [0]}
    file = {name: one | {"rewards": [int(name[8:])]} for name in names}
    wrap = lambda group: {k: np.array(v) for k, v in group.items()}
    episodes = datasets.minari_episodes({name: wrap(group) for name, group in file.items()})
    assert [reward for _, _, (reward,), _ in episodes] == [0, 1, 2, 10]


def test_bad_hdf5_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "data.hdf5"
    path.write_text("not at all")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py: pip install"):
        datasets.load(str(path), ENV)
    monkeypatch.delitem(sys.modules, "h5py")
    h5py = pytest.importorskip("h5py")
    with pytest.raises(ValueError, match="damaged or no dataset"):
        datasets.load(str(path), ENV)
    for rows in (3, 0):  # with nothing beside them, and an empty file
        with h5py.File(path, "w") as file:
            file["observations"] = np.zeros((rows, 4))
            for name in ("actions", "rewards", "terminals", "timeouts") if not rows else ():
                file[name] = np.zeros((0, 1) if name == "actions" else 0)
        with pytest.raises(ValueError, match="damaged or no dataset"):
            datasets.load(str(path), ENV)


def test_metadata_is_json(tmp_path):
    source = write(tmp_path / "data.npz", tiny.transitions(20))
    with np.load(source, allow_pickle=False) as file:
        assert json.loads(str(file["__meta__"])) == {"env": "tiny:balance"}
        assert {*file.files} == {*Dataset._fields, "__meta__"}


def test_a_dataset_may_name_its_task_shortly(tmp_path):
    pendulum = envs.make("pendulum", 1)
    rows = tiny.transitions(20, obs_size=3)
    assert len(datasets.load(write(tmp_path / "data.npz", rows, "pendulum"), pendulum).obs) == 20
    with pytest.raises(ValueError, match=r"data.npz is of hopper .*, not gymnax/Pendulum-v1"):
        datasets.load(write(tmp_path / "data.npz", rows, "hopper"), pendulum)
