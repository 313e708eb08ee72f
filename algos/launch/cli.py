"""The command line: defaults, the task's preset, named presets, then flags."""

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, get_origin, get_type_hints

import tyro
from pydantic import NonNegativeInt, PositiveInt

import envs
from algos import common
from algos.launch import rundir


def launchable(folder: Path) -> list[str]:
    """Names of the files of a folder that end in a launch: other modules are no algorithms.

    Hidden files are left out: an editor's lock may be a link to nowhere.
    """
    return sorted(x.stem for x in folder.glob("[!.]*.py") if "launch.main(" in x.read_text())


ALGOS = launchable(Path(__file__).parents[1])


@dataclass(frozen=True)
class Launch:
    """Flags of the launch, the same for every algorithm."""

    preset: tuple[str, ...] = ()
    """presets of the algorithm, applied from left to right after the task's own"""
    seed: NonNegativeInt = 0
    """first seed; seed i of the launch is the run --seed SEED+i --num-seeds 1"""
    num_seeds: PositiveInt = 1
    """seeds trained side by side in one program"""
    sweep: tuple[str, ...] = ()
    """fields and values to train side by side too: learning_rate=1e-4,3e-4 gamma=0.9,0.99; several
    values after a field's own flag do the same: --gamma 0.9 0.99"""
    num_evals: PositiveInt = 20
    """greedy evaluations spread over the run, at most one an update, besides the one at step 0"""
    eval_episodes: PositiveInt = 16
    """episodes of each evaluation, from start states of its own for every seed and evaluation"""
    final_episodes: PositiveInt = 128
    """at least this many episodes in the last evaluation, which tables quote"""
    partial_at_return: float | None = None
    """export the policy of a seed as partial_sNNN.npz once two evaluations in a row reach this"""
    run_dir: str = ""
    """directory to write; empty: runs/ENV/ALGO/TIME_sSEEDxNUM_SEEDS_HASH"""
    resume: str = ""
    """run directory to continue from its last checkpoint"""
    checkpoint_every: NonNegativeInt = 1
    """evaluations between checkpoints; 0: only at the end and at ctrl-C"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "purepo"
    """W&B project"""
    wandb_entity: str = ""
    """W&B account; empty: your default"""
    wandb_tags: tuple[str, ...] = ()
    """tags beside commit, device and jax version"""
    wandb_seeds: bool = False
    """also one W&B run for each row (seed and swept value), with its own metrics"""
    tensorboard: bool = False
    """write TensorBoard events to the run directory"""
    verbose: Literal[0, 1, 2] = 1
    """0: nothing but problems; 1: progress; 2: losses too"""
    render: bool = False
    """draw the best, median and worst seed afterwards"""

    def validate(self) -> None:
        """Raise ValueError if the last seed exceeds 32 bits, or for W&B's flags without --track."""
        for field in ("wandb_project", "wandb_entity", "wandb_tags", "wandb_seeds"):
            value = getattr(self, field)
            # A resumed run may leave the tracking of the first launch out.
            if not (self.track or self.resume) and value != getattr(Launch, field):
                raise ValueError(f"{field}={value!r}: it needs --track")
        for tag in self.wandb_tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"wandb_tags={tag!r}: W&B takes 1 to 64 characters")
        last = self.seed + self.num_seeds - 1
        if last >= 2**32:  # keys are made of 32 bits
            raise ValueError(
                f"seed={self.seed}: the last seed is {last}, at most 2**32 - 1 is possible"
            )


# What a resumed run may change. Anything else would contradict the steps that are trained already.
RESUMABLE = {
    *("total_timesteps", "num_evals", "final_episodes", "checkpoint_every", "resume"),
    *("track", "wandb_project", "wandb_entity", "wandb_tags", "wandb_seeds", "tensorboard"),
    *("verbose", "render"),
    *("dataset", "behavior"),  # paths; `rundir.check_data` checks what is in them
}


def config_for(
    config_type: type, presets: dict[str, dict], env: str, names: Iterable[str], changes: dict
) -> Any:
    """A checked configuration: defaults, the task's preset, presets of these names, changes.

    Raises ValueError in one line for an unknown environment, preset or field, or a bad value.
    """
    values = {"env": env} | task_values(env, presets)
    for name in names:
        values |= preset_values(name, presets)
    fields = [field.name for field in dataclasses.fields(config_type)]
    for field in changes:
        if field not in fields:
            raise ValueError(f"unknown field {field!r}: {nearest(field, fields)}")
    config = config_type(**(values | changes))
    common.check(config)
    return config


