"""Where numbers go: metrics.jsonl, console, TensorBoard, Weights & Biases."""

import io
import os
import re
import subprocess
import sys
import time
import types
import warnings

import jax
import numpy as np
import pytest
import tiny
from launching import ROOT, events
from tiny import lines_of

from algos.launch import cli, logs
from algos.launch.rows import Rows

ROWS = Rows(np.array([3, 4]), {}, ["", ""])


def make_log(run_dir, rows=ROWS, **changes):
    run_dir.mkdir(exist_ok=True)
    launch = cli.Launch(**changes)
    log = logs.Log(launch.verbose)
    about = {"algo": "ppo", "config": vars(tiny.config_of("ppo")), "launch": vars(launch)}
    log.open(run_dir, about | logs.surroundings() | {"id": "an id"}, launch, rows, 0)
    return log


VALUES = {
    "eval/episodic_return": np.array([1.0, 3.0]),
    "charts/episodic_return": np.array([np.nan, 5.0]),
    "losses/value_loss": np.array([np.nan, np.nan]),
    "time/train": 2.5,
}


def test_lines_of_metrics_keep_every_seed(tmp_path):
    log = make_log(tmp_path)
    log.write(64, VALUES)
    log.close(True)
    assert lines_of(tmp_path) == [
        {
            "global_step": 64,
            "eval/episodic_return": [1.0, 3.0],
            "charts/episodic_return": [None, 5.0],
            "losses/value_loss": [None, None],
            "time/train": 2.5,
        }
    ]


def test_aggregates_leave_out_what_is_absent():
    assert logs.aggregate(VALUES, ["", ""]) == {
        "eval/episodic_return": 2.0,
        "eval/episodic_return_min": 1.0,
        "eval/episodic_return_max": 3.0,
        "eval/episodic_return_iqm": 2.0,
        "charts/episodic_return": 5.0,
        "charts/episodic_return_min": 5.0,
        "charts/episodic_return_max": 5.0,
        "charts/episodic_return_iqm": 5.0,
        "time/train": 2.5,
    }
    assert logs.row_values(VALUES, 0) == {"eval/episodic_return": 1.0}


def test_returns_of_further_policies_are_aggregated_too():
    scalars = logs.aggregate({"eval/max_q_return": np.array([1.0, 3.0])}, ["", ""])
    assert scalars["eval/max_q_return_max"] == 3.0


def test_a_swept_value_has_aggregates_of_its_own():
    values = {"losses/value_loss": np.array([1.0, 3.0, 10.0, np.nan]), "time/train": 2.5}
    assert logs.aggregate(values, ["gamma=0.9", "gamma=0.9", "gamma=0.99", "gamma=0.99"]) == {
        "gamma=0.9/losses/value_loss": 2.0,
        "gamma=0.99/losses/value_loss": 10.0,
        "time/train": 2.5,
    }


def test_hosts_that_do_not_lead_print_nothing(capsys):
    log = logs.Log(-1)
    log.write(1, VALUES)
    log.say("hello", 0)
    log.close(True)
    assert capsys.readouterr() == ("", "")


def test_verbosity(tmp_path, capsys):
    for verbose, expected in ((0, ["a"]), (1, ["a", "b"]), (2, ["a", "b", "c", "losses"])):
        log = make_log(tmp_path, verbose=verbose)
        for level, text in enumerate("abc"):
            log.say(text, level)
        log.write(0, {"losses/value_loss": np.array([1.0, 2.0])})
        log.close(True)
        said = capsys.readouterr().err.split()
        assert [x.split("/")[0] for x in said if x[0].isalpha()] == expected


def test_tensorboard(tmp_path):
    log = make_log(tmp_path, tensorboard=True)
    log.write(64, VALUES)
    # Not closed: a run that is killed keeps what it wrote.
    seen = {tag: value for step, tag, value in events(tmp_path) if step == 64}
    assert seen == pytest.approx(logs.aggregate(VALUES, ["", ""]))
    log.close(True)


