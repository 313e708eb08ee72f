"""Where numbers go: console, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

import envs
from algos.launch import report
from algos.launch.rundir import jsonable

WIDTH = 78  # columns of a line on the console
LINE_SECONDS = 60.0  # between two lines of progress where no terminal can show a bar


class Console:
    """A standard stream. If it breaks, later writes are dropped and the run goes on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream  # None if it was closed from the start

    def write(self, text: str) -> int:
        """Write if there is a console."""
        try:
            if self.stream:
                self.stream.write(text)
        except Exception:  # of a pipe, a terminal, or a stream of a notebook
            self.lose()
        return len(text)

    def flush(self) -> None:
        """Flush if there is a console."""
        try:
            if self.stream:
                self.stream.flush()
        except Exception:
            self.lose()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return bool(self.stream) and self.stream.isatty()
        except ValueError:  # it is closed
            return False

    def lose(self) -> None:
        """Go on without. If it was standard error, what libraries print goes nowhere either."""
        lost, self.stream = self.stream, None
        if lost is not sys.__stderr__:  # of a notebook, say: the process keeps its own
            return
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError):  # the output may be closed already
            if os.path.sameopenfile(1, 2):  # else it goes to a file of its own
                os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)


@contextlib.contextmanager
def steady():
    """Let a program go on if what it prints to goes away, and end in one line at ctrl-C."""
    out, error = Console(sys.stdout), Console(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):  # type: ignore[type-var]
        try:
            yield
        except KeyboardInterrupt:
            print("stopped", file=error)
            raise SystemExit(130) from None
        finally:
            out.flush()  # what it has not printed yet may be the first that fails
            error.flush()