def parse(name: str, config_type: type, presets: dict[str, dict], argv: list[str] | None = None):
    """Read the command line: defaults, the task's preset, named presets, then flags.

    Returns `(config, launch)`; checking the config is left to the caller. Raises ValueError in one
    line for what cannot be read, or if a field has the name of a flag of the launcher.
    """
    of_launch = {field.name for field in dataclasses.fields(Launch)}
    for field in dataclasses.fields(config_type):
        if field.name in of_launch:
            raise ValueError(
                f"Config.{field.name}: the launcher has a flag of this name, rename it"
            )
    argv = dashed(sys.argv[1:] if argv is None else [*map(str, argv)])
    check_values(argv, config_type)
    argv = with_sweeps(argv, config_type)
    # These three decide the defaults of all other flags.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--env")
    first.add_argument("--preset", nargs="*", default=[])
    first.add_argument("--resume")
    try:
        chosen = first.parse_known_args(argv)[0]
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None

    if chosen.resume == "":
        raise ValueError("--resume is empty: name a run directory")
    if chosen.resume:
        run_dir = find_run(chosen.resume)
        saved = rundir.read_description(run_dir)
        if saved["algo"] != name:
            raise ValueError(f"{run_dir} is a run of {saved['algo']}: resume it with that file")
        config = rundir.from_json(config_type, saved["config"])
        launch = rundir.from_json(Launch, saved["launch"])
        launch = dataclasses.replace(launch, run_dir=str(run_dir))
    else:
        config, launch = config_type(), Launch()
        config = dataclasses.replace(config, env=chosen.env or config.env)
        config = dataclasses.replace(config, **task_values(config.env, presets))
    saved_config, task = config, config.env
    for preset in chosen.preset if not chosen.resume else ():  # a resumed run has its values
        config = dataclasses.replace(config, **preset_values(preset, presets))

    class Arguments(NamedTuple):
        config: Annotated[config_type, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        launch: Annotated[Launch, tyro.conf.arg(name="")]

    def read(words: list[str], default: Arguments):
        """The arguments in `words`, and the words that are none; SystemExit after --help."""
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                return tyro.cli(
                    Arguments,
                    prog=f"python algos/{name}.py",
                    description=describe(name, task, presets),
                    default=default,
                    args=words,
                    return_unknown_args=True,
                    registry=NUMBERS,
                )
        except SystemExit as end:
            if end.code:
                raise ValueError(unboxed(stderr.getvalue())) from None
            raise

    flags = [word for word in argv if word not in HELP]
    arguments, unknown = read(flags, Arguments(config, launch))
    if len(flags) < len(argv):  # the values of the other flags are shown
        read(["--help"], arguments)
    if unknown:
        fields = [*dataclasses.fields(config), *dataclasses.fields(launch)]
        raise ValueError(about_unknown(unknown[0], argv, [field.name for field in fields]))
    if chosen.resume:
        check_resumable(saved_config, arguments.config)
        check_resumable(launch, arguments.launch)
    common.check(arguments.launch)
    return arguments


def check_values(argv: list[str], config_type: type) -> None:
    """ValueError for a flag that takes a list, and has nothing after it or is given twice."""
    hints = get_type_hints(config_type) | get_type_hints(Launch)
    lists = {"--" + x.replace("_", "-") for x, kind in hints.items() if get_origin(kind) is tuple}
    for word, following in itertools.pairwise([*argv, "--"]):
        if word in lists and following.startswith("--"):
            raise ValueError(f"{word} has no value: write one or more after it, or leave it out")
    given = [word.partition("=")[0] for word in argv]
    for flag in lists - {"--sweep"}:
        if given.count(flag) > 1:
            raise ValueError(f"{flag} is given twice: write all its values after one of them")


def about_unknown(word: str, argv: list[str], fields: list[str]) -> str:
    """The error message for a word of `argv` that is neither a flag nor the value of one."""
    words = [part for x in argv for part in (x.split("=", 1) if x.startswith("--") else [x])]
    before = words[words.index(word) - 1] if word in words[1:] else ""
    if word.lower() in ("true", "false", "yes", "no") and before.startswith("--"):
        flag = before.removeprefix("--").removeprefix("no-")
        return f"--{flag} takes no value: write --{flag} or --no-{flag}"
    if not word.startswith("-"):
        flags = [x for x in words[: words.index(word)] if x.startswith("--")]
        reason = f"{flags[-1]} takes no further value" if flags else "it is the value of no flag"
        return f"unknown argument {word!r}: {reason}"
    flags = ["--" + field.replace("_", "-") for field in fields]
    return f"unknown argument {word!r}: {nearest(word.partition('=')[0], flags)}"


def unboxed(text: str) -> str:
    """The problem, in one line, from the box that tyro prints: title, problem, ruler, help."""
    _, *lines = (line.strip("│ ") for line in text.splitlines())
    ruler = lambda line: not line.strip("─-")  # a box in ASCII has one below the title too
    problem = itertools.takewhile(lambda x: not ruler(x), itertools.dropwhile(ruler, lines))
    text = " ".join(problem).removeprefix("Error parsing ").replace(" .", ".")
    start, unread, words = text.partition("Could not find valid parse for arguments: ")
    return f"{start}cannot read {words}; write values with spaces between them" if unread else text


def dashed(argv: list[str]) -> list[str]:
    """`argv` with dashes for the underscores in names of flags; values keep theirs."""
    return [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), arg) for arg in argv]


