"""Figures and tables of runs side by side, on runs written by hand."""

import itertools
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_experiments import table_of, tables_of, write_run

from algos.launch import report, rundir
from experiments import compare


def entries_of(*run_dirs):
    return report.entries([rundir.read_run(run_dir) for run_dir in run_dirs])


@pytest.fixture
def drawn(monkeypatch):
    """The panels of every figure, as it was saved."""
    panels, real = [], Figure.savefig

    def savefig(figure, *args, **options):
        panels.append(figure.axes)
        return real(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return panels


def curves(axis):
    """Label -> (x, y, colour) of the curves of a panel, those of single seeds left out."""
    lines = axis.get_legend_handles_labels()[0]
    return {x.get_label(): (x.get_xdata(), x.get_ydata(), x.get_color()) for x in lines}


# --- tables ---


def test_a_row_for_each_run(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", seeds=(0, 1, 2, None), offset=100.0, done=False)
    out, data = tmp_path / "plots" / "both.png", tmp_path / "both.json"
    compare.main([str(one), str(two), "--out", str(out), "--json", str(data)])

    rows, differences = tables_of(capsys)
    final = np.array([2.0, 12.0, 22.0, 32.0])
    lo, hi = report.iqm_interval(final)
    assert rows[0][0] == "ppo (one)"
    assert rows[0][1:4] == ["gymnax/CartPole-v1", "4/4", f"17.0 [{lo:.1f}, {hi:.1f}]"]
    assert rows[0][4:] == ["2.0", "2", "200", "2.0", "30.0", "2 x cpu"]
    assert rows[1][0] == "ppo (two), unfinished"
    assert rows[1][2] == "3/4"
    assert rows[1][3].startswith("112.0 [")
    assert rows[1][4] == "102.0"
    assert rows[1][7:9] == ["2.0", "-"]
    with Image.open(out) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    saved = json.loads(data.read_text())
    assert saved["rows"][0]["per_seed"] == final.tolist()
    assert saved["rows"][1]["per_seed"] == [102.0, 112.0, 122.0, None]
    middle, interval = report.difference(np.array([102.0, 112.0, 122.0]), final)
    assert saved["differences"] == [
        {
            "label": "ppo (two)",
            "minus": "ppo (one)",
            "env": "gymnax/CartPole-v1",
            "n": [3, 4],
            "steps": [200, 200],
            "iqm": middle,
            "interval": list(interval),
        }
    ]
    shown = report.estimate(middle, interval, digits=1)
    assert differences == [["ppo (two)", "ppo (one)", "gymnax/CartPole-v1", shown]]


def test_curves_as_csv(tmp_path, capsys):
    run = write_run(tmp_path / "run", seeds=(3, None))
    out = tmp_path / "curves.csv"
    compare.main([str(run), "--csv", str(out)])
    head, *rows = [line.split(",") for line in out.read_text().splitlines()]
    assert head == ["label", "algorithm", "environment", "seed", "steps", "seconds", "return"]
    assert rows[:3] == [
        ["ppo", "ppo", "gymnax/CartPole-v1", "3", str(100 * i), f"{i:.1f}", f"{30.0 + i:.1f}"]
        for i in range(3)
    ]
    assert [row[3:] for row in rows[3:]] == [
        ["-1", str(100 * i), f"{i:.1f}", "nan"] for i in range(3)
    ]


def test_a_row_for_each_swept_value(tmp_path, capsys):
    run = write_run(tmp_path / "run", labels=("gamma=0.9", "gamma=0.99"), seeds=(1, 2))
    compare.main([str(run), "--out", str(tmp_path / "x.png")])
    rows = table_of(capsys)
    assert [row[0] for row in rows] == ["ppo gamma=0.9", "ppo gamma=0.99"]
    assert [row[2] for row in rows] == ["2/2", "2/2"]


def test_added_seeds_count_to_their_run(tmp_path, capsys, monkeypatch):
    """Unless they are unfinished, of another algorithm, have other settings or one of its seeds."""

    def changed(path, part, **values):
        saved = rundir.read_json(path / "config.json")
        saved[part] |= values
        rundir.write_json(path / "config.json", saved)
        return path

    runs = [write_run(tmp_path / "run"), write_run(tmp_path / "run_s4", seeds=(4, 5))]
    runs += [
        changed(write_run(tmp_path / "run_s6", seeds=(6,)), "config", gamma=0.5),
        write_run(tmp_path / "run_s7", seeds=(7,), done=False),
        changed(write_run(tmp_path / "run_s8", seeds=(8,)), "launch", num_evals=5),
        write_run(tmp_path / "run_s9", seeds=(3, 9)),
        write_run(tmp_path / "run_s10", seeds=(10,), algo="bpo"),
    ]
    monkeypatch.chdir(tmp_path)
    compare.main([*map(str, runs[1:]), "run"])  # one path is relative
    rows = {row[0]: row[2] for row in table_of(capsys)}
    assert rows == {
        "ppo (run)": "6/6",
        "ppo (run_s6)": "1/1",
        "ppo (run_s7), unfinished": "1/1",
        "ppo (run_s8)": "1/1",
        "ppo (run_s9)": "2/2",
        "bpo": "1/1",
    }


def test_seeds_are_added_to_a_run_with_added_seeds(tmp_path, capsys):
    paths = [tmp_path / x for x in ("x", "x_s2", "x_s2_s4")]
    for path, seeds in zip(paths, ((0, 1), (2, 3), (4, 5)), strict=True):
        write_run(path, seeds=seeds)
    compare.main([*map(str, paths)])
    assert [row[2] for row in table_of(capsys)] == ["6/6"]


def test_nobody_alive(tmp_path, capsys):
    run = write_run(tmp_path / "run", seeds=(1, None))
    dead = write_run(tmp_path / "dead", labels=("a",), seeds=(1,))
    evals = {"steps": [0, 9], "seconds": [0.0, 1.0]}
    nothing = [np.full((1, 2), np.nan)] * 2
    rundir.write_evals(dead, evals | {"returns": nothing, "lengths": nothing})
    compare.main([str(run), str(dead), "--out", str(tmp_path / "x.png")])
    rows = table_of(capsys)
    assert rows[0][3] == "12.0 [-, -]"
    assert rows[1][2:4] == ["0/1", "- [-, -]"]


# --- labels ---


def test_runs_of_one_name_are_told_apart_by_where_their_paths_differ(tmp_path):
    """Of three runs of P3O on cartpole one is in a folder of that name; pendulum has one."""
    paths = [write_run(tmp_path / x / "task" / "run", algo="p3o") for x in ("a2c", "b/x", "p3o")]
    other = write_run(tmp_path / "a2c" / "pendulum", env="pendulum", algo="p3o")
    labels = [entry.label for entry in entries_of(*paths, other)]
    assert labels == ["p3o (a2c)", "p3o (b/x)", "p3o", "p3o"]


def test_a_run_inside_another_is_told_apart_too(tmp_path):
    outer, inner = (write_run(tmp_path / x) for x in ("run", "run/more"))
    assert [x.label for x in entries_of(outer, inner)] == ["ppo (run)", "ppo (run/more)"]
    outer, inner = (write_run(tmp_path / x) for x in ("q", "q/q"))
    assert [x.label for x in entries_of(outer, inner)] == ["ppo (q)", "ppo (q/q)"]


def test_small_differences_have_their_decimals(tmp_path, capsys):
    """Differences of -0.03, and of 0 with ends of 10."""
    rows = [
        {"label": "a", "minus": "b", "env": "c", "n": [8, 8], "steps": [1, 1], "iqm": iqm}
        | {"interval": interval}
        for iqm, interval in ((-0.03, [-0.04, -0.001]), (0.0, [-10.0, 10.0]), (None, [None, None]))
    ]
    head, cells = report.difference_table(rows)
    assert head[-1] == "difference of the IQMs [95 % interval]"
    for count, rough in ((5, False), (4, True)):
        rows[0]["n"] = [8, count]
        assert ("rough with 4 seeds" in report.difference_table(rows)[0][-1]) == rough
    assert [x[3] for x in cells] == ["-0.03 [-0.04, 0.00]", "0.0 [-10.0, 10.0]", "- [-, -]"]


def test_differences_after_unequal_steps_say_so(tmp_path, capsys):
    one, two = (write_run(tmp_path / x) for x in ("one", "two"))
    evals = dict(np.load(two / "eval.npz"))
    np.savez(two / "eval.npz", **(evals | {"steps": 10 * evals["steps"]}))
    compare.main([str(one), str(two)])
    _, differences = tables_of(capsys)
    assert differences[0][-1] == "2,000 and 200"


def test_the_legend_counts_the_seeds_that_are_alive(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seeds=(1, None, 2), algo="bpo")]
    runs += [write_run(tmp_path / "c", "pendulum", seeds=(1, 2), algo="bpo")]
    assert report.names(entries_of(*runs)) == {"ppo": "ppo (n=4)", "bpo": "bpo (n=2 of 2-3)"}


@pytest.mark.parametrize(
    ("num_seeds", "band"), [(4, "lowest and highest seed"), (5, "95 % interval")]
)
def test_the_legend_says_what_the_band_is(tmp_path, drawn, num_seeds, band):
    run = write_run(tmp_path / "run", seeds=(*range(num_seeds), None))
    compare.main([str(run), "--out", str(tmp_path / "x.png")])
    (legend,) = drawn[0][0].figure.legends
    text = f"line: IQM over seeds; band: {band}; thin lines: single seeds"
    assert legend.get_title().get_text() == text


@pytest.mark.parametrize(("num_seeds", "lines"), [(1, 1), (2, 3), (16, 17), (17, 1)])
def test_up_to_16_seeds_have_a_thin_line_each_and_the_legend_says_so(
    tmp_path, drawn, num_seeds, lines
):
    run = write_run(tmp_path / "run", seeds=range(num_seeds))
    compare.main([str(run), "--out", str(tmp_path / "x.png")])
    axis = drawn[0][0]
    assert len(axis.lines) == lines
    (legend,) = axis.figure.legends
    assert ("thin lines" in legend.get_title().get_text()) == (lines > 1)


def test_dollars_are_no_formulas(tmp_path, drawn):
    run = str(write_run(tmp_path / "run"))
    argv = ["--labels", "$5 or $6", "--title", "$a$", "--out", str(tmp_path / "x.png")]
    compare.main([run, *argv])
    figure = drawn[0][0].figure
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    assert [x.get_text() for x in texts] == [r"\$a\$", r"\$5 or \$6 (n=4)"]


def test_labels_are_those_of_the_legend_in_order(tmp_path):
    runs = [
        write_run(tmp_path / algo / env, env=env, algo=algo)
        for algo in ("ppo", "bpo")
        for env in ("cartpole", "pendulum")
    ]
    renamed = report.relabel(entries_of(*runs), ["A", "B"])
    assert [entry.label for entry in renamed] == ["A", "A", "B", "B"]
    with pytest.raises(ValueError, match="1 labels for 2 curves: ppo, bpo"):
        report.relabel(entries_of(*runs), ["A"])
    with pytest.raises(ValueError, match="two curves of gymnax/CartPole-v1 are called 'A'"):
        report.relabel(entries_of(*runs), ["A", "A"])
    apart = report.relabel(entries_of(runs[0], runs[3]), ["A", "A"])  # on different tasks
    assert [entry.label for entry in apart] == ["A", "A"]


# --- curves ---


def test_a_panel_for_each_task(tmp_path, drawn):
    """PPO on both tasks, and BPO, 100 higher, on one."""
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", env="pendulum", seeds=(0, 1)),
        write_run(tmp_path / "c", env="pendulum", offset=100.0, algo="bpo"),
    ]
    compare.main([*map(str, runs), "--out", str(tmp_path / "x.png"), "--labels", "PPO", "BPO"])
    ((left, right),) = drawn
    assert [axis.get_title() for axis in (left, right)] == ["CartPole-v1", "Pendulum-v1"]
    assert [axis.get_xlabel() for axis in (left, right)] == ["environment steps"] * 2
    assert list(curves(left)) == ["PPO (n=2-4)"]
    assert list(curves(right)) == ["PPO (n=2-4)", "BPO (n=4)"]
    x, y, color = curves(right)["BPO (n=4)"]
    assert (x.tolist(), y.tolist(), color) == ([0, 100, 200], [115, 116, 117], "#D55E00")
    assert curves(left)["PPO (n=2-4)"][2] == curves(right)["PPO (n=2-4)"][2] == "#0072B2"