class Log:
    """The console and, once opened, the files and W&B runs of a launch.

    On hosts other than the lead it has verbosity -1 and is never opened: it does nothing.
    """

    def __init__(self, verbose: int):
        self.verbose = verbose
        self.console: Any = Console(sys.stderr)
        self.ticking = False  # a running clock is the last thing on the terminal
        self.file: Any = None
        self.labels: list[str] = []
        self.tensorboard: Any = None
        self.wandb_runs: list[tuple[Any, int | None]] = []  # (run, its row; None: all rows)
        self.bar: Any = None

    def open(self, run_dir: Path, about: dict[str, Any], launch: Any, rows: Any, step: int) -> None:
        """Open the sinks in the run directory, to go on after `step`.

        `about` is what the run says of itself: config.json with an id and `surroundings()`.
        """
        self.file = open(run_dir / "metrics.jsonl", "a")  # noqa: SIM115
        self.labels = rows.labels
        if launch.tensorboard:
            self.tensorboard = EventFile(run_dir / "tensorboard", step)
        if launch.track:
            with self.wandb_guard():
                start_wandb(self, run_dir, about, launch, rows)

    # console

    def say(self, text: str, level: int = 1) -> None:
        """Print a line if verbose enough, above the progress bar if there is one."""
        if self.verbose >= level:
            tqdm.tqdm.write("\n" * self.ticking + text, file=self.console)

    @contextlib.contextmanager
    def waiting(self, text: str):
        """Show `text` with a running clock while the block works, and how long it took."""
        start, ended = time.monotonic(), threading.Event()
        live = self.ticking = self.verbose >= 1 and self.console.isatty()

        def tick():
            while live and not ended.wait(1.0):
                print(
                    f"\r{text} {time.monotonic() - start:.0f} s",
                    end="",
                    file=self.console,
                    flush=True,
                )

        if not live:
            self.say(f"{text} ...")
        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.ticking = False
            print("\r" if live else "", end="", file=self.console)
        self.say(f"{text} took {time.monotonic() - start:.1f} s")

    @contextlib.contextmanager
    def progress(self, total: int, done: int):
        """Progress over steps, with speed and time left: a bar, or lines where no terminal is."""
        self.say("greedy return: IQM over seeds [worst seed, best seed]")
        live = self.console.isatty()
        self.bar = tqdm.tqdm(
            total=total,
            initial=done,
            unit=" steps",
            unit_scale=True,
            disable=self.verbose < 1,
            leave=False,
            file=self.console if live else io.StringIO(),
            mininterval=0.1 if live else LINE_SECONDS,
            miniters=1,
            ncols=WIDTH,
        )
        with self.bar:
            yield

    def advance(self, steps: int) -> None:
        """Move the progress bar; print it as a line if it is due and no terminal shows it."""
        if self.bar.update(steps) and not self.console.isatty():
            self.say(str(self.bar))

    def evaluation(
        self,
        step: int,
        total: int,
        returns: dict[str, np.ndarray],
        speed: float,
        left: float | None,
    ) -> None:
        """Print a line for each swept value: `returns` has the mean returns [n] of its seeds.

        NaN where a seed is dead.
        """
        # a resumed run may evaluate before it trains, and has no speed yet
        pace = f"{short(speed)} steps/s, all seeds | " if speed else ""
        pace = f"{pace}{clock(left)} left" if step else "start"
        texts = {label: spread(x) for label, x in returns.items()}
        if len(texts) == 1:
            (text,) = texts.values()
            self.say(f"{short(step)}/{short(total)} | {text} | {pace}")
            return
        self.say(f"{short(step)}/{short(total)} | {pace}")
        for label, text in texts.items():
            self.say(f"  {label} | {text}")

    # records

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values`: numbers, or arrays [R] with NaN for what is absent."""
        if self.file is None:
            return
        line = {"global_step": step} | {k: jsonable(v) for k, v in values.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        scalars = aggregate(values, self.labels)
        text = " ".join(f"{k}={v:.4g}" for k, v in scalars.items())
        self.say(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  "), 2)
        if self.tensorboard:
            self.tensorboard.write(step, scalars)
        with self.wandb_guard():
            for run, row in self.wandb_runs:
                mine = scalars if row is None else row_values(values, row)
                run.log({"global_step": step, **mine})

    def results(self, results: list[dict[str, Any]], episodes: int) -> None:
        """The final returns of each swept value, as `report.results` has them."""
        for result in results:
            shown = partial(report.number, digits=report.decimals(result["iqm"]))
            alive = sum(x is not None for x in result["per_seed"])
            line = f"{result['label'] or 'final greedy return'}: IQM {shown(result['iqm'])}"
            if None not in result["interval"]:  # as of a single seed
                ends = "[{}, {}]".format(*map(shown, result["interval"]))
                line += f", {report.interval_name(alive)} {ends}"
            self.say(line)
            self.say(
                f"  worst seed: {shown(report.worst(result['per_seed']))}; seeds alive: {alive} of "
                f"{result['n']}; episodes of each: {episodes}"
            )

    def attach(self, run_dir: Path, paths: list[Path]) -> None:
        """Give W&B these files of the run directory; a row's own run gets its policy."""
        warnings_of_files = contextlib.redirect_stderr(io.StringIO())  # one for each, even if quiet
        with self.wandb_guard(), warnings_of_files:
            for run, row in self.wandb_runs:
                for path in paths:
                    if row is None or path.name == f"policy_s{row:03d}.npz":
                        run.save(path, base_path=run_dir, policy="now", glob=False)

    def close(self, complete: bool) -> None:
        """Finish all sinks; W&B shows a run that is not complete as failed."""
        if self.file:
            self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        with self.wandb_guard():
            for run, _ in self.wandb_runs:
                run.finish(exit_code=0 if complete else 1)

    @contextlib.contextmanager
    def wandb_guard(self):
        """Any failure of W&B ends the tracking, never the run; W&B shows its runs as failed."""
        try:
            yield
        except Exception as error:
            self.say(f"W&B failed and is off from here on: {' '.join(str(error).split())}", 0)
            runs, self.wandb_runs = self.wandb_runs, []
            for run, _ in runs:
                with contextlib.suppress(Exception):
                    run.finish(exit_code=1)


class EventFile:
    """A file for TensorBoard, on disk after each `write`.

    tensorboardX's own SummaryWriter writes from a thread, and its flush() does not wait for it: a
    run that was killed and resumed would lack points.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self.file = EventsWriter(str(folder / "events"))
        # Older files of a resumed run may go beyond `step`: TensorBoard drops what they have there.
        start = SessionLog(status=SessionLog.START)
        self.file.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add the scalars of a step."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for key, value in scalars.items():
            # tensorboardX's `scalar` would replace the = of swept values.
            summary = Summary(value=[Summary.Value(tag=key, simple_value=value)])
            self.file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def print_warnings_once() -> None:
    """Print each warning once, in one line; libraries reset Python's own registry of them."""
    printed: set[str] = set()

    def show(message, *_, **__):
        text = " ".join(str(message).split())
        if text not in printed:
            printed.add(text)
            with contextlib.suppress(OSError, ValueError):  # the console is gone
                print(f"warning: {text}", file=sys.stderr)

    warnings.showwarning = show


def clock(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss, or a dash if not known yet."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def short(number: float) -> str:
    """A count to three digits: 950, 12.3k, 1.2M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def spread(returns: np.ndarray) -> str:
    """IQM [worst, best] of the seeds that are alive, and their number if some are not."""
    alive = returns[np.isfinite(returns)]
    if not len(alive):
        return "no seed is alive"
    text = f"IQM {report.iqm(alive):.4g} [{alive.min():.4g}, {alive.max():.4g}]"
    return text if len(alive) == len(returns) else f"{text} | {len(alive)}/{len(returns)} alive"


def start_wandb(log: Log, run_dir: Path, about: dict[str, Any], launch: Any, rows: Any) -> None:
    """Give the log one W&B run for the launch, and one per row under --wandb-seeds."""
    import wandb

    wandb.setup(wandb.Settings(silent=True))  # else `login` says whose key it found
    mode: Any = os.environ.get("WANDB_MODE")
    mode = mode or ("online" if wandb.login(prompt=False) else "offline")
    if mode == "offline":
        stored = f"{shlex.quote(str(run_dir))}/wandb/offline-run-*"
        log.say(f"W&B is offline: `wandb sync {stored}` uploads its runs", 0)
    group = f"{about['algo']}__{envs.canonical(about['config']['env'])}"
    made_with = {name: about[name] for name in ("algo", "commit", "device", "matmul_precision")}
    settings = made_with | about["config"] | about["launch"] | about["versions"]
    commit = about["commit"]
    options = {
        "project": launch.wandb_project,
        "entity": launch.wandb_entity or None,
        "dir": str(run_dir),
        "tags": [
            *launch.wandb_tags,
            f"jax {jax.__version__}",
            about["device"],
            commit[:9] + "+" * commit.endswith("+") or "no commit",
        ],
        "settings": wandb.Settings(silent=True, mode=mode),
        "reinit": "create_new",
        "resume": "allow",
    }
    swept = [rows.swept(row) for row in range(len(rows.seeds))]
    for row in [None, *range(len(swept))] if launch.wandb_seeds else [None]:
        suffix = "launch"
        own: dict[str, Any] = {k: sorted({x[k] for x in swept}) for k in rows.hparams}
        if row is not None:
            suffix = rows.name(row).replace("seed ", "seed")
            own = {**swept[row], "seed": int(rows.seeds[row])}
        identity = hashlib.sha256(f"{about['id']} {suffix}".encode()).hexdigest()[:12]
        run = wandb.init(
            name=f"{run_dir.name}-{suffix}",
            id=identity,
            group=group if row is None else f"{group}__seeds",
            job_type="launch" if row is None else "seed",
            config=settings | own,
            **options,
        )
        log.wandb_runs.append((run, row))
        run.define_metric("*", step_metric="global_step")


def aggregate(values: dict[str, Any], labels: list[str]) -> dict[str, float]:
    """Means over the rows that have a value; returns also as min, max and IQM.

    `labels` [R] are the swept values of the rows. If there are several, each has means of its own:
    `learning_rate=0.001/losses/value_loss`.
    """
    groups = {label: np.array(labels) == label for label in dict.fromkeys(labels)}
    scalars = {}
    for key, value in values.items():
        parts = {key: np.asarray(value, np.float64)}
        if np.ndim(value) and len(groups) > 1:
            parts = {f"{label}/{key}": parts[key][rows] for label, rows in groups.items()}
        for name, part in parts.items():
            present = part[np.isfinite(part)]
            if present.size:
                scalars[name] = float(present.mean())
                if name.endswith("_return"):
                    scalars[name + "_min"] = float(present.min())
                    scalars[name + "_max"] = float(present.max())
                    scalars[name + "_iqm"] = report.iqm(present)
    return scalars


def row_values(values: dict[str, Any], row: int) -> dict[str, float]:
    """The values of one row; what is one number for the whole launch is left out."""
    mine = {k: float(v[row]) for k, v in values.items() if np.ndim(v)}
    return {k: v for k, v in mine.items() if np.isfinite(v)}


# --- what a run was made with ---


def surroundings() -> dict[str, Any]:
    """Command, commit, versions and machine of this process."""
    return {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "cores": envs.cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        # of networks; None: jax's default
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    }


PACKAGES = ["jax", "jaxlib", "flax", "optax", "brax", "mujoco", "mujoco-mjx", "gymnax", "numpy"]
PACKAGES += ["gymnasium", "playground", "ale-py"]


def versions() -> dict[str, str]:
    """Versions of what can change a result, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """Git commit, with + if algos/ or envs/ differ from it; empty outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # another repository may lie above
        return ""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "algos", "envs"], capture_output=True, text=True
        )
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
