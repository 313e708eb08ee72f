"""The command line, and bad input: one line, before anything is written."""

import dataclasses
import io
import json
import os
import re
import shutil
import sys

import pytest
import tiny
from launching import FLAGS, content, parse, run

import envs
from algos import bpo, launch, ppo, reppo
from algos.launch import cli, rundir, session

pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.xdist_group("ppo")]


# --- command line ---


def test_defaults_then_task_preset_then_named_presets_then_flags():
    config, _ = parse("--env", "cartpole")
    assert dataclasses.asdict(config).items() >= ppo.PRESETS["cartpole"].items()
    config, chosen = parse("--env", "cartpole", "--preset", "cartpole_ppo", "--gamma", "0.5")
    expected = ppo.PRESETS["cartpole"] | ppo.PRESETS["cartpole_ppo"] | {"gamma": 0.5}
    assert dataclasses.asdict(config).items() >= expected.items()
    assert chosen.preset == ("cartpole_ppo",)
    config, _ = parse("--preset", "mujoco_ppo", "cartpole_ppo", "--env", "cartpole")
    assert dataclasses.asdict(config).items() >= ppo.PRESETS["cartpole_ppo"].items()


def test_a_preset_applies_under_every_name_of_its_task():
    for name in ("pendulum", "gymnax/Pendulum-v1"):
        assert cli.task_values(name, {"pendulum": {"gamma": 0.9}}) == {"gamma": 0.9}
    assert cli.task_values("brax/ant?backend=spring", {"ant": {"gamma": 0.9}}) == {"gamma": 0.9}
    assert cli.task_values("acrobot", {"pendulum": {"gamma": 0.9}}) == {}


def test_a_source_has_a_preset_for_its_tasks_that_have_none():
    presets = {"gym": {"gamma": 0.9}, "Hopper-v5": {"gamma": 0.8}}
    assert cli.task_values("gym/Hopper-v5?engine=mjx", presets) == {"gamma": 0.8}
    assert cli.task_values("Ant-v5", presets) == {"gamma": 0.9}
    assert cli.task_values("hopper", presets) == {}


@pytest.mark.parametrize("algorithm", [ppo, bpo, reppo])
def test_published_values_undo_the_preset_of_any_task(algorithm):
    """Except rewards and support, which REPPO's published sizes leave to the task."""
    kept = getattr(algorithm, "UNIT", {}).keys()
    presets = algorithm.PRESETS
    published = {k: x for k, x in presets.items() if algorithm.PAPER.keys() <= x.keys()}
    assert published
    for task in presets.keys() & {*envs.ALIASES, *envs.TASKS}:
        for name, values in published.items():
            assert presets[task].keys() - kept <= values.keys(), (task, name)


