"""Trees of arrays on disk, checkpoints, and statistics over seeds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments import write_run
from tiny import assert_same

from algos.launch import report, rundir


def test_trees_survive_the_disk(tmp_path):
    tree = {
        "keys": jax.random.split(jax.random.key(0), 3),
        "half": jnp.linspace(0, 1, 5, dtype=jnp.bfloat16),
        "none": jnp.zeros((2, 0)),
        "nested": (jnp.arange(3), [jnp.float32(np.nan), jnp.array(True)]),
    }
    rundir.save_arrays(tmp_path / "x.npz", rundir.flatten(tree), {"update": 3})
    template = jax.eval_shape(lambda: tree)
    loaded, meta = rundir.load_tree(tmp_path / "x.npz", template)
    assert meta == {"update": 3}
    assert_same(loaded, tree)
    assert loaded["half"].dtype == jnp.bfloat16
    assert jax.random.bits(loaded["keys"][1]) == jax.random.bits(tree["keys"][1])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": np.ones(3), "c": np.ones(1)}, r"missing \['b'\].*unexpected \['c'\]"),
        ({"a": np.ones(4), "b": np.ones(2)}, r"\['a'\] is float64\[4\], not float64\[3\]"),
    ],
)
def test_a_tree_of_another_shape_is_named(tmp_path, tree, message):
    rundir.save_arrays(tmp_path / "x.npz", rundir.flatten(tree), {})
    with pytest.raises(ValueError, match=message):
        rundir.load_tree(tmp_path / "x.npz", {"a": np.ones(3), "b": np.ones(2)})


def test_a_file_of_someone_else_is_damaged_or_not_ours(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    (tmp_path / "y.npz").write_text("hello")
    np.save(tmp_path / "z.npy", np.ones(3))
    (tmp_path / "z.npy").rename(tmp_path / "z.npz")
    for name in ("x.npz", "y.npz", "z.npz"):
        with pytest.raises(ValueError, match=f"{name} is damaged or not ours"):
            rundir.load_tree(tmp_path / name, {"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"none.npz does not exist"):
        rundir.load_tree(tmp_path / "none.npz", {"a": np.ones(3)})


def test_a_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.json"
    rundir.write_json(path, {"a": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        rundir.write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]  # a full disk gets its space back


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for update in (1, 20, 300):
        rundir.save_checkpoint(tmp_path, {"a": np.ones(1)}, {"update": update})
    assert [p.name for p in rundir.checkpoints(tmp_path)] == ["000000020.npz", "000000300.npz"]
    for update in (10**9 - 1, 10**9):  # the second name is longer, and sorts before
        rundir.save_checkpoint(tmp_path, {"a": np.ones(1)}, {"update": update})
    (tmp_path / "checkpoints" / "000000300.best.npz").touch()  # not of the run
    assert [p.stem for p in rundir.checkpoints(tmp_path)] == ["999999999", "1000000000"]


# --- statistics ---


def test_a_run_is_rewound_with_its_further_policies(tmp_path):
    run_dir = write_run(tmp_path / "run")
    run = rundir.read_run(run_dir)
    assert run.further == {}
    evals = rundir.rewind(run_dir, 4, 200, write=False)
    evals["max_q_returns"] = [x + 7.0 for x in evals["returns"]]
    rundir.write_evals(run_dir, evals)
    others = rundir.read_run(run_dir).further
    np.testing.assert_array_equal(others["max_q"], run.returns + 7.0)
    evals = rundir.rewind(run_dir, 4, 100, write=False)
    assert evals["steps"] == [0, 100]
    assert evals.keys() == {"steps", "seconds", "returns", "lengths", "max_q_returns"}
    np.testing.assert_array_equal(np.stack(evals["max_q_returns"], 1), run.returns[:, :2] + 7.0)
    assert rundir.rewind(run_dir, 4, -1, write=False) == {}


# --- small files that were cut short ---


def test_a_last_line_that_was_cut_short_is_dropped(tmp_path):
    for torn in ('{"global_step": 96, "x"', '{"global_step": 96, "x": 1}', "\0\0\0\0", "{}\n"):
        (tmp_path / "metrics.jsonl").write_text('{"global_step": 32}\n' + torn)
        rundir.rewind(tmp_path, 1, 96, write=True)
        assert (tmp_path / "metrics.jsonl").read_text() == '{"global_step": 32}\n'


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 32}\ntorn\n{"global_step": 96}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 2 \("):
        rundir.rewind(tmp_path, 1, 96, write=True)


def test_only_a_checkpoint_with_one_before_it_may_be_deleted(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for number, advised in (3, False), (6, True):
        path = tmp_path / "checkpoints" / f"{number:09d}.npz"
        path.touch()
        with pytest.raises(ValueError, match=rf"{number}\.npz is damaged") as error:
            rundir.load_tree(path, {})
        assert ("delete it to use the one before" in str(error.value)) == advised


def test_returns_are_shown_with_two_decimals_below_ten():
    assert report.estimate(0.976, (-0.5, 12.34)) == "0.98 [-0.50, 12.34]"
    assert report.estimate(-12.34, (-12.5, 1.2)) == "-12.3 [-12.5, 1.2]"
    assert report.estimate(None, (None, None)) == "- [-, -]"


def test_the_digest_of_a_tree_is_of_names_types_and_shapes_too():
    bytes_alike = [
        {"a": np.zeros(4, np.float32)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)},
    ]
    assert len({rundir.digest(tree) for tree in bytes_alike}) == 4
    assert rundir.digest(bytes_alike[0]) == rundir.digest({"a": np.zeros(4, np.float32)})


def test_metrics_that_are_not_finite_are_absent(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "a": [null, Infinity, 2]}\n')
    values = rundir.read_metrics(tmp_path, 3)["a"][1]
    np.testing.assert_array_equal(values, [[np.nan, np.nan, 2.0]])


def test_a_damaged_description_is_named(tmp_path):
    (tmp_path / "meta.json").touch()
    with pytest.raises(ValueError, match=r"meta.json is damaged"):
        rundir.check_data(tmp_path, ["digest"])


def harmed(path, **changes):
    """An .npz file with arrays replaced, or left out where None."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: x for name, x in arrays.items() if x is not None})