def test_curves_against_steps_and_seconds(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    compare.main([str(run), "--out", str(tmp_path / "x.png"), "--x", "seconds", "steps"])
    found = [(axis.get_xlabel(), curves(axis)["ppo (n=4)"][0].tolist()) for axis in drawn[0]]
    assert found == [
        ("seconds of training, all seeds", [0, 1, 2]),
        ("environment steps", [0, 100, 200]),
    ]


def test_steps_of_offline_runs_are_gradient_steps(tmp_path, drawn):
    online, offline = write_run(tmp_path / "ppo"), write_run(tmp_path / "bc", algo="bc")
    saved = rundir.read_description(offline)
    saved["config"]["dataset"] = "data.npz"
    rundir.write_json(offline / "config.json", saved)
    report.plot_curves(entries_of(offline), tmp_path / "x.png")
    assert drawn[0][0].get_xlabel() == "gradient steps"
    both = entries_of(online, offline)
    with pytest.raises(ValueError, match="steps of bc are gradient steps, those of ppo env"):
        report.plot_curves(both, tmp_path / "x.png")
    report.plot_curves(both, tmp_path / "x.png", xs=("seconds",))


def test_seeds_have_lines_of_their_own_if_they_are_few(tmp_path, drawn):
    runs = [write_run(tmp_path / x, seeds=range(8)) for x in "abc"]
    for few in (runs[:2], runs):
        report.plot_curves(entries_of(*few), tmp_path / "x.png")
    assert [len(axes[0].lines) for axes in drawn] == [2 + 16, 3]


def test_every_curve_looks_different(tmp_path):
    """Twelve runs of PPO, and one of BNPO."""
    run, rows = rundir.read_run(write_run(tmp_path / "run")), np.arange(4)
    runs = [report.Entry(x, run, rows) for x in ("a0", "PPO", *(f"a{i}" for i in range(1, 11)))]
    looks = report.looks([*runs, report.Entry("bnpo", run._replace(algo="bnpo"), rows)])
    assert looks["PPO"] == (report.COLORS["ppo"], "-")
    assert looks["bnpo"] == (report.COLORS["bnpo"], "-")
    assert len({*looks.values()}) == len(looks) == 13
    del looks["PPO"], looks["bnpo"]
    taken = {report.COLORS["ppo"], report.COLORS["bnpo"]}
    solid = [color for color, style in looks.values() if style == "-"]
    assert len(solid) == 8
    assert not taken & {*solid}


@pytest.mark.parametrize(
    ("name", "start"), [("x.png", b"\x89PNG"), ("x.pdf", b"%PDF"), ("x.svg", b"<?xml")]
)
def test_the_name_says_the_format(name, start, tmp_path):
    run = write_run(tmp_path / "run")
    compare.main([str(run), "--out", str(tmp_path / name), "--width", "3.25", "--title", "T"])
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start)
    assert b"/Type3" not in content  # fonts that journals refuse