def test_wandb_needs_no_account(tmp_path, monkeypatch, capsys):
    """Without a key its runs stay on disk: one line says so, and W&B itself says nothing.

    The brackets in the path are no pattern.
    """
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run_dir = tmp_path / "a run[1]"
    log = make_log(run_dir, track=True, wandb_seeds=True, wandb_tags=("mine",))
    assert [row for _, row in log.wandb_runs] == [None, 0, 1]
    log.write(64, VALUES)
    (run_dir / "plots").mkdir()
    names = "plots/curve.png", "policy_s000.npz", "policy_s001.npz"
    files = [run_dir / name for name in names]
    for file in files:
        file.write_bytes(b"bytes")
    log.attach(run_dir, files)
    log.close(True)
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(f"W&B is offline: `wandb sync '{run_dir}'/wandb/offline-run-*` ")
    files = [path.name for path in (run_dir / "wandb").glob("offline-run-*/files/**/*.*")]
    assert sorted(x for x in files if x[-4:] in (".png", ".npz")) == [
        *("curve.png", "policy_s000.npz", "policy_s000.npz", "policy_s001.npz", "policy_s001.npz")
    ]


class FakeRun:
    def __init__(self, fails):
        self.fails, self.logged, self.exit_code = fails, [], None

    def define_metric(self, *args, **kwargs):
        """W&B's own; nothing here looks at it."""

    def log(self, values):
        if self.fails == "log":
            raise ConnectionError("no network")
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code
        if self.fails == "finish":
            raise ConnectionError("no network")


@pytest.mark.parametrize(
    ("fails", "complete"),
    [
        *((fails, True) for fails in ("import", "init", "a second init", "log", "finish", "")),
        ("", False),
    ],
)
def test_wandb_never_ends_a_run(tmp_path, monkeypatch, capsys, fails, complete):
    made = []

    def init(**options):
        if fails == "init" or (fails == "a second init" and made):
            raise RuntimeError("not\nlogged in")
        made.append((FakeRun(fails), options))
        return made[-1][0]

    ignored = lambda *_, **__: True
    fake = types.SimpleNamespace(init=init, login=ignored, setup=ignored, Settings=dict)
    fake = None if fails == "import" else fake
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = make_log(tmp_path, track=True, wandb_seeds=True, wandb_tags=("mine",), verbose=0)
    log.write(64, VALUES)
    log.write(96, VALUES | {"losses/value_loss": np.array([0.5, 0.7])})
    log.close(complete)
    said = capsys.readouterr().err
    assert said.count("\n") == (1 if fails else 0)
    assert len(lines_of(tmp_path)) == 2
    if fails:
        assert said.startswith("W&B failed")
        assert {run.exit_code for run, _ in made} <= {1} or fails == "finish"
        assert len(made) == {"a second init": 1, "log": 3, "finish": 3}.get(fails, 0)
        return
    (whole, options), (first, _), (second, _) = made
    assert whole.logged[0] == {"global_step": 64} | logs.aggregate(VALUES, ["", ""])
    assert first.logged[0] == {"global_step": 64, "eval/episodic_return": 1.0}
    assert second.logged[1]["charts/episodic_return"] == 5.0
    assert whole.exit_code == second.exit_code == (0 if complete else 1)
    assert first.logged[1]["losses/value_loss"] == 0.5
    assert [options["group"] for _, options in made] == [
        "ppo__gymnax/CartPole-v1",
        *["ppo__gymnax/CartPole-v1__seeds"] * 2,
    ]
    assert [options["config"]["seed"] for _, options in made[1:]] == [3, 4]
    assert options["config"].items() >= {"algo": "ppo"}.items()
    assert options["config"]["commit"] == logs.commit()
    assert "mine" in options["tags"]
    assert options["config"].items() >= {"gae_lambda": 0.95, "wandb_seeds": True}.items()
    # A resumed launch goes on with the same W&B runs.
    assert len({options["id"] for _, options in made}) == 3
    ids = [options["id"] for _, options in made]
    made.clear()
    make_log(tmp_path, track=True, wandb_seeds=True, wandb_tags=("mine",), verbose=0).close(True)
    assert [options["id"] for _, options in made] == ids


