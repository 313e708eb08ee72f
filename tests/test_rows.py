"""Rows: seeds and swept values, and who trains them."""

import jax
import numpy as np
import pytest
import tiny
from launching import LAUNCH, checkpoint, run, strict_json
from tiny import assert_close, lines_of

from algos import bpo, ppo
from algos.launch import cli, policies, report, rows, rundir

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


SWEPT = [*tiny.flags_of(tiny.config_of("ppo"), swept=("learning_rate",)), *LAUNCH]


def test_rows_of_a_sweep():
    config = tiny.config_of("ppo")
    sweep = ("learning_rate=1e-3,2e-3", "gamma=0.9,0.99")
    swept = rows.make_rows(cli.Launch(seed=5, num_seeds=2, sweep=sweep), config, ppo.TRACEABLE)
    assert swept.seeds.tolist() == [5, 6] * 4
    np.testing.assert_allclose(swept.hparams["learning_rate"], np.repeat([1e-3, 2e-3], 4))
    np.testing.assert_allclose(swept.hparams["gamma"], np.tile(np.repeat([0.9, 0.99], 2), 2))
    assert swept.labels[2] == swept.labels[3] == "learning_rate=0.001 gamma=0.99"
    plain = rows.make_rows(cli.Launch(seed=5, num_seeds=2), config, ppo.TRACEABLE)
    assert (plain.seeds.tolist(), plain.hparams, plain.labels) == ([5, 6], {}, ["", ""])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("learning_rate=1e-3,1e-50", "learning_rate=1e-50: float32 has no such number"),
        ("learning_rate=1e-3,1e50", r"learning_rate=1e\+50: float32 has no such number"),
        ("gamma=0.9,0.99999999", "clip_targets=True needs gamma below 1"),  # as float32 it is 1
    ],
)
def test_swept_values_are_checked_as_they_are_trained(item, message):
    config = tiny.config_of("bpo", clip_targets=True)
    with pytest.raises(ValueError, match=message):
        rows.make_rows(cli.Launch(sweep=(item,)), config, bpo.TRACEABLE)


def test_dead_seeds_are_named_and_left_out(whole, tmp_path):
    run_dir = tmp_path / "run"
    status, said = run(*SWEPT, "--sweep", "learning_rate=3e-4,1e30", "--run-dir", str(run_dir))
    assert status == 0
    for seed in (0, 1):
        dead = [x for x in said.splitlines() if x.startswith(f"seed {seed}") and "dead" in x]
        assert len(dead) == 1
        assert "learning_rate=1e+30" in dead[0]
    assert "  learning_rate=0.0003 | IQM" in said
    assert "  learning_rate=1e+30 | no seed is alive" in said

    swept, plain = rundir.read_run(run_dir), rundir.read_run(whole[0])
    assert swept.labels == ["learning_rate=0.0003"] * 2 + ["learning_rate=1e+30"] * 2
    np.testing.assert_allclose(swept.returns[:2], plain.returns, rtol=1e-3)
    assert np.isfinite(swept.returns[:, 0]).all()
    assert np.isnan(swept.returns[2:, 1:]).all()
    state = checkpoint(run_dir)
    assert_close(
        {k: v[:2] for k, v in state.items() if "params" in k},
        {k: v for k, v in checkpoint(whole[0]).items() if "params" in k},
        rtol=1e-3,
        atol=1e-4,
    )
    about = policies.describe_policy(run_dir / "policy_s001.npz")
    assert (about["label"], about["config"]["learning_rate"]) == ("learning_rate=0.0003", 0.0003)
    last = [x for x in lines_of(run_dir) if "losses/policy_loss" in x][-1]
    assert last["health/seeds_alive"] == 2
    assert last["health/finite"] == [1, 1, 0, 0]
    assert last["losses/policy_loss"][2:] == [None, None]
    assert None not in last["losses/policy_loss"][:2]
    done = strict_json(run_dir / "done.json")
    assert done["alive"] == 2
    good, bad = done["results"]
    assert good["iqm"] == pytest.approx(report.iqm(plain.final.mean(1)), rel=1e-3)
    assert (bad["label"], bad["iqm"]) == ("learning_rate=1e+30", None)
    assert bad["per_seed"] == [None, None]


def test_a_launch_ends_when_every_seed_is_dead(tmp_path):
    run_dir = tmp_path / "run"
    status, said = run(*SWEPT, "--sweep", "learning_rate=1e29,1e30", "--run-dir", str(run_dir))
    assert status == 3
    assert "no seed is alive" in said
    assert [x["global_step"] for x in lines_of(run_dir)] == [0, 96, 96, 96]
    assert strict_json(run_dir / "done.json")["alive"] == 0
    assert rundir.read_run(run_dir).final.shape[1] == 6  # as many episodes as other launches have
    before = (run_dir / "eval.npz").read_bytes()
    status, said = run("--resume", str(run_dir))
    assert status == 2
    assert said.endswith(f"error: {run_dir} is complete: every seed died\n")
    assert (run_dir / "eval.npz").read_bytes() == before


def test_rows_are_shared_by_hosts_in_order(monkeypatch):
    six = rows.Rows(np.arange(6), {"gamma": np.linspace(0, 1, 6)}, list("abcdef"))
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    mine = rows.local(six)
    assert (mine.seeds.tolist(), mine.labels) == ([2, 3], ["c", "d"])
    np.testing.assert_allclose(mine.hparams["gamma"], [0.4, 0.6])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="6 rows cannot be shared by 4 hosts"):
        rows.local(six)


def test_keys_of_evaluations_are_apart_from_those_of_training():
    """Training splits its seed's key; what that gives, and what it gives split again."""
    keys, _ = rows.inputs(seeds := rows.Rows(np.arange(3), {}, [""] * 3))
    split = jax.vmap(lambda key: jax.random.split(key, 8))
    once = split(keys)
    twice = split(once.reshape(-1))
    evaluated = [rows.evaluation_keys(seeds, *x) for x in ((0, 0), (1, 0), (1, 1))]
    training = [keys, once.reshape(-1), twice.reshape(-1)]
    data = lambda x: {tuple(k) for part in x for k in jax.random.key_data(part).tolist()}
    assert not data(evaluated) & data(training)


def test_a_seed_stays_dead_when_the_run_is_resumed(tmp_path):
    run_dir = tmp_path / "run"
    run(*SWEPT, "--sweep", "learning_rate=3e-4,1e30", "--run-dir", str(run_dir))
    (run_dir / "done.json").unlink()
    assert run("--resume", str(run_dir))[0] == 0
    assert np.isnan(rundir.read_run(run_dir).final[2:]).all()
    assert strict_json(run_dir / "done.json")["alive"] == 2