def describe(name: str, env: str, presets: Iterable[str]) -> str:
    """What --help says first: the preset that is shown, the others, and some tasks."""
    shown = task_preset(env, presets)
    of_tasks = [preset for preset in presets if preset in {*envs.TASKS, *envs.ALIASES}]
    lists = {
        "presets of tasks, which --preset takes too": of_tasks,
        "further presets": [preset for preset in presets if preset not in of_tasks],
    }
    for source, tasks in envs.TASKS.items():
        lists[f"tasks of {source}"] = [*tasks[:4], "..."] if tasks[12:] else [*tasks]
    wrap = textwrap.TextWrapper(76, "  ", "    ", break_on_hyphens=False)
    lines = [wrap.fill(f"{title}: {', '.join(names)}") for title, names in lists.items() if names]
    values = f"the preset {shown}" if shown else "the defaults"
    title = f"Train {name}. The values shown come from {values} and the other flags."
    return "\n".join([title, *lines, "  all tasks: docs/environments.md"])


HELP = ("-h", "--help")
NUMBERS = tyro.constructors.ConstructorRegistry()


def integer(text: str) -> int:
    """An int that may be written as 1e6 or 1_000_000; ValueError if it is none."""
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise ValueError(f"{text!r} is not a whole number")


@NUMBERS.primitive_rule
def whole_number(info: Any) -> Any:
    """Read every int by `integer`."""
    if info.type is not int:
        return None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: integer(words[0]),
        is_instance=lambda x: isinstance(x, int),
        str_from_instance=lambda x: [str(x)],
    )


def with_sweeps(argv: list[str], config_type: type) -> list[str]:
    """`argv` with all sweeps behind one `--sweep`: `--gamma 0.9 0.99` becomes `gamma=0.9,0.99`."""
    numbers = {name for name, kind in get_type_hints(config_type).items() if kind is float}
    field_of = lambda flag: flag.partition("=")[0].removeprefix("--").replace("-", "_")
    groups: list[list[str]] = [[]]  # words before any flag, then each flag and its values
    for arg in argv:
        if not arg.startswith("--"):
            groups[-1].append(arg)
        elif field_of(arg) in {"preset", "sweep", *numbers}:  # --preset=A B means A and B
            groups.append(arg.split("=", 1))
        else:
            groups.append([arg])
    rest = groups[0]
    items: list[str] = []
    fields = [field_of(group[0]) for group in groups[1:]]
    for field, (flag, *values) in zip(fields, groups[1:], strict=True):
        several = ",".join(values).split(",")  # commas too, as after --sweep
        if field == "sweep":
            items += map(dashless, values)
        elif field in numbers and len(several) > 1 and all(map(is_number, several)):
            if fields.count(field) > 1:
                raise ValueError(f"{flag} is given twice: write all its values after one of them")
            items.append(f"{field}={','.join(several)}")
        else:
            rest += [flag, *values]
    swept = {item.partition("=")[0] for item in items}
    for field, (flag, *_) in zip(fields, groups[1:], strict=True):
        if flag in rest and field in swept:
            raise ValueError(f"{field} is swept, so one value has no effect: drop {flag}")
    return [*rest, "--sweep", *items] if items else rest


