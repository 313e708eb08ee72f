"""Reproductions: which runs are started, resumed or left alone, and the table of them."""

import importlib
import shlex
import sys

import pytest
from test_experiments import write_run

import envs
from algos import cli
from experiments import reproduce, reproduce_bnpo, reproduce_p3o, reproduce_reppo
from experiments.reproduce import Job, command

MODULES = {"reppo": reproduce_reppo, "p3o": reproduce_p3o, "bnpo": reproduce_bnpo}
JOBS = [
    (name, group, job)
    for name, module in MODULES.items()
    for group, jobs in module.GROUPS.items()
    for job in jobs
]


def config_of(job):
    """What the job would run."""
    module = importlib.import_module(f"algos.{job.algo}")
    argv = ["--env", job.task, *shlex.split(job.flags)]
    return cli.parse(job.algo, module.Config, module.PRESETS, argv)[0]


@pytest.mark.parametrize(("name", "group", "job"), JOBS, ids=lambda x: getattr(x, "name", x))
def test_every_job_is_a_valid_launch(name, group, job):
    config = config_of(job)
    config.validate()
    assert envs.canonical(config.env) == envs.canonical(job.task)


def test_jobs_do_not_share_a_directory():
    names = [(name, group, job.task, job.name) for name, group, job in JOBS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", MODULES)
def test_ablations_change_one_thing_each(name):
    groups = MODULES[name].GROUPS
    jobs = [*groups["ablations"], *groups.get("details", [])]
    configs = {job.name: vars(config_of(job)) for job in jobs}
    default = configs.pop("default")
    for ablation, config in configs.items():
        changed = {field for field in default if config[field] != default[field]}
        # a switch may go with the number that it switches to
        assert 1 <= len(changed) <= 1 + ("adaptive_kl" in changed), ablation


@pytest.mark.parametrize("name", MODULES)
def test_runs_of_a_task_have_equal_steps(name):
    jobs = MODULES[name].GROUPS["tasks"]
    for task in {job.task for job in jobs}:
        assert len({config_of(job).total_timesteps for job in jobs if job.task == task}) == 1


def test_a_job_is_started_resumed_or_left_alone(tmp_path):
    job, run_dir = Job("cartpole", "fast", "ppo", "--gamma 0.9"), tmp_path / "run"
    started = command(job, run_dir, 3)
    assert started[0] == sys.executable
    assert started[1].endswith("algos/ppo.py")
    assert started[2:] == [
        *("--env", "cartpole", "--gamma", "0.9", "--num-seeds", "3", "--run-dir", str(run_dir))
    ]
    write_run(run_dir, done=False)
    assert command(job, run_dir, 3)[2:] == ["--resume", str(run_dir)]
    (run_dir / "done.json").write_text("{}")
    assert command(job, run_dir, 3) is None


def test_nothing_is_run_again_and_the_table_is_written(tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(reproduce, "run", ran.append)
    task = "CartpoleBalance"
    write_run(tmp_path / "published" / task / "reppo", env="cartpole", offset=900.0)
    reproduce_reppo.main(["published", "--tasks", task, "--out", str(tmp_path)])
    assert ran == []
    text = (tmp_path / "published" / "table.md").read_text()
    assert text == capsys.readouterr().out
    assert "| CartpoleBalance | 999.6 ± 0.2 (n=10) | 917.0 ± 11.2 (n=4) |" in text
    assert (tmp_path / "published" / "table.json").exists()
    assert (tmp_path / "published" / f"{task}.png").exists()
    reproduce_reppo.main(["tasks", "--tasks", "CheetahRun", "--out", str(tmp_path)])
    assert [argv[2:4] for argv in ran] == [["--env", "CheetahRun"]] * 2


def test_episodes_to_a_return_are_counted(tmp_path, capsys, monkeypatch):
    """Over seeds 18.5, 19.5 and 20.5 after 0, 100 and 200 steps, 32 in an episode of all."""
    monkeypatch.setattr(reproduce, "run", lambda argv: None)
    write_run(tmp_path / "solve" / reproduce_bnpo.TASK / "a1", offset=3.5)
    write_run(tmp_path / "solve" / reproduce_bnpo.TASK / "ppo")
    reproduce_bnpo.main(["solve", "--out", str(tmp_path)])
    text = (tmp_path / "solve" / "table.md").read_text()
    assert text == capsys.readouterr().out
    assert text.endswith(
        "| setting | here | published |\n|---|---|---|\n| a1 | 0, 7, - | 259, 279, 319 |\n"
    )


def test_a_failed_launch_stops_the_program():
    reproduce.run([sys.executable, "-c", ""])
    reproduce.run([sys.executable, "-c", "raise SystemExit(1)"])  # every seed died
    for status in (2, 130):
        with pytest.raises(SystemExit) as caught:
            reproduce.run([sys.executable, "-c", f"raise SystemExit({status})"])
        assert caught.value.code == status


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "invalid choice: 'nothing'"),
        (["tasks", "--tasks", "ant"], "--tasks ant: choose from CartpoleBalance, CartpoleSwingup"),
        (["tasks", "--num-seeds", "0"], "--num-seeds 0"),
    ],
)
def test_bad_input_is_one_error(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        reproduce_reppo.main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
