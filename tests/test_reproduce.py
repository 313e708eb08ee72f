"""Reproductions: which runs are started, resumed or left alone, and the table of them."""

import dataclasses
import functools
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from matplotlib.axes import Axes
from test_experiments import write_run
from test_html_report import write_metrics

import envs
from algos import brac as brac_file
from algos import common
from algos.launch import cli, datasets, report, rundir
from experiments import runner
from experiments.reproduce import bnpo, bpo, brac, p3o, reppo, v5
from experiments.runner import Job, command

MODULES = {
    "reppo": reppo,
    "p3o": p3o,
    "bnpo": bnpo,
    "bpo": bpo,
    "brac": brac,
    "v5": v5,
}
JOBS = [
    (name, group, job)
    for name, module in MODULES.items()
    for group, jobs in module.GROUPS.items()
    for job in jobs
]


@functools.cache
def config_of(job):
    """What the job would run."""
    argv = runner.flags_of(job, Path("HERE") / job.name, Path("HERE") / job.name)
    module = importlib.import_module(f"algos.{job.algo}")
    return cli.parse(job.algo, module.Config, module.PRESETS, argv)[0]


@pytest.mark.parametrize(("name", "group", "job"), JOBS, ids=lambda x: getattr(x, "name", x))
def test_every_job_is_a_valid_launch(name, group, job):
    config = config_of(job)
    common.check(config)
    assert envs.canonical(config.env) == envs.canonical(job.task)


def test_jobs_do_not_share_a_directory():
    names = [(name, group, job.task, job.name) for name, group, job in JOBS]
    assert len(set(names)) == len(names)


def test_no_two_jobs_of_a_task_run_the_same():
    """A job that lost its flags would be another job's result under its name."""
    for name, module in MODULES.items():
        for group, jobs in module.GROUPS.items():
            seen = {}
            for job in jobs:
                settings = (job.task, job.algo, repr(config_of(job)))
                assert settings not in seen, (name, group, job.name, seen[settings])
                seen[settings] = job.name


def changed_fields(job, default):
    """Names of the fields in which the two jobs' configurations differ."""
    ours, theirs = vars(config_of(job)), vars(config_of(default))
    return [name for name in theirs if ours[name] != theirs[name]]


def test_ablations_on_v5_change_one_field_of_the_preset():
    jobs = v5.GROUPS["ablations"]
    changed = {(job.name, job.task): changed_fields(job, job._replace(flags="")) for job in jobs}
    assert changed == {
        ("kl", "gym/Hopper-v5"): ["mu_loss"],
        ("kl", "gym/HalfCheetah-v5"): ["mu_loss"],
        ("centred", "gym/Hopper-v5"): ["mu_loss"],
        ("ppo_clip_0.4", "gym/Hopper-v5"): ["clip_eps"],
        ("ppo_clip_0.4", "gym/HalfCheetah-v5"): ["clip_eps"],
        **{("bpo_clip_0.3", f"gym/{task}-v5"): ["clip_eps"] for task in v5.BPO},
    }


@pytest.mark.parametrize("group", bpo.GROUPS)
def test_the_authors_of_bpo_compare_it_with_ppo_in_equal_settings(group):
    jobs = {(job.task, job.name): job for job in bpo.GROUPS[group]}
    for (task, _), job in jobs.items():
        ppo = jobs[task, "ppo"]
        assert ppo.algo == "ppo"
        assert vars(config_of(ppo)).items() <= vars(config_of(job)).items()


@pytest.mark.parametrize("name", ["reppo", "p3o", "bnpo"])
def test_ablations_change_one_thing_each(name):
    groups = MODULES[name].GROUPS
    jobs = {job.name: job for job in [*groups["ablations"], *groups.get("details", [])]}
    default = jobs.pop("default")
    for ablation in jobs.values():
        assert len(changed_fields(ablation, default)) == 1, ablation