def test_nothing_overlaps_or_is_cut_off_in_a_column(tmp_path, monkeypatch, drawn):
    """Panels with their labels, title and legend of five tasks and of long names."""
    problems, real = [], Figure.savefig

    def savefig(figure, *args, **options):
        figure.draw_without_rendering()
        parts = [*figure.axes, *figure.legends, *figure.texts]
        boxes = [part.get_tightbbox().padded(-1) for part in parts if part.get_visible()]
        problems.extend(x for x in boxes if figure.bbox.padded(1).count_contains(x.corners()) != 4)
        problems.extend(x for x, y in itertools.combinations(boxes, 2) if x.overlaps(y))
        return real(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    tasks = ("cartpole", "pendulum", "asterix", "breakout", "space_invaders")
    runs = [
        write_run(tmp_path / a / x, env=x, algo=a, seeds=range(count))
        for x in tasks
        for a, count in (("ppo", 6), ("bpo", 3), ("sac", 3))  # so that the legend says most
    ]
    labels = ["Proximal policy optimisation", "BPO", "Soft actor-critic"]
    ranges = tmp_path / "ranges.json"
    rundir.write_json(ranges, {task: [0, 50] for task in tasks})
    argv = [*map(str, runs), "--width", "3.25", "--labels", *labels, "--normalise", str(ranges)]
    compare.main([*argv, "--out", str(tmp_path / "x.png"), "--title", "Five tasks"])
    assert problems == []
    labels = [axis.get_xlabel() for axis in drawn[0]]
    assert labels == ["", "", "", "environment steps", "environment steps"]  # nothing below


# --- scores ---


def test_scores_are_final_returns_between_the_ends(tmp_path, capsys, drawn):
    """Finals 2 and 12 of cartpole from 2 to 22: 0 and 0.5; of pendulum from 0 to 2: 1 and 6."""
    runs = [write_run(tmp_path / x, env=x, seeds=(0, 1)) for x in ("cartpole", "pendulum")]
    ranges, data = tmp_path / "ranges.json", tmp_path / "data.json"
    rundir.write_json(ranges, {"cartpole": [2, 22], "gymnax/Pendulum-v1": [0, 2], "ant": [0, 1]})
    argv = [*map(str, runs), "--normalise", str(ranges), "--out", str(tmp_path / "x.png")]
    compare.main([*argv, "--json", str(data)])
    (score,) = json.loads(data.read_text())["scores"]
    assert (score["label"], score["tasks"], score["n"], score["alive"]) == ("ppo", 2, 4, 4)
    assert score["iqm"] == 0.75
    assert "| ppo | 2 | 4/4 | 0.750 [" in capsys.readouterr().out
    assert (tmp_path / "x_scores.png").exists()
    _, (left, right) = drawn
    assert left.lines[1].get_xdata().tolist() == [0.75]
    taus, share, _ = curves(right)["ppo"]
    assert (taus[0], taus[-1]) == (0.0, 6.0)
    assert (share[0], share[-1]) == (0.75, 0.0)


def test_scores_that_cannot_be_compared_are_refused(tmp_path):
    run = lambda name, *args, **options: write_run(tmp_path / name, *args, **options)
    ppo, pendulum = run("a"), run("b", "pendulum")
    ranges = {"gymnax/CartPole-v1": (0.0, 1.0), "gymnax/Pendulum-v1": (0.0, 1.0)}
    cases = [
        ([ppo, run("c", "acrobot")], "missing for gymnax/Acrobot-v1"),
        ([ppo, pendulum, run("d", algo="bpo")], "bpo has no run on gymnax/Pendulum-v1"),
        ([ppo, run("e", "pendulum", seeds=(0,))], "ppo has 1 seeds on gymnax/Pendulum-v1"),
        ([run("f", seeds=(0, None)), pendulum], "equal numbers"),
    ]
    for run_dirs, message in cases:
        with pytest.raises(ValueError, match=message):
            report.scores(entries_of(*run_dirs), ranges)
    (entry,) = entries_of(ppo)
    dead = entry._replace(run=entry.run._replace(final=np.full((4, 2), np.nan)))
    with pytest.raises(ValueError, match="every seed of ppo on gymnax/CartPole-v1 died"):
        report.scores([dead], ranges)


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "x.jpg"], "--out x.jpg: its name is to end in .png, .pdf, .svg"),
        (["--out", "x"], "--out x: its name"),
        (["--out", "{old}"], "old.png exists: choose another name, or --force to replace it"),
        (["--json", "{old}"], "old.png exists"),
        (["--out", "x.png", "--json", "{old}"], "old.png exists"),
        (
            ["--out", "x.png", "--json", "x.png"],
            "x.png is to be written twice",
        ),
        (["--json", "x.png", "--csv", "../{here}/x.png"], "x.png is to be written twice"),
        (["--json", "{old}/x.json"], "old.png is no folder that can be written to"),
        (["--labels", "_ppo"], "label '_ppo': it must not be empty or begin with _"),
        (["--labels", " "], "label ' ': it must not be empty or begin with _"),
        (["--normalise", "{text}"], "cartpole is to have [low, high], two numbers, not '19'"),
        (["--normalise", "{twice}"], "twice.json: gymnax/CartPole-v1 is there twice"),
        (["--json=~nosuchuser/x"], "argument --json: ~nosuchuser/x: Could not determine home"),
        (["--width", "0"], "--width 0: 2 to 30 inches"),
        (["--x", "gradient_steps"], "invalid choice: 'gradient_steps'"),
        (["--x", "seconds"], "--x has no effect without --out"),
        (["--title", "mine"], "--title has no effect without --out"),
        (["--labels", "a", "b"], "2 labels for 1 curves: ppo"),
        (["--normalise", "{none}"], "none.json does not exist"),
        (["--normalise", "{ranges}"], "cartpole is to have [low, high], two numbers, not [5, 5]"),
        (["{none}"], "is not a run directory"),
        (["{none}/../run"], "../run is given twice: name each run once"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, message, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    old, ranges = tmp_path / "old.png", tmp_path / "ranges.json"
    old.write_text("precious")
    rundir.write_json(ranges, {"cartpole": [5, 5]})
    twice = tmp_path / "twice.json"
    rundir.write_json(twice, {"cartpole": [0, 500], "gymnax/CartPole-v1": [0, 10]})
    text = tmp_path / "text.json"
    rundir.write_json(text, {"cartpole": "19"})
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    names = {"old": old, "ranges": ranges, "twice": twice, "none": tmp_path / "none.json"}
    names |= {"text": text, "here": tmp_path.name}
    with pytest.raises(SystemExit) as error:
        compare.main([str(run), *(flag.format(**names) for flag in flags)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert old.read_text() == "precious"
    assert {*tmp_path.iterdir()} == before


def test_without_out_there_is_only_the_table(tmp_path, capsys, monkeypatch):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", env="pendulum")
    ranges = tmp_path / "ranges.json"
    rundir.write_json(ranges, {"cartpole": [0, 5], "pendulum": [0, 5]})
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    for _ in range(2):
        compare.main([str(run), str(other), "--normalise", str(ranges)])
        assert capsys.readouterr().out.count("| ppo |") == 3  # two tasks, and the scores
    assert {*tmp_path.iterdir()} == before


def test_force_replaces(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "x.png"
    out.write_text("old")
    compare.main([str(run), "--out", str(out), "--force"])
    assert out.read_bytes().startswith(b"\x89PNG")


SWEPT = {"labels": ("gamma=0.9", "gamma=0.99")}


def test_further_seeds_of_an_unfinished_run_stay_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / "run", done=False), write_run(tmp_path / "run_s4", seeds=(4, 5))]
    compare.main([*map(str, runs)])
    assert [row[2] for row in table_of(capsys)] == ["4/4", "2/2"]


def test_the_values_of_a_sweep_are_compared(tmp_path):
    run = rundir.read_run(write_run(tmp_path / "run", **SWEPT, seeds=(1, 2)))
    run = run._replace(final=np.array([[1.0], [1.0], [5.0], [5.0]]))
    (row,) = report.differences(report.entries([run]))
    assert (row["iqm"], row["n"]) == (4.0, [2, 2])


def test_scores_are_drawn_within_each_task():
    scores = np.array([[0.0, 0.2], [0.4, 1.0]])
    assert report.score_summary("a", scores)["interval"] == list(report.iqm_interval(*scores))


def test_the_band_of_a_sweep_is_that_of_one_value(tmp_path, drawn):
    run = write_run(tmp_path / "run", **SWEPT, seeds=range(4))
    compare.main([str(run), "--out", str(tmp_path / "x.png")])
    (legend,) = drawn[0][0].figure.legends
    assert "; band: lowest and highest seed" in legend.get_title().get_text()


def test_a_label_is_one_cell(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    compare.main([str(run), "--labels", "a|b\nc"])
    assert r"| a\|b c | gymnax/CartPole-v1 |" in capsys.readouterr().out


def test_steps_of_two_kinds_are_refused_under_one_label(tmp_path, capsys):
    runs = [write_run(tmp_path / x, env=x) for x in ("cartpole", "pendulum")]
    saved = rundir.read_json(runs[1] / "config.json")
    saved["config"]["dataset"] = "data.npz"
    rundir.write_json(runs[1] / "config.json", saved)
    argv = [*map(str, runs), "--labels", "ours", "--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit):
        compare.main(argv)
    assert "steps of ours are gradient steps" in capsys.readouterr().err


def test_a_legend_that_never_fits_is_drawn_once(tmp_path):
    with report.figure(tmp_path / "x.png", 1, 1, 2.0, "") as (axis,):
        for name in "ab":
            axis.plot([0, 1], label=80 * name)
    assert len(axis.figure.legends) == 1