def edited(path, change):
    saved = json.loads(path.read_text())
    change(saved)
    path.write_text(json.dumps(saved))


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        *((file, text) for file in ("config.json", "meta.json", "done.json")
          for text in ("", "null", "[]", "{}", "5", '{"a": ', "[" * 100_000)),
        *((file, text) for file in ("eval.npz", "final.npz") for text in ("", "hello", "PK\3\4")),
        ("config.json", lambda path: edited(path, lambda saved: saved.update(rows={}))),
        ("config.json", lambda path: edited(path, lambda saved: saved.update(config=[]))),
        ("config.json", lambda path: edited(path, lambda saved: saved["config"].pop("env"))),
        ("config.json", lambda path: edited(path, lambda saved: saved["rows"].update(labels=5))),
        ("config.json", lambda path: edited(path, lambda x: x["rows"].update(labels=[1, 2, 3, 4]))),
        ("config.json", lambda path: edited(path, lambda x: x["rows"].update(labels=[""]))),
        ("config.json", lambda path: edited(path, lambda x: x["rows"].update(seeds=[None] * 4))),
        ("done.json", lambda path: edited(path, lambda saved: saved["seconds"].update(train={}))),
        ("done.json", lambda path: edited(path, lambda saved: saved["seconds"].pop("compile"))),
        ("eval.npz", lambda path: harmed(path, steps=None)),
        ("eval.npz", lambda path: harmed(path, steps=np.arange(9))),
        ("eval.npz", lambda path: harmed(path, lengths=None)),
        ("eval.npz", lambda path: harmed(path, returns=np.zeros(3))),
        ("eval.npz", lambda path: harmed(path, returns=np.zeros((9, 3, 2)))),
        ("eval.npz", lambda path: harmed(path, returns=np.zeros((4, 0, 2)), steps=np.zeros(0))),
        ("eval.npz", lambda path: path.write_bytes(b"\x93NUMPY\1")),
        ("final.npz", lambda path: harmed(path, returns=None)),
        ("final.npz", lambda path: harmed(path, returns=np.zeros(4))),
        ("final.npz", lambda path: harmed(path, returns=np.zeros((9, 2)))),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named_in_one_line(tmp_path, file, harm):
    run_dir = write_run(tmp_path / "run")
    rundir.write_final(run_dir, {"returns": np.zeros((4, 6)), "lengths": np.zeros((4, 6))})
    report.summary("", rundir.read_run(run_dir), np.arange(4))
    (run_dir / file).write_text(harm) if isinstance(harm, str) else harm(run_dir / file)
    with pytest.raises(ValueError, match=file) as error:
        report.summary("", rundir.read_run(run_dir), np.arange(4))
    assert "damaged" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("step", ['"x"', "null", "[]"])
