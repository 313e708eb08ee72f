"""Every algorithm is complete: file, docs page, README row, preset; and the docs say what runs."""

import argparse
import ast
import dataclasses
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import jax
import pytest
import tiny

import envs
from algos import common
from algos.launch import cli
from algos.launch.rows import make_rows
from experiments import fields

ROOT = Path(__file__).parents[1]
SHARED = {"__init__", "common"}
FILES = sorted(p.stem for p in (ROOT / "algos").glob("*.py") if p.stem not in SHARED)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """Command lines of our programs in indented blocks, fenced ones and inline code."""
    text = page.read_text()
    found = re.findall(r"^(?: {4}|\$ )(.*python (?:algos|experiments)/.*)$", text, re.MULTILINE)
    found += re.findall(r"`(python (?:algos|experiments)/[^`]*)`", text)
    for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        found += re.findall(r"^(python (?:algos|experiments)/.*)$", block, re.MULTILINE)
    return [" ".join(command.split()) for command in found]


def words(command):
    """Program and arguments, without comment, what runs before, and what comes after a pipe."""
    parts = shlex.split(command, comments=True)
    start = next(i for i, x in enumerate(parts) if re.match(r"(algos|experiments)/[\w/]+\.py", x))
    end = next((i for i, x in enumerate(parts) if x in ("&&", "|", ";", ">")), len(parts))
    return parts[start], parts[start + 1 : end]


def test_every_algorithm_is_tested():
    assert set(FILES) == tiny.ALGOS.keys()


@pytest.mark.parametrize("name", FILES)
def test_an_algorithm_is_documented(name):
    page = ROOT / "docs" / f"{name}.md"
    assert page.exists()
    readme = (ROOT / "README.md").read_text()
    row = [
        line for line in readme.splitlines() if line.startswith("|") and f"docs/{name}.md" in line
    ]
    assert len(row) == 1
    assert f"algos/{name}.py" in row[0]
    module = tiny.module_of(name)
    assert module.PRESETS
    assert f"docs/{name}.md" in module.__doc__
    code = set(re.findall(r"`([^`\n]+)`", page.read_text()))
    config_types = [x for x in (module.Config, getattr(module, "Brain", None)) if x]
    fields = {field.name for x in config_types for field in dataclasses.fields(x)}
    assert fields <= code, f"fields without a word in {page.name}: {sorted(fields - code)}"
    table = page.read_text().split("\n## 5. Hyperparameters\n")[1].split("\n## ")[0]
    cells = " ".join(re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE))
    listed = set(re.findall(r"`(\w+)`", cells))
    assert listed <= fields, f"no fields, but listed in {page.name}: {sorted(listed - fields)}"
    algo = tiny.build(name, tiny.config_of(name))
    state = jax.eval_shape(algo.init, jax.random.key(0))
    metrics = set(jax.eval_shape(algo.update, state, *algo.data([0])[0])[1])
    metrics = {m for m in metrics if not m.endswith("/count") and not m.startswith("episodes/")}
    if name not in tiny.OFFLINE:
        metrics |= {"charts/episodic_return", "charts/episodic_length"}
    assert metrics <= code, f"metrics without a word in {page.name}: {sorted(metrics - code)}"


@pytest.mark.parametrize("name", FILES)
def test_every_field_has_its_own_words(name):
    source = (ROOT / "algos" / f"{name}.py").read_text()
    body = ast.parse(source).body
    configs = [x for x in body if isinstance(x, ast.ClassDef) and x.name in ("Config", "Brain")]
    lines = source.splitlines()
    for node in itertools.chain.from_iterable(config.body for config in configs):
        if isinstance(node, ast.AnnAssign):
            code = lines[node.end_lineno - 1]
            blank, above = lines[node.lineno - 3 : node.lineno - 1]
            own_line = blank and above.startswith("    # ")  # not the title of a group
            assert "  # " in code or own_line, code


TOO_LONG = {
    "bpo": "five networks, a replay buffer and the authors' ten presets",
    "bnpo": "two learning rules, hindsight and natural gradients",
}


@pytest.mark.parametrize("name", FILES)
def test_an_algorithm_is_read_in_one_sitting(name, request):
    if name in TOO_LONG:
        request.applymarker(pytest.mark.xfail(reason=TOO_LONG[name], strict=True))
    assert (ROOT / "algos" / f"{name}.py").read_text().count("\n") < 650