@pytest.mark.parametrize("name", ["reppo", "p3o", "bnpo"])
def test_runs_of_a_task_have_equal_steps(name):
    jobs = MODULES[name].GROUPS["tasks"]
    for task in {job.task for job in jobs}:
        assert len({config_of(job).total_timesteps for job in jobs if job.task == task}) == 1


def test_a_job_is_started_resumed_or_left_alone(tmp_path):
    job, run_dir = Job("cartpole", "fast", "ppo", "--gamma 0.9"), tmp_path / "run"
    started = command(job, run_dir, 0, 3)
    assert started[0] == sys.executable
    assert started[1].endswith("algos/ppo.py")
    flags = ["--env", "cartpole", "--gamma", "0.9", "--seed", "0", "--num-seeds", "3"]
    assert started[2:] == [*flags, "--run-dir", str(run_dir)]
    write_run(run_dir, done=False)
    described_by(job, run_dir)
    assert command(job, run_dir, 0, 3)[2:] == ["--resume", str(run_dir)]
    other = job._replace(flags="--gamma 0.8")  # as after an edit of the list of jobs
    with pytest.raises(
        ValueError, match=r"has other settings \(gamma=0.9, now 0.8\): move it away"
    ):
        command(other, run_dir, 0, 3)
    (run_dir / "done.json").write_text("{}")
    assert command(job, run_dir, 0, 3) is None


def described_by(job, run_dir):
    """Give a run that `write_run` wrote the settings of a job."""
    module = importlib.import_module(f"algos.{job.algo}")
    argv = runner.flags_of(job, run_dir, run_dir)
    config, launch = cli.parse(job.algo, module.Config, module.PRESETS, argv)
    settings = {"config": dataclasses.asdict(config), "launch": dataclasses.asdict(launch)}
    saved = rundir.read_description(run_dir) | settings
    rundir.write_json(run_dir / "config.json", saved)
    return saved


def write_job(module, group, task, name, out, **returns):
    """A complete run of this job of a reproduction, with the settings that it names."""
    (job,) = [x for x in module.GROUPS[group] if (x.task, x.name) == (task, name)]
    run_dir = write_run(out / group / task / name, task, algo=job.algo, **returns)
    saved = rundir.read_description(run_dir)
    named = [x.removeprefix("--").replace("-", "_") for x in job.flags.split()]
    saved["config"] |= {k: v for k, v in vars(config_of(job)).items() if k in named}
    saved["launch"]["sweep"] = []
    rundir.write_json(run_dir / "config.json", saved)
    return run_dir


@pytest.fixture
def cloned(tmp_path):
    """A job that learns from clones, its complete run of seeds 0 to 3, and what that says."""
    job, run_dir = Job("pendulum", "kl", *brac.LEARNERS["brac_kl_vp"]), tmp_path / "kl"
    write_run(run_dir, algo="brac")
    (run_dir / "final.npz").touch()
    return job, run_dir, described_by(job, run_dir)


def test_seeds_are_added_to_a_run(cloned, capsys):
    """Seeds 4 and 5 after 0 to 3, which learn from the clones of those seeds."""
    job, run_dir, saved = cloned
    more = run_dir.with_name("kl_s4")
    flags = command(job, run_dir, 4, 2)[2:]
    assert flags[-6:] == ["--seed", "4", "--num-seeds", "2", "--run-dir", str(more)]
    assert flags[flags.index("--behavior") + 1] == str(run_dir.with_name("bc_s4"))
    write_run(more, seeds=(4, 5), done=False)
    config = saved["config"] | {"behavior": str(run_dir.with_name("bc_s4"))}
    description = saved | {"config": config, "rows": {"seeds": [4, 5], "labels": ["", ""]}}
    rundir.write_json(more / "config.json", description)
    assert command(job, run_dir, 4, 2)[2:] == ["--resume", str(more)]
    assert command(job, run_dir, 0, 4) is None
    (more / "done.json").write_text("{}")
    with pytest.raises(ValueError, match=r"kl_s4 has no final.npz, .*: move it away"):
        command(job, run_dir, 6, 3)
    (more / "final.npz").touch()
    assert command(job, run_dir, 4, 2) is None
    assert command(job, run_dir, 0, 6) is None
    assert capsys.readouterr().err == ""
    assert command(job, run_dir, 0, 8) is None
    message = f"{run_dir} is complete: --seed 6 --num-seeds 2 adds 2 seeds\n"
    assert capsys.readouterr().err == message
    assert command(job, run_dir, 6, 3)[-2:] == ["--run-dir", str(run_dir.with_name("kl_s6"))]


