"""Comparison, rendering and the statistics behind them."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from algos import ppo, rundir
from experiments import compare, render


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two seeds, as the launcher leaves it, whose second seed died."""
    path = tmp_path_factory.mktemp("runs") / "run"
    path.mkdir()
    write_run(path, np.array([[[1.0, 3.0], [10.0, 20.0]], [[2.0, 2.0], [np.nan, np.nan]]]))
    return path


def write_run(path, returns, env="cartpole"):
    num_rows, num_evals, _ = returns.shape
    rundir.write_json(
        path / "config.json",
        {
            "algo": "ppo",
            "config": {"env": env},
            "launch": {},
            "rows": {"seeds": list(range(num_rows)), "labels": [""] * num_rows},
        },
    )
    rundir.write_json(path / "meta.json", {"num_devices": 2, "device": "cpu"})
    evals = {
        "steps": [100 * i for i in range(num_evals)],
        "seconds": [0.5 * i for i in range(num_evals)],
        "returns": list(returns.transpose(1, 0, 2)),
        "lengths": list(returns.transpose(1, 0, 2)),
    }
    rundir.write_evals(path, evals)


def test_iqm_is_the_mean_of_the_middle_half():
    x = np.array([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0])
    assert rundir.iqm(x) == pytest.approx(np.mean([2.0, 3.0, 4.0, 5.0]))
    assert rundir.iqm(np.append(x, np.nan)) == rundir.iqm(x)  # a dead seed is left out
    assert np.isnan(rundir.iqm(np.array([np.nan])))


def test_interval_covers_the_iqm_and_shrinks_with_seeds():
    rng = np.random.default_rng(1)
    few, many = rng.normal(size=10), rng.normal(size=1000)
    for x in (few, many):
        lo, hi = rundir.iqm_interval(x)
        assert lo < rundir.iqm(x) < hi
    assert np.diff(rundir.iqm_interval(many)) < np.diff(rundir.iqm_interval(few)) / 3
    reference = stats.bootstrap(
        (many,), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), method="percentile", rng=0
    ).confidence_interval
    assert np.allclose(rundir.iqm_interval(many), reference, atol=0.02)


def test_run_is_read_as_it_was_written(run_dir):
    run = rundir.read_run(run_dir)
    assert run.returns.shape == (2, 2, 2)
    assert run.returns[0, 1].tolist() == [10.0, 20.0]
    assert run.steps.tolist() == [0, 100]
    assert run.done is None


def test_table_names_dead_seeds_and_steps(run_dir):
    text = compare.table(compare.curves_of([rundir.read_run(run_dir)]))
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells[0] == "ppo"
    assert cells[1] == "gymnax/CartPole-v1"
    assert cells[2] == "1/2"
    assert cells[3].startswith("15.0")
    assert cells[4] == "100"
    assert cells[6] == "not finished"


def test_compare_draws_and_prints(run_dir, tmp_path, capsys):
    compare.main([str(run_dir), str(run_dir), "--out", str(tmp_path / "c.png")])
    assert "| run |" in capsys.readouterr().out
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("L").getdata())) > 10  # not an empty sheet


def test_compare_refuses_other_environments_and_no_runs(run_dir, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    write_run(other, np.ones((1, 2, 2)), env="pendulum")
    for arguments in ([str(run_dir), str(other)], [str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            compare.main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_render_draws_best_median_and_worst(tmp_path, monkeypatch, signals):
    monkeypatch.chdir(tmp_path)
    flags = "--num-seeds 3 --total-timesteps 64 --num-envs 4 --num-steps 8 --num-minibatches 2"
    flags += " --num-evals 1 --eval-episodes 2 --verbose 0 --run-dir run --render"
    monkeypatch.setattr("sys.argv", ["ppo.py", *flags.split()])
    ppo.main()
    run = rundir.read_run("run")
    final = run.returns[:, -1].mean(-1)
    names = sorted(path.name for path in (tmp_path / "run" / "videos").iterdir())
    assert [name.split("_")[0] for name in names] == ["best", "median", "worst"]
    assert names[0] == f"best_s{final.argmax():03d}.gif" or (final == final.max()).sum() > 1
    with Image.open(tmp_path / "run" / "videos" / names[0]) as video:
        assert video.format == "GIF"
        assert video.n_frames > 1
    assert json.loads((tmp_path / "run" / "done.json").read_text())["alive"] == 3


def test_render_says_what_is_missing(run_dir):
    with pytest.raises(ValueError, match="does not exist"):
        render.render_run(run_dir)