def test_a_step_that_is_no_number_is_damage(tmp_path, step):
    text = f'{{"global_step": {step}}}\n'
    (tmp_path / "metrics.jsonl").write_text(text + '{"global_step": 96}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged in line 1 \("):
        rundir.rewind(tmp_path, 1, 96, write=True)


def test_files_of_a_measurement(tmp_path):
    out = tmp_path / "new" / "lr0.1"
    table, numbers = rundir.measurement_files(out, False)
    assert (table.name, numbers.name) == ("lr0.1.md", "lr0.1.json")
    assert out.parent.is_dir()  # before the measurement, which takes long
    numbers.touch()
    with pytest.raises(ValueError, match=r"lr0.1.json exists: choose another name, or --force"):
        rundir.measurement_files(out, False)
    assert rundir.measurement_files(out, True) == (table, numbers)


# --- one process, one run ---


def test_a_run_directory_has_one_process(tmp_path):
    held = rundir.lock(tmp_path)
    with pytest.raises(ValueError, match="is in use by another process"):
        rundir.lock(tmp_path)
    held.release()
    rundir.lock(tmp_path).release()


@pytest.mark.parametrize(
    "name", ["config.json", "eval.npz", "policy_s000.npz", "checkpoints", "tensorboard"]
)
def test_any_file_of_a_run_marks_its_directory(tmp_path, name):
    assert not rundir.files(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert not rundir.files(tmp_path)
    (tmp_path / name).touch()
    assert rundir.files(tmp_path) == [tmp_path / name]


def test_final_returns_of_further_policies_are_the_last(tmp_path):
    run_dir = write_run(tmp_path / "run")
    evals = dict(np.load(run_dir / "eval.npz"))
    np.savez(run_dir / "eval.npz", **evals, max_q_returns=evals["returns"] + 7.0)
    run = rundir.read_run(run_dir)
    np.testing.assert_array_equal(run.final, run.returns[:, -1])
    np.testing.assert_array_equal(run.final_further["max_q"], run.returns[:, -1] + 7.0)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    rundir.check_new([tmp_path / "new" / "a.json", None], force=False)
    asked = []
    monkeypatch.setattr(rundir.os, "access", lambda *x: bool(asked.append(x)))
    with pytest.raises(ValueError, match=f"a.json: {tmp_path} is no folder that can be written to"):
        rundir.check_new([tmp_path / "new" / "a.json"], force=True)
    assert asked == [(tmp_path, rundir.os.W_OK)]


def test_a_run_that_goes_back_keeps_no_later_record(tmp_path):
    """Evaluations after 0, 100 and 200 steps."""
    path = write_run(tmp_path / "run")
    last = json.dumps({"global_step": 100, "final/episodic_return": [0.0] * 4})
    (path / "metrics.jsonl").write_text(f'{{"global_step": 100}}\n{last}\n')
    rundir.rewind(path, 4, 100, write=False)
    assert len(rundir.read_evals(path / "eval.npz", 4)["steps"]) == 3
    rundir.rewind(path, 4, 100, write=True)
    assert (path / "metrics.jsonl").read_text() == '{"global_step": 100}\n'
    assert rundir.read_evals(path / "eval.npz", 4)["steps"].tolist() == [0, 100]
    rundir.rewind(path, 4, -1, write=True)
    assert not (path / "eval.npz").exists()