@pytest.mark.parametrize(
    ("where", "changed", "message"),
    [
        ("config", {"gamma": 0.5}, r"kl has other settings \(gamma=0.5, now 0.99\): move it away"),
        (
            "launch",
            {"sweep": ["alpha=1,2"]},
            r"kl .* \(sweep=\('alpha=1,2',\), now",
        ),
        ("rows", {"seeds": [0, 6]}, r"kl has seed 6 already: give other seeds, or move it away"),
    ],
)
def test_seeds_are_not_added_to_another_run(where, changed, message, cloned):
    job, run_dir, saved = cloned
    rundir.write_json(run_dir / "config.json", saved | {where: saved[where] | changed})
    with pytest.raises(ValueError, match=message):
        command(job, run_dir, 4, 3)


def test_added_seeds_count_as_one_run(tmp_path, capsys):
    """A sweep of two values, with a further policy; seeds 0 and 1, then 2."""
    folder, job = tmp_path / "pendulum", Job("pendulum", "kl", "ppo")
    for name, seeds in {"kl": (0, 1), "kl_s2": (2,)}.items():
        run_dir = write_run(folder / name, "pendulum", ("alpha=1", "alpha=2"), seeds)
        evals = dict(np.load(run_dir / "eval.npz"))
        np.savez(run_dir / "eval.npz", **evals, best_returns=evals["returns"] + 1000.0)
    write_run(folder / "kl_s3", "pendulum", ("alpha=1", "alpha=2"), (3,), done=False)
    rundir.write_json(folder / "kl_s2" / "meta.json", {"commit": "b"})
    done = runner.summarise([job], tmp_path)
    assert capsys.readouterr().err == f"{folder}/kl: seeds of several commits: a, b\n"
    run = done.runs[job]
    assert run.seeds.tolist() == [0, 1, 0, 1, 2, 2]
    assert [(label, x.tolist()) for label, x in report.groups(run)] == [
        ("alpha=1", [0, 1, 4]),
        ("alpha=2", [2, 3, 5]),
    ]
    last = np.array([2.0, 12.0, 2.0, 12.0, 22.0, 22.0])
    np.testing.assert_allclose(run.returns[:, -1].mean(-1), last)
    np.testing.assert_allclose(run.lengths, run.returns)
    np.testing.assert_allclose(run.further["best"], run.returns + 1000.0)
    assert run.seconds.tolist() == [0.0, 2.0, 4.0]
    assert [(x["n"], x["train_seconds"], x["compile_seconds"]) for x in done.rows] == [
        (3, 4.0, 60.0),
        (3, 4.0, 60.0),
    ]


def test_a_launch_whose_seeds_all_died_is_shorter(tmp_path):
    """It is the first, of two seeds, with two of the three evaluations."""
    job, folder = Job("pendulum", "kl", "ppo"), tmp_path / "pendulum"
    dead = write_run(folder / "kl", "pendulum", seeds=(0, 1))
    evals = dict(np.load(dead / "eval.npz"))
    evals |= {name: evals[name][:, :2] for name in ("returns", "lengths")}
    evals["returns"][:] = np.nan
    evals |= {name: evals[name][:2] for name in ("steps", "seconds")}
    np.savez(dead / "eval.npz", **evals)
    write_run(folder / "kl_s2", "pendulum", seeds=(2,))
    done = runner.summarise([job], tmp_path)
    run = done.runs[job]
    assert np.isnan(run.returns[:2]).all()
    assert run.returns[2].mean(-1).tolist() == [20.0, 21.0, 22.0]
    assert (run.steps.tolist(), run.seconds.tolist()) == ([0, 100, 200], [0.0, 2.0, 3.0])
    assert [(row["n"], row["alive"], row["iqm"]) for row in done.rows] == [(3, 1, 22.0)]