# --- console ---


def test_clock():
    assert [logs.clock(x) for x in (None, 59.9, 95, 3661)] == ["-", "0:59", "1:35", "1:01:01"]


def test_counts_are_short():
    numbers = [0, 950, 999, 999.6, 12_345, 200_704, 999_700, 1_234_567, 2e9]
    assert [logs.short(x) for x in numbers] == [
        *("0", "950", "999", "1k", "12.3k", "201k", "1M", "1.23M", "2G"),
    ]


def test_returns_of_seeds_in_words():
    assert logs.spread(np.array([1.0, 2.0, 3.0, 4.0])) == "IQM 2.5 [1, 4]"
    assert logs.spread(np.array([1.0, np.nan])) == "IQM 1 [1, 1] | 1/2 alive"
    assert logs.spread(np.array([np.nan])) == "no seed is alive"


def test_evaluations_fit_the_console(capsys):
    log, seeds = logs.Log(1), np.array([-123456.7, -654321.9, np.nan])
    log.evaluation(123_456_789, 987_654_321, {"": seeds}, 1_234_567.0, 36_000.0)
    log.evaluation(0, 987_654_321, {"gamma=0.9": seeds, "gamma=0.99": seeds}, 0.0, None)
    log.evaluation(5, 10, {"": np.array([1.0])}, 0.0, 60.0)  # resumed, before it trains
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "123M/988M | IQM -3.889e+05 [-6.543e+05, -1.235e+05] | 2/3 alive | 1.23M steps/s,"
        " all seeds | 10:00:00 left",
        "0/988M | start",
        "  gamma=0.9 | IQM -3.889e+05 [-6.543e+05, -1.235e+05] | 2/3 alive",
        "  gamma=0.99 | IQM -3.889e+05 [-6.543e+05, -1.235e+05] | 2/3 alive",
        "5/10 | IQM 1 [1, 1] | 1:00 left",
    ]


class Broken:
    """A console that was closed; it counts the attempts to write to it."""

    def __init__(self):
        self.attempts = 0

    def write(self, text):
        self.attempts += 1
        raise BrokenPipeError

    flush = write

    def isatty(self):
        return False


def test_a_console_that_goes_away_is_not_written_to_again(tmp_path):
    """And the records go on: a line of metrics, the end of the log."""
    log, broken = make_log(tmp_path), Broken()
    log.console.stream = broken
    with log.progress(10, 0), log.waiting("compiling"):
        log.say("hello")
        log.advance(3)
    log.write(64, VALUES)
    log.close(True)
    assert broken.attempts == 1
    assert log.console.stream is None
    assert [line["global_step"] for line in lines_of(tmp_path)] == [64]


def test_progress_is_a_line_now_and_then_where_no_terminal_is(tmp_path, monkeypatch, capsys):
    """As under nohup or a batch system: between evaluations there may be an hour."""
    monkeypatch.setattr(logs, "LINE_SECONDS", 0.6)
    log = make_log(tmp_path)
    with log.progress(10_000, 1_000):
        for seconds in (0.2, 0.6, 0.0):  # only the second is late enough
            time.sleep(seconds)
            log.advance(1_000)
    head, line = capsys.readouterr().err.splitlines()
    assert head.startswith("greedy return")
    assert re.fullmatch(r" 30%\|.*\| 3\.00k/10\.0k \[00:0\d<00:\d\d, .*steps/s\]", line)


def test_progress_is_a_bar_alone_where_a_terminal_is(tmp_path, monkeypatch):
    log, terminal = make_log(tmp_path), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    log.console.stream = terminal
    with log.progress(10_000, 0):
        time.sleep(0.2)
        log.advance(1_000)
    shown = terminal.getvalue()
    assert "1.00k/10.0k" in shown
    assert "steps/s]\n" not in shown


