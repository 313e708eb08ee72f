"""The page of runs: its numbers, its charts and what it loads, on runs written by hand."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_experiments import write_run

from algos.launch import report as statistics
from algos.launch import rundir
from experiments import report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page: every element's tag and attributes, its texts, and the cells of tables by class."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.tables, self.open = [], [], {}, []
        self.feed(text)
        assert self.open == []  # what was opened was closed

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
            self.tables.setdefault(dict(attributes)["class"], []).append(self.rows)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data

    def all(self, tag):
        """Attributes of every element of a tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    def captions(self):
        """Names of the charts of metrics, in order."""
        return [x["aria-label"] for x in self.all("svg") if "/" in x.get("aria-label", "")]


def write_page(tmp_path, *argv):
    """The page of runs, parsed, and its path."""
    out = tmp_path / "page.html"
    report.main([*map(str, argv), "--out", str(out), "--force"])
    return Page(out.read_text())


def write_metrics(run_dir, records):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))


def change(path, name, **values):
    """Change values of the part `name` of a description."""
    saved = rundir.read_json(path / "config.json")
    saved[name] |= values
    rundir.write_json(path / "config.json", saved)


# --- numbers ---


def test_numbers_are_those_of_the_summary(tmp_path):
    """Two algorithms on one task; seed 2 of the second one is not finished and one seed is dead."""
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", seeds=(0, None, 2, 7), offset=1e3, done=False, algo="bpo")
    page = write_page(tmp_path, one, two)
    returns, differences, seeds = (page.tables[x][0] for x in ("returns", "differences", "seeds"))
    entries = statistics.entries([rundir.read_run(one), rundir.read_run(two)])
    rows = [statistics.summary(*entry) for entry in entries]
    assert returns[0][3] == "final greedy return, IQM [lowest and highest seed]"
    assert "Band: lowest and highest seed." in " ".join(page.texts)
    for found, row in zip(returns[1:], rows, strict=True):
        assert found[3] == statistics.estimate(row["iqm"], row["interval"])
    assert returns[1][:3] == ["ppo", "gymnax/CartPole-v1", "4/4"]
    assert returns[1][4:] == ["2.0", "2", "200", "2.0", "30.0", "2 x cpu"]
    assert [x[0] for x in returns[1:]] == ["ppo", "bpo, unfinished"]
    (difference,) = statistics.differences(entries)
    shown = statistics.estimate(difference["iqm"], difference["interval"], digits=1)
    assert differences[1:] == [["bpo", "ppo", "gymnax/CartPole-v1", shown]]
    assert seeds == [
        ["seed", "-1", "0", "1", "2", "3", "7"],  # a dead one has number -1 here
        ["ppo", "", "2.0", "12.0", "22.0", "32.0", ""],
        ["bpo", "dead", "1,002.0", "", "1,022.0", "", "1,072.0"],
    ]
    assert "2 runs; 7 of 8 seeds are alive." in page.texts


def test_small_returns_have_two_decimals_everywhere(tmp_path):
    page = write_page(tmp_path, write_run(tmp_path / "run", seeds=(0,), offset=-1.85))
    returns, seeds = (page.tables[x][0] for x in ("returns", "seeds"))
    assert returns[1][3:5] == ["0.15 [-, -]", "0.15"]
    assert seeds[1] == ["ppo", "0.15"]


def test_a_swept_run_has_a_row_for_each_value(tmp_path):
    run = write_run(tmp_path / "run", labels=("gamma=0.9", "gamma=0.99"), seeds=(1, 2))
    page = write_page(tmp_path, run)
    names = ["ppo gamma=0.9", "ppo gamma=0.99"]
    assert [row[0] for row in page.tables["returns"][0][1:]] == names
    assert [row[0] for row in page.tables["seeds"][0][1:]] == names
    assert [row[:2] for row in page.tables["differences"][0][1:]] == [names[::-1]]
    assert [f"{name} (n=2)" in page.texts for name in names] == [True, True]
    facts = dict(page.tables["facts"][0])
    assert facts["swept"] == "gamma=0.9, gamma=0.99"
    assert facts["seeds"] == "1, 2"


