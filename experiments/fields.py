"""What uses each field and each preset of the algorithms.

    python experiments/fields.py
    python experiments/fields.py ppo bpo

For each algorithm there are two tables. The first has a row for each field of its `Config`: the
default, the presets that change it, the experiments that pass its flag, and the number of results
(`results/**/config.json`) in which it differs from the default or is swept. A field that holds
dataclasses has a row for each of their fields. The second has a row for each preset: the number of
results of its task, or with its name after --preset.

Four lists follow: unused fields that are in KEPT, with the reason; presets that never ran; fields
that presets or experiments set, but no result; and unused fields, which nothing sets. The exit
status is 1 if there is one of the last kind. Results may be older than the code: fields that only
one of the two has are ignored. An experiment counts for every algorithm that it names.
"""

import ast
import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # import this checkout's algorithms

from algos.launch import cli, report

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVE, OPTIMISER = "constant of the objective", "constant of the optimiser"
SIZE = "size"
KEPT = {  # fields that may be unused, and why
    "env": "the task",
    "num_envs": SIZE,
    "num_steps": SIZE,
    "num_minibatches": SIZE,
    "gradient_steps": SIZE,
    "hidden": SIZE,
    "critic_width": SIZE,
    "num_bins": SIZE,
    "kl_samples": SIZE,
    "gamma": OBJECTIVE,
    "gae_lambda": OBJECTIVE,
    "td_lambda": OBJECTIVE,
    "vf_coef": OBJECTIVE,
    "kl_bound": OBJECTIVE,
    "target_entropy_mult": OBJECTIVE,
    "min_weight": OBJECTIVE,
    "max_perturbation": OBJECTIVE,
    "learning_rate": OPTIMISER,
    "critic_lr": OPTIMISER,
    "vae_lr": OPTIMISER,
    "max_grad_norm": OPTIMISER,
    "adam_eps": OPTIMISER,
    "rms_decay": OPTIMISER,
    "rms_eps": OPTIMISER,
    "polyak_tau": OPTIMISER,
    "temperature_init": "initial value",
    "kl_coef_init": "initial value",
    "log_std_init": "initial value",
    "symlog_reg_coef": "constant of the authors' blocks (BPO)",
    "divergence_steps": "published constant (BRAC)",
    "warmup_fraction": "the authors' command: 15,000 of 50,000 frames (P3O)",
    "anneal_lr": "on in the authors' command (P3O); one line with reppo.py (REPPO, discrete)",
    "vmin": "support of the critic, as in reppo.py",
    "reward_scale": "scale of rewards on that support, as in reppo.py",
}


def flat(config: Any) -> dict[str, Any]:
    """Fields of a Config or of parts of one, as JSON: {"a": [{"b": 1}]} becomes {"a.b": [1]}."""
    values = json.loads(json.dumps(config, default=dataclasses.asdict))
    out = {}
    for name, value in values.items():
        parts = value if isinstance(value, list) else [value]
        if parts and all(isinstance(part, dict) for part in parts):
            out |= {f"{name}.{x}": [part.get(x) for part in parts] for x in parts[0]}
        else:
            out[name] = value
    return out


def changed(config: Any, default: dict[str, Any]) -> set[str]:
    """Names of the fields that both have, with other values."""
    return {name for name, value in flat(config).items() if default.get(name, value) != value}


def swept(launch: dict[str, Any]) -> set[str]:
    """Names of the fields that a launch gave several values."""
    return {item.partition("=")[0] for item in launch.get("sweep", [])}


def strings(path: Path) -> list[str]:
    """Strings in a Python file, except docstrings and what belongs to its own command line."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        own = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("parser.")
        if own or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            skipped |= {*ast.walk(node)}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [x.value for x in found if isinstance(x.value, str) and x not in skipped]


def flags(text: str) -> set[str]:
    """Names of the fields whose flags are in a text: --no-anneal-lr, --brains.0.actor-tau."""
    found = re.findall(r"--([a-z][\w.-]*)", text)
    names = {re.sub(r"\.\d+", "", x).replace("-", "_") for x in found}
    return names | {name.removeprefix("no_") for name in names}


def names_algorithm(words: list[str], algo: str) -> bool:
    """True if one of an experiment's strings is this algorithm."""
    return any(word == algo or f"algos/{algo}.py" in word for word in words)


def describe(algo: str, results: list[dict], experiments: dict[str, list[str]]) -> dict[str, list]:
    """Print the tables of an algorithm; returns the lists for the end."""
    module = importlib.import_module(f"algos.{algo}")
    default = flat(module.Config())
    results = [result for result in results if result["algo"] == algo]
    sets = [changed(x["config"], default) | swept(x["launch"]) for x in results]
    presets = {name: changed(preset, default) for name, preset in module.PRESETS.items()}
    passed = {
        name: flags(" ".join(words))
        for name, words in experiments.items()
        if names_algorithm(words, algo)
    }

    rows: dict[str, list[str]] = {}
    for field, value in default.items():
        users = [
            ", ".join(name for name, names in found.items() if field in names)
            for found in (presets, passed)
        ]
        rows[field] = [field, json.dumps(value), *users, str(sum(field in x for x in sets))]
    used = [{cli.task_preset(x["config"]["env"], presets), *x["launch"]["preset"]} for x in results]
    ran = {name: sum(name in names for names in used) for name in presets}
    print(f"## {algo}\n\n{len(results)} results\n")
    print(report.table(["field", "default", "presets", "experiments", "results"], rows.values()))
    if ran:
        cells = ([name, str(count)] for name, count in ran.items())
        print(report.table(["preset", "results"], cells))
    unset = [field for field, row in rows.items() if row[4] == "0"]
    unused = [field for field in unset if not any(rows[field][2:4])]
    return {
        "unused": [field for field in unused if field not in KEPT],
        "unused, kept": [f"{field} ({KEPT[field]})" for field in unused if field in KEPT],
        "in no result": [field for field in unset if field not in unused],
        "presets that never ran": [name for name, count in ran.items() if not count],
    }


def main(argv: list[str] | None = None) -> int:
    """Report from the command line; returns the exit status."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "algos", nargs="*", metavar="ALGO", help=f"default: all of {', '.join(cli.ALGOS)}"
    )
    chosen = parser.parse_args(argv).algos or cli.ALGOS
    for algo in chosen:
        if algo not in cli.ALGOS:
            parser.error(f"{algo}: {cli.nearest(algo, cli.ALGOS)}")
    results = [json.loads(x.read_text()) for x in (ROOT / "results").rglob("config.json")]
    folder = ROOT / "experiments"
    files = sorted(folder.rglob("*.py"))
    experiments = {str(x.relative_to(folder).with_suffix("")): strings(x) for x in files}
    found = {algo: describe(algo, results, experiments) for algo in chosen}
    for title in ("unused, kept", "presets that never ran", "in no result", "unused"):
        for algo, lists in found.items():
            if lists[title]:
                print(f"{title}: {algo}: {', '.join(lists[title])}")
    return int(any(lists["unused"] for lists in found.values()))


if __name__ == "__main__":
    sys.exit(main())