def test_a_process_may_have_no_console_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    log = make_log(tmp_path)
    with log.progress(10, 0), log.waiting("compiling"):
        log.say("hello")
        log.advance(3)
    log.write(64, VALUES)
    log.close(True)
    assert [line["global_step"] for line in lines_of(tmp_path)] == [64]


def test_a_warning_is_printed_once_whatever_libraries_do_to_the_filters(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back at the end
    warnings.simplefilter("always")
    logs.print_warnings_once()
    for text in ("one", "two\n  lines", "one"):
        warnings.warn(text, stacklevel=1)
    assert capsys.readouterr().err == "warning: one\nwarning: two lines\n"


def test_a_run_knows_its_precision():
    with jax.default_matmul_precision("bfloat16"):
        assert logs.surroundings()["matmul_precision"] == "bfloat16"


@pytest.mark.parametrize(("shared", "kept"), [(False, "a table"), (True, "")])
def test_an_output_of_its_own_outlives_the_terminal(shared, kept, tmp_path):
    """Standard error is lost, and with it an output that went the same way."""
    program = f"""
import os, sys
from algos.launch import logs
console = logs.Console(sys.stderr)
os.dup2(1, 2) if {shared} else None
console.stream.close()
console.write("lost")
os.write(1, b"a table")
os.write(2, b"lost")
"""
    with open(tmp_path / "table.md", "wb") as out:
        child = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=out, check=False)
    assert child.returncode == 0
    assert (tmp_path / "table.md").read_text() == kept


def test_a_callers_stream_takes_nothing_else_with_it(capfd):
    """Of a notebook that redirects; the process keeps its own output."""
    log, stream = logs.Log(1), io.StringIO()
    log.console.stream = stream
    stream.close()
    log.say("lost")
    os.write(1, b"alive")
    os.write(2, b"alive")
    assert capfd.readouterr() == ("alive", "alive")


@pytest.mark.parametrize(
    ("lines", "stderr"),  # a single line fails when the pipe is flushed
    [(1, subprocess.STDOUT), (10_000, subprocess.STDOUT), (1, subprocess.DEVNULL)],
)
def test_a_tool_goes_on_without_what_it_prints_to(lines, stderr, tmp_path):
    program = f"""
import sys, tqdm
from pathlib import Path
from algos.launch import logs
@logs.steady()
def main():
    for _ in tqdm.tqdm(range({lines})):
        print("a line of a table", flush={lines} > 1)
    Path(sys.argv[1]).touch()
main()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "done")]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr)
    child.stdout.close()
    assert child.wait() == 0
    assert (tmp_path / "done").exists()


def test_a_tool_ends_in_one_line_at_ctrl_c(capsys):
    @logs.steady()
    def tool():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        tool()
    assert ended.value.code == 130
    assert capsys.readouterr() == ("", "stopped\n")


def test_a_changed_checkout_has_a_plus(monkeypatch):
    def git(command, **_):
        changed = " M algos/ppo.py\n"
        return types.SimpleNamespace(stdout="abc\n" if "rev-parse" in command else changed)

    monkeypatch.setattr(logs.subprocess, "run", git)
    assert logs.commit() == "abc+"


def test_the_commit_is_never_that_of_a_repository_above(tmp_path, monkeypatch):
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", tmp_path], check=True)
    installed = tmp_path / "lib" / "algos" / "launch" / "logs.py"
    monkeypatch.setattr(logs, "__file__", str(installed))
    assert logs.commit() == ""


def test_wandb_knows_the_swept_value_of_each_row(tmp_path, monkeypatch):
    """The launch has all of them."""
    made, ignored = [], lambda *_, **__: True
    fake = types.SimpleNamespace(
        init=lambda **options: made.append(options) or FakeRun(""),
        login=ignored,
        setup=ignored,
        Settings=dict,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows = Rows(np.array([3, 3]), {"gamma": np.float32([0.9, 0.5])}, ["gamma=0.9", "gamma=0.5"])
    make_log(tmp_path, rows, track=True, wandb_seeds=True)
    assert [options["config"]["gamma"] for options in made] == [[0.5, 0.9], 0.9, 0.5]