@pytest.mark.parametrize(
    ("seeds", "steps", "episodes", "message"),
    [
        ((1, 2), [0, 100, 200], 2, r"kl_s1 has seed 1 again: move it away"),
        ((2,), [0, 200, 400], 2, r"kl_s2 has other evaluations than .*kl: move it away"),
        ((2,), [0, 100, 200], 3, r"kl_s2 has other evaluations than .*kl: move it away"),
    ],
)
def test_launches_that_do_not_go_together_are_no_run(tmp_path, seeds, steps, episodes, message):
    folder = tmp_path / "pendulum"
    write_run(folder / "kl", "pendulum", seeds=(0, 1))
    path = write_run(folder / f"kl_s{seeds[0]}", "pendulum", seeds=seeds)
    np.savez(path / "eval.npz", **dict(np.load(path / "eval.npz")) | {"steps": np.array(steps)})
    final = np.zeros((len(seeds), episodes))
    rundir.write_final(path, {"returns": final, "lengths": final})
    with pytest.raises(ValueError, match=message):
        runner.summarise([Job("pendulum", "kl", "ppo")], tmp_path)


def test_a_table_is_checked_before_anything_runs(tmp_path, monkeypatch, capsys):
    """By the complete runs of the whole group, also those that are not asked for."""
    ran = []
    monkeypatch.setattr(runner, "run", ran.append)
    folder = tmp_path / "tasks" / "pendulum"
    write_run(folder / "reppo", "pendulum", seeds=(0, 1))
    write_run(folder / "reppo_s1", "pendulum", seeds=(1, 2))
    with pytest.raises(SystemExit):
        reppo.main(["tasks", "--tasks", "CheetahRun", "--out", str(tmp_path)])
    assert "reppo_s1 has seed 1 again: move it away" in capsys.readouterr().err
    assert ran == []


def test_a_folder_may_have_a_space():
    job = Job("pendulum", "kl", "brac", "--dataset {here}/data.npz --sweep {{alpha}}")
    flags = runner.flags_of(job, Path("my runs/kl"), Path("my runs/kl"))
    assert flags[2:] == ["--dataset", "my runs/data.npz", "--sweep", "{alpha}"]


def test_nothing_is_run_again_and_the_table_is_written(tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "run", ran.append)
    task = "CartpoleBalance"
    write_job(reppo, "published", task, "reppo", tmp_path, offset=900.0)
    argv = ["published", "--tasks", task, "--out", str(tmp_path)]
    reppo.main(argv)
    assert ran == []
    text = (tmp_path / "published" / "table.md").read_text()
    assert text == capsys.readouterr().out
    assert "| CartpoleBalance | 999.6 ± 0.2 (n=10) | 917.0 ± 11.2 (n=4) |" in text
    assert (tmp_path / "published" / "table.json").exists()
    assert (tmp_path / "published" / f"{task}.png").exists()
    with pytest.raises(SystemExit):
        reppo.main(["tasks", "published", "--seed", "2", "--out", str(tmp_path)])
    assert "reppo has seed 2 already" in capsys.readouterr().err
    assert ran == []  # not even what comes before it
    reppo.main(["tasks", "tasks", "--tasks", "CheetahRun", "--out", str(tmp_path)])
    assert [argv[2:4] for argv in ran] == [["--env", "CheetahRun"]] * 2
    reppo.main(["tasks", "--jobs", "ppo", "--out", str(tmp_path)])
    assert {argv[1].rpartition("/")[2] for argv in ran[2:]} == {"ppo.py"}