def test_what_was_run(tmp_path):
    run = write_run(tmp_path / "run")
    meta = {"commit": "abc+", "versions": {"jax": "1", "brax": "2"}, "command": "algos/ppo.py <x>"}
    rundir.write_json(run / "meta.json", {"num_devices": 2, "device": "cpu"} | meta)
    seconds = {"train": 2.0, "compile": 30.0, "eval": 4.0, "wall": 1234.5}
    rundir.write_json(run / "done.json", {"seconds": seconds})
    facts = dict(write_page(tmp_path, run).tables["facts"][0])
    shown = {"compile, s": "30.0", "train, s": "2.0", "eval, s": "4.0", "wall, s": "1,234.5"}
    shown |= {"versions": "jax 1, brax 2", "command": "algos/ppo.py <x>", "commit": "abc+"}
    shown |= {"directory": str(run), "steps": "200", "task": "cartpole", "device": "2 x cpu"}
    assert facts | shown == facts


def test_only_settings_that_differ_are_compared(tmp_path):
    """A field that one run lacks is no difference; those in a list of objects have a path."""
    runs = [write_run(tmp_path / x, algo=x) for x in ("ppo", "bpo", "sac")]
    for i, run in enumerate(runs):
        change(run, "config", gamma=[0.9, 0.9, 0.5][i], brains=[{"nstep": 3}, {"nstep": i}])
    change(runs[0], "config", only_here=1)
    change(runs[1], "config", hidden=[1, 2])
    change(runs[2], "launch", num_evals=7, num_seeds=5)  # num_evals is not known of the others
    page = write_page(tmp_path, *runs)
    hidden = json.dumps(rundir.read_description(runs[0])["config"]["hidden"])
    head, *rows = page.tables["facts"][1]
    assert head == ["", "ppo", "bpo", "sac"]
    assert sorted(rows) == [
        ["brains.1.nstep", "0", "1", "2"],
        ["gamma", "0.9", "0.9", "0.5"],
        ["hidden", hidden, "[1, 2]", hidden],
        ["num_seeds", "4", "4", "5"],
    ]
    assert "Differences" in page.texts
    configurations = [json.loads(x) for x in page.texts if x.startswith("{")]
    saved = [rundir.read_description(run) for run in runs]
    for found, wanted in zip(configurations, saved, strict=True):
        assert found == wanted | {"meta": rundir.read_json(runs[0] / "meta.json")}
    assert "Differences" not in write_page(tmp_path, runs[0]).texts


# --- charts ---


def test_a_chart_for_each_task_against_steps_and_seconds(tmp_path):
    runs = [write_run(tmp_path / x, env=x) for x in ("cartpole", "pendulum")]
    page = write_page(tmp_path, *runs, "--title", "T")
    labels = [x.get("aria-label") for x in page.all("svg")]
    assert labels == [None, *["gymnax/CartPole-v1", "gymnax/Pendulum-v1"] * 2]  # None: the legend
    units = [x for x in page.texts if x in ("environment steps", "seconds of training, all seeds")]
    assert units == ["environment steps"] * 2 + ["seconds of training, all seeds"] * 2
    assert page.tables["seeds"][0][1][0] == "ppo, gymnax/CartPole-v1"
    assert page.texts.count("T") == 2  # title and heading


def test_offline_and_other_runs_share_seconds_alone(tmp_path):
    online, offline = write_run(tmp_path / "ppo"), write_run(tmp_path / "bc", algo="bc")
    change(offline, "config", dataset="data.npz")
    page = write_page(tmp_path, online, offline)
    assert [x.get("aria-label") for x in page.all("svg")][2:] == ["gymnax/CartPole-v1"]
    assert "seconds of training, all seeds" in page.texts


def test_gradient_steps_and_environment_steps_have_charts_of_their_own(tmp_path):
    online, offline = write_run(tmp_path / "ppo"), write_run(tmp_path / "bc", algo="bc")
    change(offline, "config", dataset="data.npz")
    for run in (online, offline):
        write_metrics(run, [{"global_step": i, "losses/a": [i] * 4} for i in range(2)])
    page = write_page(tmp_path, online, offline)
    assert page.captions()[1:] == ["losses/a", "losses/a"]
    headings = [x for x in page.texts if x.startswith("gymnax/CartPole-v1, ") and "step" in x]
    units = ["environment steps", "gradient steps"]
    assert headings == [f"gymnax/CartPole-v1, {unit}" for unit in units]