@pytest.mark.parametrize("name", FILES)
def test_an_algorithm_is_one_file(name):
    """It imports few names of ours, and none of another algorithm."""
    path = ROOT / "algos" / f"{name}.py"
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100
    tree = ast.parse(text)
    used = {"common": set(), "datasets": set(), "launch": set(), "envs": set()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.get(node.value.id, set()).add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module:
            package = node.module.split(".")[0]
            assert package not in ("envs", "experiments", "brax"), ast.unparse(node)
            if package == "algos":
                names = {x.name for x in node.names}
                assert names <= {"common", "datasets", "launch", "UnitFloat"}, ast.unparse(node)
    in_every_file = {"check", "config_for"}
    assert len((used["common"] | used["datasets"] | used["launch"]) - in_every_file) <= 8, used
    assert used["envs"] <= {"make", "Env"}, used


def imports_of(path):
    """Modules that a file imports, ours in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{x.name}" for x in node.names)


def test_imports_run_one_way():
    """Experiments import algorithms, these the launcher, and this environments: never back."""
    order = ["experiments", "algos", "algos.launch", "envs"]

    def place(module):
        found = [i for i, x in enumerate(order) if module == x or module.startswith(f"{x}.")]
        return max(found, default=None)

    for path in [*ROOT.glob("algos/**/*.py"), *ROOT.glob("envs/*.py")]:
        own = place(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imports_of(path):
            other = place(module)
            allowed = other is None or own <= other or module.startswith("algos.common")
            # The launcher's package sees its parent's name where it imports `common` from it.
            assert allowed or module == "algos", f"{path} imports {module}"


@pytest.mark.parametrize("name", FILES)
def test_nothing_calls_back_to_the_host(name):
    """No callback and no random key of its own in a compiled program."""
    text = (ROOT / "algos" / f"{name}.py").read_text() + (ROOT / "algos/common.py").read_text()
    for word in ("callback", "debug.print", "host_call", "PRNGKey", "random.key(", "nan_to_num"):
        assert word not in text, word


@pytest.mark.parametrize("name", FILES)
def test_sections_come_in_the_same_order(name):
    wanted = ["networks", "data types", "targets and losses", "build", "presets"]
    text = (ROOT / "algos" / f"{name}.py").read_text()
    assert re.findall(r"^# --- (.*) ---$", text, re.MULTILINE) == wanted
    parts = ["class Config", "def make_env(", "def build(", "def make_train(", "def config_for("]
    parts += ["TRACEABLE = ", "PRESETS: ", 'if __name__ == "__main__":\n    launch.main("']
    order = [text.index(f"\n{x}") for x in parts]
    assert order == sorted(order)


def test_nothing_outside_the_adapters_imports_a_simulator():
    for path in [*ROOT.glob("algos/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        found = {x.split(".")[0] for x in imports_of(path)}
        assert not found & {"brax", "mujoco", "gymnax", "mujoco_playground"}, path


class ParsedError(Exception):
    """Ends a program once it has read its arguments; `args[0]` are those it does not know."""


def parse_only(program, argv, monkeypatch):
    """Read the arguments of one of our programs with its own parser; returns those left over."""
    read = argparse.ArgumentParser.parse_known_args

    def stop(parser, *args, **kwargs):
        raise ParsedError(read(parser, *args, **kwargs)[1])

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", [program, *argv])
        with pytest.raises(ParsedError) as parsed:
            importlib.import_module(program.removesuffix(".py").replace("/", ".")).main()
    return parsed.value.args[0]


def check_launch(name, argv):
    """ValueError if a launch of `algos/name.py` would refuse these arguments."""
    module = tiny.module_of(name)
    config, launch = cli.parse(name, module.Config, module.PRESETS, argv)
    make_rows(launch, config, module.TRACEABLE)
    common.check(config)
    envs.canonical(config.env)


def after(argv, flag):
    """The values that follow a flag."""
    start = argv.index(flag) + 1
    return list(itertools.takewhile(lambda x: not x.startswith("--"), argv[start:]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_parse(page, monkeypatch):
    for command in commands(page):
        program, argv = words(command)
        assert (ROOT / program).exists(), command
        if program.startswith("algos/") and "..." in command:
            continue
        if "--resume" in argv:  # there is no such run here
            start = argv.index("--resume")
            del argv[start : start + 2]
        argv = [x for x in argv if x != "--help"]
        if program.startswith("algos/"):
            check_launch(Path(program).stem, argv)
            continue
        left = parse_only(program, argv, monkeypatch)
        if program != "experiments/grid.py":
            assert not left, f"{command}: unknown {left}"
            continue
        for algo, env in itertools.product(after(argv, "--algos"), after(argv, "--envs")):
            check_launch(algo, ["--env", env, *left])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_docs_imports_what_exists(page):
    """Imports of our packages; some pages use others that an extra installs."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                names = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module, alias.name) for alias in node.names]
            else:
                continue
            for module, name in names:
                if module.split(".")[0] in ("algos", "envs", "experiments"):
                    assert found(module, name), ast.unparse(node)


def importable(module):
    try:
        return bool(importlib.import_module(module))
    except ModuleNotFoundError:
        return False


def found(module, name):
    """Whether there is such a module and, if `name` is not None, such a thing in it."""
    if name is None or not importable(module):
        return importable(module)
    return hasattr(importlib.import_module(module), name) or importable(f"{module}.{name}")


def test_the_readme_has_commands():
    assert len(commands(ROOT / "README.md")) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_no_field_is_unused_and_presets_that_never_ran_are_listed(capsys):
    assert fields.main([]) == 0
    found = re.findall(r"^presets that never ran: (\w+): (.*)$", capsys.readouterr().out, re.M)
    never = {(algo, name) for algo, names in found for name in names.split(", ")}
    section = (ROOT / "docs" / "presets.md").read_text().split("## ")[1]
    table, text = section.rsplit("|\n", 1)
    rows = [line.split("|", 2)[1:] for line in table.splitlines() if "`" in line and "|" in line]
    listed = {
        (title.strip().lower().replace(", ", "_"), name)
        for title, names in rows
        for name in re.findall("`(.*?)`", names)
    }
    by_flags = {("p3o", name) for name in ("fixed_clip", "no_kl")}
    assert all(f"`{name}`" in text for _, name in by_flags)
    assert listed == never - by_flags