def test_runs_are_beside_their_own_published_numbers(tmp_path, monkeypatch):
    """Runs of a task are together in the table, and the group lists them by algorithm."""
    monkeypatch.setattr(runner, "run", lambda argv: None)
    for task, algo, offset in (("Hopper", "ppo", 100), ("Hopper", "bpo", 200), ("Ant", "ppo", 300)):
        name = f"gym/{task}-v5"
        write_run(tmp_path / "tasks" / name / algo, name, offset=float(offset), algo=algo)
    v5.main(["tasks", "--out", str(tmp_path)])
    *_, hopper, ant = (tmp_path / "tasks" / "table.md").read_text().splitlines()
    assert hopper.startswith("| gym/Hopper-v5 | 117.0 [")
    assert hopper.endswith("| 117 ± 11 | 2383 ± 272 | 2609 ± 701 | 2410 |")
    assert ant.endswith("| 317 ± 11 |  | 3258 ± 1079 | 1327 |")
    write_run(tmp_path / "v5" / "gym/Ant-v5" / "bpo_zero", "gym/Ant-v5", algo="bpo")
    bpo.main(["v5", "--out", str(tmp_path)])
    assert "| gym/Ant-v5 | bpo_zero | 17.0 [" in (tmp_path / "v5" / "table.md").read_text()
    assert "| 17 ± 11 | 1690 ± 125 |" in (tmp_path / "v5" / "table.md").read_text()


@pytest.mark.parametrize(("task", "steps"), [("pendulum", "100000"), ("gym/Hopper-v5", "200000")])
def test_a_dataset_is_collected_before_what_learns_from_it(tmp_path, monkeypatch, task, steps):
    ran = []

    def run(argv):
        ran.append(argv[1:])
        datasets.write(data, tiny.transitions(4), {"env": task})

    monkeypatch.setattr(runner, "run", run)
    shipped = brac.POLICY_RESULTS
    monkeypatch.setattr(brac, "POLICY_RESULTS", tmp_path / "none")
    argv = ["eps1", "--tasks", task, "--num-seeds", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=f"no partly trained policy of {task} in {tmp_path}: run"):
        brac.main(argv)
    policy = tmp_path / "policy" / task / "sac" / "partial_s001.npz"
    policy.parent.mkdir(parents=True)
    policy.touch()
    here = tmp_path / "eps1" / task
    bc, dual = (Job(task, x, *brac.LEARNERS[x]) for x in ("bc", "brac_dual_kl_pr"))
    data = here / "data.npz"
    data.parent.mkdir(parents=True)
    brac.collect(bc, here / "bc")
    sizes = ["--type", "eps1", "--steps", steps, "--out", str(data)]
    script = os.path.relpath(runner.ROOT / "experiments" / "collect_data.py")
    assert ran == [[script, str(policy), *sizes]]
    assert json.loads((here / "data.json").read_text()) == {"env": task}
    brac.collect(dual, here / "brac_dual_kl_pr")
    assert len(ran) == 1
    monkeypatch.setattr(brac, "POLICY_RESULTS", shipped)
    policy.unlink()
    data.unlink()
    brac.collect(bc, here / "bc")
    assert ran[1:] == [[script, str(shipped / task / "sac" / "partial_s000.npz"), *sizes]]
    assert str(data) in command(dual, here / "brac_dual_kl_pr", 0, 2)


def test_soft_actor_critic_offline_is_its_preset():
    jobs = [job for job in brac.GROUPS["pure"] if job.name == "offline_sac"]
    preset = brac_file.PRESETS["sac"].items()
    assert all(vars(config_of(job)).items() >= preset for job in jobs)