def dashless(item: str) -> str:
    """An item of --sweep with its field's own name, which may be written as its flag is.

    ValueError if there is no field.
    """
    if "=" not in item:
        raise ValueError(f"cannot read --sweep {item!r}: write FIELD=VALUE,VALUE")
    field, equals, values = item.partition("=")
    return field.strip().replace("-", "_") + equals + values


def is_number(text: str) -> bool:
    """True if `text` can be read as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def preset_values(name: str, presets: dict[str, dict]) -> dict[str, Any]:
    """The values of a preset; ValueError if there is none of this name."""
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}: {nearest(name, presets)}")
    return presets[name]


def task_preset(env: str, presets: Iterable[str]) -> str | None:
    """Name of the preset of a task, under any of its names, or else of its source."""
    task = envs.canonical(env).split("?")[0]
    names = {envs.ALIASES.get(name, name): name for name in presets}
    for name in (env, task, task.split("/")[0]):
        if name in names:
            return names[name]
    return None


def task_values(env: str, presets: dict[str, dict]) -> dict[str, Any]:
    """The values that a task changes; {} if it has no preset."""
    name = task_preset(env, presets)
    return presets[name] if name else {}


def nearest(word: str, known: Any) -> str:
    """Phrase that lists the nearest of the `known` words; all of them if none is near."""
    initials = lambda name: "".join(part[:1] for part in re.split("[-_]", name.strip("-")))
    near = [name for name in known if initials(name) == word.strip("-")]  # lr: learning-rate
    near += [x for x in difflib.get_close_matches(word, list(known), 4, 0.4) if x not in near]
    return f"did you mean {', '.join(near)}?" if near else f"choose from {', '.join(known)}"


class Parser(argparse.ArgumentParser):
    """The command line of a tool: its docstring is the help, and a mistake is one line."""

    def __init__(self, doc: str | None):
        layout = argparse.RawTextHelpFormatter
        super().__init__(description=doc, formatter_class=layout, allow_abbrev=False)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As in argparse; the help text ends with the default, where one is given."""
        default = settings.get("default")
        if default not in (None, "", [], argparse.SUPPRESS):
            values = default if isinstance(default, (list, tuple)) else [default]
            settings["help"] += f", default: {' '.join(map(str, values))}"
        return super().add_argument(*names, **settings)

    def needs(self, args: argparse.Namespace, needed: str, *names: str) -> None:
        """End in an error if one of these flags was given, but not the one that it belongs to."""
        for name in names:
            if not getattr(args, needed) and getattr(args, name) != self.get_default(name):
                flag, other = ("--" + x.replace("_", "-") for x in (name, needed))
                self.error(f"{flag} has no effect without {other}")

    def error(self, message: str) -> NoReturn:
        """End with one line and exit status 2."""
        self.exit(2, f"error: {message}\n")


def path(text: str) -> Path:
    """Type of a tool's paths for argparse; ~ is the home directory."""
    try:
        return rundir.expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seed(text: str) -> int:
    """Type of a tool's --seed for argparse: a number with a key of its own."""
    number = integer(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number}: 0 to 2**32 - 1 are possible")
    return number


def check_resumable(saved: Any, wanted: Any) -> None:
    """ValueError if a field changed that a resumed run must keep."""
    for field in dataclasses.fields(saved):
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        same = old == new
        if field.name == "run_dir":  # one folder has several paths
            same = rundir.expanded(old).resolve() == rundir.expanded(new).resolve()
        if not same and field.name not in RESUMABLE:
            raise ValueError(
                f"cannot resume with {field.name}={new!r}, the run has {old!r}: "
                "drop the flag or start a new run"
            )


def find_run(path: str) -> Path:
    """The run directory at `path`; ValueError if it is none."""
    run_dir = rundir.expanded(path)
    if not (run_dir / "config.json").exists():
        raise ValueError(f"{path} is not a run directory: it has no config.json")
    return run_dir