def test_charts_of_metrics(tmp_path):
    """What changes has a chart, what does not is named; nulls and a last line cut short are left
    out."""
    run = write_run(tmp_path / "run", seeds=(0, 1))
    records = [
        {"losses/a": [1.0, 2.0], "health/b": [0, 0], "charts/d": 5.0, "replay/e": [None, None]},
        {"losses/a": [None, 3.0], "health/b": [0, None], "charts/d": 6.0, "eval/x": [1, 2]},
        {"losses/a": [None, None], "health/b": [None, None], "charts/d": 7.0, "time/x": 3},
    ]
    write_metrics(run, [{"global_step": i} | x for i, x in enumerate(records)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"global_step": 3, "losses/late": [1')
    page = write_page(tmp_path, run)
    assert page.captions() == ["gymnax/CartPole-v1"] * 2 + ["charts/d", "losses/a"]
    assert "Constant: health/b = 0, replay/e (no value)." in page.texts


def test_a_charts_line_is_the_median_of_the_seeds_with_a_value():
    axis = Figure().subplots()
    steps, nothing = np.array([0.0, 10.0, 20.0]), np.full((3, 3), np.nan)
    values = np.array([[1.0, 2.0, 9.0], [np.nan, 4.0, 6.0], [np.nan] * 3])
    statistics.draw_metric(axis, [(("red", "--"), steps, values), (("blue", "-"), steps, nothing)])
    (line,), (band,) = axis.lines, axis.collections
    assert line.get_xydata().tolist() == [[0, 2], [10, 5]]
    assert (line.get_color(), line.get_linestyle()) == ("red", "--")
    assert {tuple(x) for x in band.get_paths()[0].vertices} == {(0, 1), (0, 9), (10, 4), (10, 6)}
    assert axis.get_yscale() == "linear"
    statistics.draw_metric(axis, [(("red", "-"), steps, values**3 - 1.0)])  # from 0 on
    assert axis.get_yscale() == "linear"
    statistics.draw_metric(axis, [(("red", "-"), steps, values**3)])
    assert axis.get_yscale() == "log"


def test_runs_of_one_task_have_charts_of_all_their_metrics(tmp_path):
    runs = [write_run(tmp_path / x, algo=x, seeds=(0,)) for x in ("ppo", "bpo")]
    for run, name in zip(runs, ("losses/a", "ratios/b"), strict=True):
        write_metrics(run, [{"global_step": i, name: [i]} for i in range(2)])
    assert write_page(tmp_path, *runs).captions()[2:] == ["losses/a", "ratios/b"]


# --- what every page promises ---


def test_the_page_loads_nothing_and_its_names_are_unique(tmp_path):
    runs = [write_run(tmp_path / x, algo=x, seeds=range(3)) for x in ("ppo", "bpo")]
    for run in runs:
        write_metrics(run, [{"global_step": i, "losses/a": [i] * 3} for i in range(2)])
    page = write_page(tmp_path, *runs)
    names = [x["id"] for _, x in page.elements if "id" in x]
    assert len(names) == len({*names}) > 10
    references = []
    for tag, attributes in page.elements:
        assert tag not in ("link", "script", "base", "object", "embed")
        for value in attributes.values():
            references += re.findall(r"url\(#(.*?)\)", value or "")
            assert "://" not in (value or "")
        references += [attributes[x][1:] for x in ("href", "xlink:href") if x in attributes]
    assert {*references} <= {*names}
    assert len(references) > 10
    assert re.findall(r"url\((?!#)|@import|https?:", (tmp_path / "page.html").read_text()) == []


def test_text_is_text(tmp_path):
    evil = '<script>alert(1)</script> & "x" $\\frac'
    run = write_run(tmp_path / "a & <b>", seeds=(0,), labels=(evil,))
    write_metrics(run, [{"global_step": i, f"losses/{evil}": [i]} for i in range(2)])
    rundir.write_json(run / "meta.json", {"num_devices": 1, "device": evil, "command": evil})
    page = write_page(tmp_path, run, "--title", evil)
    assert page.all("script") == []
    assert page.texts.count(evil) >= 3
    assert f"losses/{evil}" in page.texts
    assert dict(page.tables["facts"][0])["directory"] == str(run)


@pytest.mark.parametrize("count", [1, 3])
def test_nobody_alive_and_nothing_finished(count, tmp_path):
    """A run that died at its first or third evaluation, without metrics."""
    run = write_run(tmp_path / "run", seeds=(1,), done=False)
    nothing = [np.full((1, 2), np.nan)] * count
    evals = {"steps": [*range(count)], "seconds": [0.0] * count}
    rundir.write_evals(run, evals | {"returns": nothing, "lengths": nothing})
    page = write_page(tmp_path, run)
    assert page.tables["returns"][0][1][:4] == [
        "ppo, unfinished",
        "gymnax/CartPole-v1",
        "0/1",
        "- [-, -]",
    ]
    assert page.tables["seeds"][0][1] == ["ppo", "dead"]
    assert "Losses and health" not in page.texts
    assert "Policies" not in page.texts


# --- policies ---


def draw(run, *names):
    """Pictures as render.py leaves them."""
    (run / "videos").mkdir()
    for name in names:
        path = run / "videos" / name
        if path.suffix == ".gif":
            Image.new("RGB", (20, 10), "red").save(path)
        else:
            path.write_text(
                '<!doctype html><p id="x">"1" &amp; 2</p><script>let x = "</p>"</script>'
            )


def test_pictures_are_in_the_page(tmp_path):
    """Of seeds 0 to 3 the best is 3, the median 2 and the worst 0; that of seed 1 is an old one."""
    run = write_run(tmp_path / "run")
    draw(run, "best_s003.gif", "median_s002.html", "worst_s000.gif", "worst_s001.gif")
    page = write_page(tmp_path, run)
    gif = base64.b64encode((run / "videos" / "best_s003.gif").read_bytes()).decode()
    assert [x["src"] for x in page.all("img")] == [f"data:image/gif;base64,{gif}"] * 2
    (player,) = page.all("iframe")
    assert player["srcdoc"] == (run / "videos" / "median_s002.html").read_text()
    assert player["sandbox"] == "allow-scripts"
    texts = [x for x in page.texts if "final return " in x]
    assert texts == [
        "ppo, best: seed 3, final return 32.0",
        "ppo, median: seed 2, final return 22.0",
        "ppo, worst: seed 0, final return 2.0",
    ]


# --- bad input ---


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{run}", "--out", "x.htm"], "--out x.htm: its name is to end in .html"),
        (["{run}", "--out", "{old}"], "old.html exists: choose another name, or --force to"),
        (["{run}"], "the following arguments are required: --out"),
        (["{run}", "{run}", "--out", "x.html"], "run is given twice: name each run once"),
        (["{run}", "{run}/../run", "--out", "x.html"], "../run is given twice"),
        (["{run}", "{none}", "--out", "x.html"], "none is not a run directory"),
        (["{damaged}", "--out", "x.html"], "metrics.jsonl is damaged in line 1 (losses/a has not"),
        (["{run}", "--out", "{old}/x.html"], "old.html"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, message, tmp_path, capsys, monkeypatch):
    run, damaged = write_run(tmp_path / "run"), write_run(tmp_path / "damaged")
    write_metrics(damaged, [{"global_step": 0, "losses/a": [1.0, 2.0]}])  # of 4 rows
    old = tmp_path / "old.html"
    old.write_text("precious")
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    names = {"run": run, "old": old, "none": tmp_path / "none", "damaged": damaged}
    with pytest.raises(SystemExit) as error:
        report.main([x.format(**names) for x in argv])
    assert error.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert old.read_text() == "precious"
    assert {*tmp_path.iterdir()} == before


# --- in a browser ---

MEASURE = """
const found = [];
async function measure(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px; height:900px; border:0`;
  frame.srcdoc = PAGE;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const page = frame.contentDocument, root = page.documentElement;
  const sizes = tag => [...page.querySelectorAll(tag)].map(x => {
    const box = x.getBoundingClientRect();
    return [box.width, box.height, box.right];
  });
  found.push({ width, inner: root.clientWidth, scroll: root.scrollWidth,
    charts: sizes("figure svg"), pictures: sizes("img"), players: sizes("iframe"),
    heads: sizes("tr > :first-child"), loaded: [...page.images].map(x => x.naturalWidth) });
}
(async () => {
  for (const width of [390, 1400]) await measure(width);
  document.body.replaceChildren(JSON.stringify(found));
})();
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_a_browser_shows_everything_and_nothing_sticks_out(tmp_path):
    """At the width of a phone and of a desk; long names and wide tables included."""
    long = "a_directory_with_a_very_long_name_without_any_space_" * 2
    runs = [
        write_run(tmp_path / f"{long}{i}" / env, env=env, seeds=range(20))
        for env in ("cartpole", "pendulum")
        for i in range(3)
    ]
    for run in runs:
        name = "losses/" + "a_very_long_name_of_a_metric_" * 2
        write_metrics(run, [{"global_step": i, name: [i] * 20} for i in range(3)])
    draw(runs[0], "best_s019.gif", "worst_s000.html")
    out = tmp_path / "page.html"
    report.main([*map(str, runs), "--out", str(out)])
    wrapper, page = tmp_path / "wrapper.html", html.escape(out.read_text())
    wrapper.write_text(
        f"<!DOCTYPE html><body><textarea hidden>{page}</textarea><script>const PAGE = "
        f'document.querySelector("textarea").value;{MEASURE}</script></body>'
    )
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    flags += f" --virtual-time-budget=20000 --user-data-dir={tmp_path / 'browser'}"
    done = subprocess.run(
        ["chromium", *flags.split(), str(wrapper)], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    phone, desk = json.loads(html.unescape(re.search("<body>(.*)</body>", done.stdout, re.S)[1]))
    for seen in (phone, desk):
        assert seen["scroll"] == seen["inner"] > 300, seen["width"]
        assert len(seen["charts"]) == 4 + 2
        for width, height, right in seen["charts"] + seen["pictures"] + seen["players"]:
            assert width > 120
            assert height > 80
            assert right <= seen["inner"]
        # What stays in place while a table scrolls leaves room for the rest.
        assert max(width for width, _, _ in seen["heads"]) < 0.5 * seen["inner"]
        assert seen["loaded"] == [20]
        assert len(seen["players"]) == 1


def test_charts_of_metrics_have_the_rows_of_their_value(tmp_path, monkeypatch):
    labels, drawn = ("gamma=0.9", "gamma=0.99"), []
    run = write_run(tmp_path / "run", labels=labels, seeds=(1, 2))
    write_metrics(run, [{"global_step": i, "losses/a": [i, i + 1, 9, 8]} for i in range(2)])
    monkeypatch.setattr(statistics, "draw_metric", lambda axis, lines: drawn.extend(lines))
    write_page(tmp_path, run)
    assert [x.tolist() for _, _, x in drawn] == [[[0, 1], [1, 2]], [[9, 8], [9, 8]]]


def test_launches_that_add_seeds_are_one_curve(tmp_path, monkeypatch):
    """One row and one line of their seeds together, where both have a record; two runs."""
    drawn = []
    one = write_run(tmp_path / "run", seeds=(0, 1))
    more = write_run(tmp_path / "run_s2", seeds=(2,))
    write_metrics(one, [{"global_step": i, "losses/a": [i, i + 1]} for i in (0, 1)])
    write_metrics(more, [{"global_step": i, "losses/a": [i + 5]} for i in (0, 2)])
    monkeypatch.setattr(statistics, "draw_metric", lambda axis, lines: drawn.extend(lines))
    page = write_page(tmp_path, one, more)
    returns, seeds = (page.tables[x][0] for x in ("returns", "seeds"))
    assert [row[2] for row in returns[1:]] == ["3/3"]
    assert seeds[1][1:] == ["2.0", "12.0", "22.0"]
    [(_, steps, values)] = drawn
    assert steps.tolist() == [0, 1, 2]
    nan = np.nan
    np.testing.assert_array_equal(values, [[0, 1, 5], [1, 2, nan], [nan, nan, 7]])
    assert "2 runs; 3 of 3 seeds are alive." in page.texts


def test_the_title_names_all_algorithms(tmp_path):
    page = write_page(tmp_path, *(write_run(tmp_path / x, algo=x) for x in ("ppo", "bpo")))
    assert page.texts.count("ppo, bpo on gymnax/CartPole-v1") == 2


def test_an_unfinished_run_has_the_seconds_so_far(tmp_path):
    facts = dict(write_page(tmp_path, write_run(tmp_path / "run", done=False)).tables["facts"][0])
    assert (facts["steps"], facts["train, s"]) == ("200, unfinished", "2.0")


def test_every_resume_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    resumed = [{"command": "first"}, {"command": "second"}]
    rundir.write_json(run / "meta.json", {"num_devices": 2, "device": "cpu", "resumed": resumed})
    facts = dict(write_page(tmp_path, run).tables["facts"][0])
    assert facts["resumed by"] == "first; second"


def test_swept_values_are_among_the_settings(tmp_path):
    runs = [write_run(tmp_path / x, algo=x) for x in ("ppo", "bpo")]
    saved = rundir.read_json(runs[0] / "config.json")
    saved["launch"]["sweep"] = ["gamma=0.9,0.95"]
    rundir.write_json(runs[0] / "config.json", saved)
    rows = {row[0]: row[1:] for row in write_page(tmp_path, *runs).tables["facts"][1][1:]}
    assert rows["gamma"] == ['"0.9,0.95"', "0.99"]