def test_both_policies_are_in_the_table(tmp_path):
    folder = tmp_path / "pure"
    here = folder / "pendulum"
    for name in ("bc", "brac_kl_vp"):
        write_run(here / name, env="pendulum", offset=100.0)
    parts = [{"count": n, "returns": {"mean": mean}} for n, mean in ((1, 10.0), (3, 20.0))]
    rundir.write_json(here / "data.json", {"env": "pendulum", "parts": parts})
    jobs = [Job("pendulum", name, *brac.LEARNERS[name]) for name in ("bc", "brac_kl_vp")]
    run = rundir.read_run(here / "brac_kl_vp")
    evals = {"steps": run.steps, "seconds": run.seconds}
    for name, x in {"returns": run.returns, "lengths": run.lengths}.items():
        evals[name] = list(np.swapaxes(x, 0, 1))
    evals["max_q_returns"] = [x + 1000.0 for x in evals["returns"]]
    rundir.write_evals(here / "brac_kl_vp", evals)
    text = brac.further(runner.summarise(jobs, folder))
    greedy = report.iqm(run.returns[:, -1].mean(-1))
    assert f"| pendulum | bc | {greedy:.1f} [" in text
    assert "|  | 17.5 |" in text
    assert f"| {greedy + 1000:,.1f} [" in text