def test_a_task_that_does_not_suit_is_one_line(capsys):
    """Before the plan, which would name a run directory that is never made."""
    with pytest.raises(SystemExit):
        launch.main("sac", ["--env", "cartpole"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: gymnax/CartPole-v1 has discrete actions, and SAC needs ")


def test_without_a_preset_it_is_said(monkeypatch):
    """Before anything compiles."""

    def stop(*_):
        raise ValueError("far enough")

    monkeypatch.setattr(session.Session, "open", stop)
    sentence = "ppo has no preset for this task"
    assert sentence in run("--env", "acrobot")[1]
    assert sentence not in run("--env", "acrobot", "--preset", "dmc_ppo")[1]
    assert sentence not in run("--env", "gym/Pusher-v5")[1]


def test_help_shows_the_values_that_would_run(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help", "--env", "pendulum", "--gamma", "0.875")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "(default: 0.875)" in text
    value = str(ppo.PRESETS["pendulum"]["total_timesteps"])
    assert value in text
    assert value != str(ppo.Config.total_timesteps)
    for field in [*dataclasses.fields(ppo.Config), *dataclasses.fields(cli.Launch)]:
        assert f"--{field.name.replace('_', '-')}" in text
    words = set(re.findall(r"[\w-]+", text))
    assert {*ppo.PRESETS} <= words
    assert {*envs.TASKS["gym"], *envs.TASKS["brax"]} <= words
    assert "come from the preset pendulum and the other flags" in text


def test_a_tools_help_ends_with_the_default():
    parser = cli.Parser("A tool.")
    parser.add_argument("paths", nargs="+", help="files to read")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 16), help="numbers of seeds")
    parser.add_argument("--row", type=int, default=0, help="which seed")
    parser.add_argument("--title", default="", help="above the figure")
    parser.add_argument("--force", action="store_true", help="replace files")
    ends = ["files to read", "seeds, default: 1 16", "seed, default: 0", "the figure", "files"]
    lines = parser.format_help().splitlines()
    for end in ends:
        assert [line for line in lines if line.endswith(end)], end
    args = parser.parse_args(["x"])
    assert (args.seeds, args.row, args.title, args.force) == ((1, 16), 0, "", False)


@pytest.mark.parametrize("dash", ["-", "_"])
@pytest.mark.parametrize("join", [" ", "="])
def test_spellings_of_a_flag(dash, join):
    flags = f"--env{join}inverted_pendulum --run{dash}dir{join}a_b/c_d --num{dash}envs{join}8"
    config, chosen = parse(*flags.split())
    assert (config.env, chosen.run_dir, config.num_envs) == ("inverted_pendulum", "a_b/c_d", 8)


def test_counts_may_be_written_as_people_write_them():
    config, chosen = parse("--total-timesteps", "1e6", "--num-envs=1_6", "--num-seeds", "1e1")
    assert (config.total_timesteps, config.num_envs, chosen.num_seeds) == (1_000_000, 16, 10)
    assert parse("--hidden", "1e2", "64")[0].hidden == (100, 64)
    assert cli.integer("2e5") == 200_000
    assert parse("--num-seeds", 3, "--learning-rate", 1e-3)[1].num_seeds == 3  # from Python
    with pytest.raises(ValueError, match=r"'1\.5' is not a whole number"):
        cli.integer("1.5")


def test_all_presets_after_one_flag_apply_however_it_is_written():
    for flag in (["--preset", "gym"], ["--preset=gym"]):
        config, chosen = parse(*flag, "brax")
        assert chosen.preset == ("gym", "brax")
        assert config.num_envs == ppo.PRESETS["brax"]["num_envs"] != ppo.PRESETS["gym"]["num_envs"]


# --- bad input ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "cartpoel"], r"unknown environment 'cartpoel'.*cartpole"),
        (["--env", "gymnax/Nothing"], r"unknown environment"),
        (["--env", "no_such_module:make"], r"no_such_module:make.*PYTHONPATH"),
        (["--env", "ant?backend=sprung"], r"backend='sprung' must be one of .*spring"),
        (["--env", "ant?back=spring"], r"unknown option 'back'"),
        (["--env", "Hopper-v5?healthy_z_range=nan,1"], r"healthy_z_range='nan,1' must be low,high"),
        (
            ["--preset", "mujoco_ppo", "--preset=cartpole"],
            "--preset is given twice: write all its values after one of them",
        ),
        (["--track", "--wandb-tags", "a", "--wandb-tags=b"], r"--wandb-tags is given twice"),
        (["--track", "--wandb-tags", "a" * 65], r"wandb_tags='a+': W&B takes 1 to 64 characters"),
        (["--preset", "mujoco_pp"], r"unknown preset 'mujoco_pp'.*mujoco_ppo"),
        (["--num-seed", "3"], r"unknown argument '--num-seed'.*--num-seeds"),
        (["--frobnicate"], r"unknown argument '--frobnicate'"),
        (["--lr", "1e-3"], r"unknown argument '--lr': did you mean --learning-rate, "),
        (["--lr=1e-3"], r"unknown argument '--lr=1e-3': did you mean --learning-rate, "),
        (["gamma=0.9"], r"unknown argument 'gamma=0.9': --verbose takes no further value"),
        (["--hidden"], r"--hidden has no value"),
        (["--hidden", "--num-envs", "8"], r"--hidden has no value"),
        (["--preset"], r"--preset has no value"),
        (["--wandb-tags", "--track"], r"--wandb-tags has no value"),
        (["--sweep"], r"--sweep has no value"),
        (
            ["--sweep", "learning-rate=1e-3,2e-3", "--learning-rate", "1e-3"],
            r"learning_rate is swept, .*: drop --learning-rate",
        ),
        (["stray"], r"unknown argument 'stray'"),
        (["--num-minibatches", "7"], r"num_minibatches=7 does not divide"),
        (["--num-seeds", "0"], r"num_seeds=0: it should be greater than 0"),
        (["--num-evals", "0"], r"num_evals=0: it should be greater than 0"),
        (["--num-envs", "0"], r"num_envs"),
        (["--num-envs", "2147483648"], r"num_envs=2147483648: it should be less than 2\*\*31"),
        (["--hidden", "8", "1e12"], r"hidden=1000000000000: it should be less than 2\*\*31"),
        (["--run-dir=~nosuchuser/x"], r"~nosuchuser/x: Could not determine home"),
        (["--resume=~nosuchuser/x"], r"~nosuchuser/x: Could not determine home"),
        (["--num-steps", "0"], r"num_steps"),
        (["--num-minibatches", "0"], r"num_minibatches"),
        (["--total-timesteps", "0"], r"total_timesteps"),
        (["--sweep", "num_envs=1,2"], r"cannot sweep over 'num_envs': .*learning_rate"),
        (["--sweep", "gamma"], r"cannot read --sweep 'gamma': write FIELD=VALUE,VALUE"),
        (["--sweep", "gamma=0.9", "1e-3"], r"cannot read --sweep '1e-3': write FIELD=VALUE,VAL"),
        (["--sweep", "gamma=0.9,high"], r"'gamma=0.9,high'"),
        (["--sweep", "gamma=0.9,0.90"], r"repeats"),
        (["--sweep", "gamma=0.9", "gamma=0.8"], r"repeats"),
        (["--sweep", "gamma=0.9,nan"], r"finite"),
        (["--gamma", "0.9", "--sweep", "gamma=0.8,0.7"], r"gamma is swept, .*: drop --gamma"),
        (["--gamma=0.9", "--sweep", "gamma=0.8,0.7"], r"gamma is swept, .*: drop --gamma"),
        (["--hidden", "64,64"], r"--hidden: cannot read \['64,64'\]; write values with spaces"),
        (["--gamma", "7"], r"gamma=7.0: it should be less than or equal to 1"),
        (["--learning-rate", "-1"], r"learning_rate=-1.0: it should be greater than or equal to 0"),
        (["--learning-rate", "nan"], r"learning_rate=nan"),
        (["--noise-interval", "0"], r"noise_interval=0"),
        (
            ["--anneal-lr", "True"],
            r"--anneal-lr takes no value: write --anneal-lr or --no-anneal-lr",
        ),
        (["--anneal-lr=True"], r"--anneal-lr takes no value"),
        (["--no-anneal-lr=False"], r"--anneal-lr takes no value: write --anneal-lr or --no-ann"),
        (["--num-seeds", "2", "false"], r"unknown argument 'false': --num-seeds takes no further"),
        (["true"], r"unknown argument 'true': --verbose takes no further value"),
        (["--num-envs", "8", "16"], r"unknown argument '16': --num-envs takes no further value"),
        (["--wandb-seeds"], r"wandb_seeds=True: it needs --track"),
        (["--wandb-tags", "mine"], r"wandb_tags=\('mine',\): it needs --track"),
        (["--env", "probe/value", "--render"], r"probe/value has no drawing: leave --render out"),
        (["--learning-rate", "1e-50"], r"learning_rate=1e-50: float32 has no such number"),
        (["--max-grad-norm", "1e40"], r"max_grad_norm=1e\+40: float32 has no such number"),
        (
            ["--num-envs", "400000000", "--num-steps", "8"],
            r"an update would have 3,200,000,000 steps, .*: lower num_envs or num_steps",
        ),
        (["--partial-at-return", "nan"], r"partial_at_return=nan: it should be a finite number"),
        (
            ["--total-timesteps", "1e13"],
            r"total_timesteps=10000000000000 makes .* fewer than 2\*\*31",
        ),
        (["--seed", "-1"], r"seed=-1: it should be greater than or equal to 0"),
        (
            ["--seed", "4294967295", "--num-seeds", "2"],
            r"seed=4294967295: the last seed is 4294967296, at most",
        ),
        (["--final-episodes", "0"], r"final_episodes=0: it should be greater than 0"),
        (
            ["--checkpoint-every", "-1"],
            r"checkpoint_every=-1: it should be greater than or equal to 0",
        ),
        (["--resume", "nowhere"], r"nowhere is not a run directory"),
        (["--resume"], r"--resume"),
        (["--resume="], r"--resume is empty: name a run directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said = run("--verbose", "0", *argv)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


def test_a_model_that_mujoco_refuses_is_one_line(tmp_path, monkeypatch):
    source = (
        "import mujoco\nmake = lambda: mujoco.MjModel.from_xml_string('<mujoco><leg/></mujoco>')"
    )
    (tmp_path / "robot.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    status, said = run("--verbose", "0", "--env", "robot:make")
    assert status == 2
    assert re.fullmatch("error: robot:make: XML Error: .* Element 'leg', line 1\n", said)


def test_whoever_changes_an_algorithm_can_see_where_it_fails(tmp_path):
    flags = [*FLAGS, "--num-minibatches", "7", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="num_minibatches=7"):
        run(*flags, "--verbose", "2")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-envs many", "--num-envs: 'many' is not a whole number"),
        ("--verbose 7", "invalid choice '7' for argument '--verbose'. Expected one of "),
        ("--gamma", "Missing value for argument '--gamma'. Expected 1 values."),
        (
            "--partial-at-return x",
            "--partial-at-return: no type matching {None}|FLOAT could be inst",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line(flags, message, encoding, monkeypatch, capfd):
    """Of what is wrong, wherever the terminal's alphabet has lines for boxes or not."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(*flags.split())
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "envs.playground", raising=False)
    monkeypatch.setitem(sys.modules, "mujoco_playground", None)
    status, said = run("--env", "playground/CheetahRun")
    assert status == 2
    assert 'pip install -e ".[playground]"' in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_launch_larger_than_the_machine_ends_in_one_line(tmp_path, monkeypatch):
    """On a CPU, before anything is allocated."""
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2}.get)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "run"))
    assert status == 1
    assert re.fullmatch(
        "error: Out of memory: training needs .* GiB, the machine has 0 GiB: start a .*\n", said
    )


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "file"))
    assert (status, said) == (
        2,
        f"error: {tmp_path / 'file'} is a file: choose another --run-dir\n",
    )


def test_a_module_without_its_function_is_named(tmp_path, monkeypatch):
    (tmp_path / "robots.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    said = run("--verbose", "0", "--env", "robots")[1]
    assert said.endswith("? A function of your module is robots:FUNCTION\n")
    assert "FUNCTION" not in run("--verbose", "0", "--env", "no_such_robots")[1]


def test_a_resumed_run_keeps_its_seeds(whole):
    _, said = run("--resume", str(whole[0]), "--seed", "1")
    assert said.startswith("error: cannot resume with seed=1")


def test_an_unwritable_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path / "file" / "run"))
    assert status == 2
    assert said.startswith("error: ")
    assert "file" in said
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_never_overwritten(whole):
    before = content(whole[0])
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(whole[0]))
    assert (status, said.count("\n")) == (2, 1)
    assert "already holds a run (checkpoints): --resume it or choose" in said
    assert content(whole[0]) == before


def test_a_run_without_a_checkpoint_is_not_overwritten_either(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    _, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(tmp_path))
    assert "(config.json): --resume it, which starts again, as it has no checkpoint, or" in said


def test_a_module_without_a_launch_is_no_algorithm(tmp_path):
    (tmp_path / "networks.py").write_text("import flax\n")
    (tmp_path / "mine.py").write_text('launch.main("mine")\n')
    (tmp_path / ".#mine.py").symlink_to("me@here.1234")  # as Emacs does while it edits
    assert cli.launchable(tmp_path) == ["mine"]


def test_a_field_with_the_name_of_a_flag_is_named():
    @dataclasses.dataclass(frozen=True)
    class Own(ppo.Config):
        seed: int = 0  # of the networks

    with pytest.raises(ValueError, match=r"Config\.seed: the launcher has a flag of this name"):
        cli.parse("ppo", Own, {}, [])


def test_two_launches_never_share_a_directory(tmp_path, monkeypatch):
    """Another launch takes the directory while this one still loads its task."""
    run_dir = tmp_path / "run"
    make_program = session.make_program

    def overtaken(*args):
        run_dir.mkdir()
        (run_dir / "config.json").write_text("theirs")
        return make_program(*args)

    monkeypatch.setattr(session, "make_program", overtaken)
    status, said = run(*FLAGS, "--verbose", "0", "--run-dir", str(run_dir))
    assert status == 2
    assert said.startswith("error: ")
    assert (run_dir / "config.json").read_text() == "theirs"
    assert {x.name for x in run_dir.iterdir()} == {"config.json", ".lock"}


def truncate(run_dir):
    path = rundir.checkpoints(run_dir)[-1]
    path.write_bytes(path.read_bytes()[:-200])


def corrupt(run_dir):
    path = rundir.checkpoints(run_dir)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def foreign(run_dir):
    (run_dir / "config.json").write_text('{"model_type": "bert"}')


def unreadable(run_dir):
    (run_dir / "config.json").write_text('{"algo": "ppo", ')


def no_checkpoint(run_dir):
    """Of a run that had reached its end."""
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "done.json").write_text("{}")


def other_algorithm(run_dir):
    saved = json.loads((run_dir / "config.json").read_text()) | {"algo": "bpo"}
    (run_dir / "config.json").write_text(json.dumps(saved))


def other_shape(run_dir):
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["hidden"] = [16]
    (run_dir / "config.json").write_text(json.dumps(saved))


def other_version(run_dir):
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["clip_epsilon"] = 0.2
    (run_dir / "config.json").write_text(json.dumps(saved))


def no_evaluations(run_dir):
    """Of a run that had come to its end, and whose metrics go on after its checkpoint."""
    (run_dir / "eval.npz").write_text("")
    (run_dir / "final.npz").write_text("")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 192}\n')


@pytest.mark.parametrize(
    ("harm", "flags", "message"),
    [
        (truncate, [], r"000000003.npz is damaged"),
        (no_evaluations, [], r"eval.npz is damaged"),
        (corrupt, [], r"000000003.npz is damaged"),
        (foreign, [], r"not a run directory"),
        (unreadable, [], r"not a run directory"),
        (no_checkpoint, [], r"no checkpoint"),
        (other_algorithm, [], r"is a run of bpo"),
        (other_shape, [], r"does not fit .*\[2, 4, 8\], not float32\[2, 4, 16\](?!.*total-t)"),
        (other_version, [], r"clip_epsilon"),
        (None, ["--gamma", "0.5"], r"gamma=0.5, the run has 0.99"),
        (None, ["--env", "pendulum"], r"env='pendulum', the run has 'cartpole'"),
        (None, ["--num-seeds", "3"], r"num_seeds=3, the run has 2"),
        (None, ["--sweep", "gamma=0.5"], r"sweep="),
        (None, ["--preset", "mujoco_ppo"], r"the run has"),
        (None, ["--run-dir", "elsewhere"], r"run_dir='elsewhere'"),
    ],
)
def test_a_resume_that_cannot_be_exact_is_refused(copy, harm, flags, message, monkeypatch):
    monkeypatch.chdir(copy.parent)
    if harm:
        harm(copy)
    before = content(copy.parent)
    status, said = run("--resume", str(copy), "--verbose", "0", *flags)
    assert status == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert content(copy.parent) == before


def test_resuming_a_complete_run_says_so(whole):
    before = content(whole[0])
    status, said = run("--resume", str(whole[0]), "--verbose", "0")
    assert status == 2
    assert "complete" in said
    assert "--total-timesteps" in said
    assert content(whole[0]) == before


def test_the_preset_of_a_resumed_run_does_not_shorten_it(tmp_path):
    flags = ["--env", "cartpole", "--preset", "cartpole_ppo"]
    config, saved = parse(*flags, "--total-timesteps", "500000")
    described = {"algo": "ppo", "config": vars(config), "launch": vars(saved), "rows": {}}
    rundir.write_json(tmp_path / "config.json", described)
    config, _ = parse("--resume", str(tmp_path), "--preset", "cartpole_ppo")
    assert config.total_timesteps == 500_000


def test_a_resumed_run_may_be_longer(copy):
    config, chosen = parse("--resume", str(copy), "--total-timesteps", "999", "--num-evals", "5")
    assert config == tiny.config_of("ppo", total_timesteps=999)
    assert (chosen.num_seeds, chosen.num_evals, chosen.run_dir) == (2, 5, str(copy))


def test_a_tracked_run_may_go_on_untracked(copy):
    saved = json.loads((copy / "config.json").read_text())
    saved["launch"] |= {"track": True, "wandb_tags": ["mine"], "wandb_seeds": True}
    (copy / "config.json").write_text(json.dumps(saved))
    assert not parse("--resume", str(copy), "--no-track")[1].track


def test_a_run_directory_may_be_named_in_several_ways(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    (copy.parent / "link").symlink_to(copy)
    for name in ("copy/", "./copy", "link", str(copy)):
        assert parse("--resume", "copy", "--run-dir", name)[0] == tiny.config_of("ppo")


def test_the_files_that_a_run_learned_from_may_have_moved():
    """What is in them must be the same: rundir.check_data compares digests."""
    saved = tiny.config_of("brac")
    cli.check_resumable(saved, dataclasses.replace(saved, dataset="moved.npz", behavior="moved"))
    with pytest.raises(ValueError, match="gamma"):
        cli.check_resumable(saved, dataclasses.replace(saved, dataset="moved.npz", gamma=0.5))