def test_returns_are_drawn_against_alpha(tmp_path, monkeypatch):
    """Two values of alpha, and a learner without."""
    labels = ("alpha=0.1", "alpha=10.0")
    write_run(tmp_path / "pendulum" / "brac_kl_vp", env="pendulum", labels=labels)
    write_run(tmp_path / "pendulum" / "bc", env="pendulum", offset=100.0)
    part = {"count": 1, "returns": {"mean": 5.0}}
    rundir.write_json(tmp_path / "pendulum" / "data.json", {"parts": [part]})
    jobs = [Job("pendulum", name, *brac.LEARNERS[name]) for name in ("bc", "brac_kl_vp")]
    done, drawn = runner.summarise(jobs, tmp_path), {}

    def spy(kind):
        real = getattr(Axes, kind)

        def draw(axis, *args, label, **options):
            drawn[label] = kind, *args
            return real(axis, *args, label=label, **options)

        monkeypatch.setattr(Axes, kind, draw)

    spy("errorbar")
    spy("axhline")
    brac.plot_alphas(done)
    assert drawn["bc"] == ("axhline", 117.0)
    kind, alpha, middle, error = drawn["brac_kl_vp"]
    assert (kind, alpha, middle.tolist()) == ("errorbar", [0.1, 10.0], [17.0, 17.0])
    assert (error > 0).all()
    assert drawn["behaviour policy"] == ("axhline", 5.0)
    assert (tmp_path / "pendulum_alpha.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_sweep_the_best_value_is_drawn(tmp_path, monkeypatch):
    labels = ("alpha=0.1", "alpha=1", "alpha=10")
    folder = tmp_path / "pendulum" / "brac_kl_vp"
    write_run(folder, env="pendulum", labels=labels)
    run = rundir.read_run(folder)
    better = run.returns + np.repeat([0.0, 50.0, np.nan], 4)[:, None, None]
    evals = {"steps": run.steps, "seconds": run.seconds}
    evals |= {"returns": [*better.swapaxes(0, 1)], "lengths": [*run.lengths.swapaxes(0, 1)]}
    rundir.write_evals(folder, evals)
    drawn = []
    monkeypatch.setattr(report, "plot_curves", lambda runs, *_: drawn.extend(runs))
    jobs = [Job("pendulum", "brac_kl_vp", *brac.LEARNERS["brac_kl_vp"])]
    done = runner.summarise(jobs, tmp_path)
    assert [name for name, *_ in drawn] == ["brac_kl_vp alpha=1"]
    assert [row["label"] for row in done.rows] == [f"brac_kl_vp {label}" for label in labels]


def test_episodes_to_a_return_are_counted(tmp_path, capsys, monkeypatch):
    """Over seeds 18.5, 19.5 and 20.5 after 0, 100 and 200 steps, 32 in an episode of all."""
    monkeypatch.setattr(runner, "run", lambda argv: None)
    run = write_job(bnpo, "tasks", bnpo.TASK, "a1", tmp_path, offset=3.5)
    evals = dict(np.load(run / "eval.npz"))
    evals["returns"][3, -1] = 29.0  # still the best one
    np.savez(run / "eval.npz", **evals)
    write_job(bnpo, "tasks", bnpo.TASK, "ppo", tmp_path)
    bnpo.main(["tasks", "--out", str(tmp_path)])
    text = (tmp_path / "tasks" / "table.md").read_text()
    assert text == capsys.readouterr().out
    # The last seed begins at 33.5 and ends at 29, the one before it ends at 25.5.
    assert "| a1 | 0, 7, - | 1 of 4 | 259, 279, 319 |\n" in text
    write_job(bnpo, "ppo", bnpo.TASK, "small", tmp_path)
    bnpo.main(["ppo", "--out", str(tmp_path)])
    assert "Short episodes" not in capsys.readouterr().out


def test_differences_are_of_equal_steps(tmp_path, capsys, monkeypatch):
    """Of a1, which went on for longer, what it had after as many steps is taken away."""
    monkeypatch.setattr(runner, "run", lambda argv: None)
    write_job(bnpo, "tasks", bnpo.TASK, "a1", tmp_path)
    run = write_job(bnpo, "ablations", bnpo.TASK, "b1", tmp_path, offset=7.0)
    evals = np.load(run / "eval.npz").items()
    np.savez(run / "eval.npz", **{k: x[:2] if x.ndim == 1 else x[:, :2] for k, x in evals})
    bnpo.main(["ablations", "--out", str(tmp_path)])
    *_, header, _, a1, b1 = capsys.readouterr().out.splitlines()
    assert header == f"| {bnpo.TASK} | minus a1 |"
    assert a1 == "| a1 | - |"
    assert b1.startswith("| b1 | 7.0 [")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("a2c", {"algo": "ppo"}, "is a run of ppo, not p3o: move it away"),
        ("p3o", {"total_timesteps": 7}, r"has other settings (total_timesteps=7, now 500000)"),
        ("p3o", {"env": "pendulum"}, "has other settings (env=pendulum, now cartpole)"),
        ("p3o", {"sweep": ["gamma=0,1"]}, r"has other settings (sweep=['gamma=0,1'], now [])"),
    ],
)
def test_a_complete_run_of_something_else_is_not_shown(name, changed, message, tmp_path, capsys):
    run_dir = write_job(p3o, "tasks", "cartpole", name, tmp_path)
    saved = rundir.read_description(run_dir)
    for part in (saved, saved["config"], saved["launch"]):
        part |= {k: v for k, v in changed.items() if k in part}
    rundir.write_json(run_dir / "config.json", saved)
    with pytest.raises(SystemExit):
        p3o.main(["tasks", "--tasks", "cartpole", "--jobs", name, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tasks" / "table.md").exists()


def test_a_complete_run_may_be_a_copy_of_an_earlier_version(tmp_path, monkeypatch):
    """Other paths, a further field, and another value of a field that the job does not name."""
    monkeypatch.setattr(runner, "run", lambda argv: None)
    run_dir = write_job(p3o, "tasks", "cartpole", "p3o", tmp_path)
    saved = rundir.read_description(run_dir)
    saved["config"] |= {"gamma": 0.5, "removed": 1}
    rundir.write_json(run_dir / "config.json", saved)
    p3o.main(["tasks", "--tasks", "cartpole", "--jobs", "p3o", "--out", str(tmp_path)])
    assert "| p3o | gymnax/CartPole-v1 |" in (tmp_path / "tasks" / "table.md").read_text()


def test_tasks_without_these_jobs_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bpo.main(["v5", "--tasks", "gym/Ant-v5", "--jobs", "bpo_zero1.0", "--out", str(tmp_path)])
    assert "none of these tasks has one of these jobs" in capsys.readouterr().err
    assert not (tmp_path / "v5").exists()


def test_a_failed_launch_stops_the_program():
    runner.run([sys.executable, "-c", ""])
    runner.run([sys.executable, "-c", "raise SystemExit(3)"])  # every seed died
    for status in (1, 2, 130):
        with pytest.raises(SystemExit) as caught:
            runner.run([sys.executable, "-c", f"raise SystemExit({status})"])
        assert caught.value.code == status


def test_a_launch_that_is_killed_is_named(capsys):
    """As by a machine without memory; shells report 128 + the number of the signal."""
    with pytest.raises(SystemExit, match="137"):
        runner.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    said = capsys.readouterr().err
    assert "the launch was ended by signal 9\nstopped: the same command goes on" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["tasks", "--tasks", "ant"], "--tasks ant: choose from CartpoleBalance, CartpoleSwingup"),
        (["tasks", "--jobs", "sac"], "--jobs sac: choose from"),
        (["tasks", "--num-seeds", "0"], "--num-seeds 0"),
        (["tasks", "--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_is_one_error(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        reppo.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_belongs_to_one_run(tmp_path):
    """Further seeds of `line` go to line_s2, which may not be another task's."""
    for name in ("run", "run_s2", "run_s2x", "run_sx"):
        write_run(tmp_path / name)
    assert runner.launches(tmp_path / "run", "done.json") == [tmp_path / "run", tmp_path / "run_s2"]
    jobs = {tmp_path / name: Job(name, "ppo", "ppo") for name in ("mine:line", "mine:line_s2")}
    with pytest.raises(ValueError, match=r"line_s2 would also hold further seeds of .*mine:line"):
        runner.plan(jobs, 0, 1)


def test_only_runs_of_a_million_steps_are_beside_published_numbers(tmp_path):
    task = "gym/HalfCheetah-v5"
    jobs = [job for job in v5.GROUPS["tasks"] if job.algo == "sac" and job.task == task]
    for i, job in enumerate(jobs):
        write_run(tmp_path / task / job.name, task, offset=100.0 * i, algo="sac")
    text = v5.beside_published(runner.summarise(jobs, tmp_path))
    (row,) = [x for x in text.splitlines() if x.startswith(f"| {task} |")]
    assert row.endswith("| 17 ± 11 | 9635 ± 1424 | 12139 ± 1049 | 9535 |")


def test_curves_of_the_replay(tmp_path, monkeypatch):
    """Means over the seeds with a value; evaluations have none, and A2C has no replay."""
    values = {"replay/ess": [1.0, 3.0, None, 5.0], "replay/kl": [0.5] * 4}
    values |= {"replay/clip_fraction": [0.0, 0.0, 0.0, 1.0], "replay/ratio_limit": [7.0] * 4}
    records = [{"global_step": 0}, {"global_step": 32} | values, {"global_step": 32}]
    for name in ("default", "replay_ratio_0"):
        run = write_run(tmp_path / "cartpole" / name, algo="p3o")
        write_metrics(run, records if name == "default" else records[:1])
    drawn, plot = [], Axes.plot

    def spy(axis, x, y, label, **options):
        drawn.append((label, x.tolist(), y.tolist()))
        return plot(axis, x, y, label=label, **options)

    jobs = [Job("cartpole", name, "p3o") for name in ("default", "replay_ratio_0")]
    done = runner.summarise(jobs, tmp_path)
    monkeypatch.setattr(Axes, "plot", spy)
    p3o.replay_curves(done)
    assert drawn == [("default", [32.0], [y]) for y in (3.0, 0.5, 0.25)]
    assert (tmp_path / "cartpole-replay.png").exists()


def test_epochs_of_mu_are_searched_at_the_clip_range_of_ppo():
    for job in v5.GROUPS["mu"]:
        config = config_of(job)
        assert (config.clip_eps, f"epochs_{config.num_mu_epochs}") == (0.2, job.name)
