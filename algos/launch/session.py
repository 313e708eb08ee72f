"""A launch from the command line to its last line: the loop around the compiled program.

keys  = key(seed + i) for i in range(num_seeds)    # as the run --seed seed + i
state = init(keys)
until the next evaluation: state, metrics = train(state, n updates)
evaluate; log; save
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

import envs
from algos import common
from algos.launch import cli, logs, policies, render, report, rundir
from algos.launch.cli import Launch
from algos.launch.program import (
    Program,
    check_memory,
    compile_ahead,
    make_program,
    memory_text,
    reduction,
    row_devices,
    setup_jax,
    trace,
)
from algos.launch.rows import Rows, evaluation_keys, gather, inputs, local, make_rows

SLICE_SECONDS = 1.0  # aim for one call of the program; ctrl-C is checked between calls
EVAL_STEPS = 100  # environment steps of the first slice of an evaluation


def main(name: str, argv: list[str] | None = None) -> None:
    """Train `algos/<name>.py` from the command line; bad input is one line and exit status 2.

    With --verbose 2 an error keeps its traceback, for whoever is changing an algorithm.
    """
    launch = None
    with contextlib.ExitStack() as held:  # undone at the end: warnings, the run directory's lock
        held.callback(setattr, warnings, "showwarning", warnings.showwarning)
        logs.print_warnings_once()
        try:
            if argv is None:
                check_script(name)
                # envs turns this off, so that Python cannot exit while a program calls MuJoCo. This
                # process waits for every call, and turns it on to heed ctrl-C during a call.
                jax.config.update("jax_cpu_enable_async_dispatch", True)
            algorithm = importlib.import_module(f"algos.{name}")
            config, launch = cli.parse(name, algorithm.Config, algorithm.PRESETS, argv)
            rows = prepare(algorithm, config, launch)
            session = Session(name, config, launch, rows)
            session.check_run_dir()
            program = make_program(algorithm, config, launch, local(rows))
            session.log.say(session.plan())
            named = launch.resume or launch.preset
            if not named and not cli.task_preset(config.env, algorithm.PRESETS):
                session.log.say(f"{name} has no preset for this task: it starts from the defaults")
            session.open(program, held)
        except BrokenPipeError:  # `--help | head` closes the pipe; Python would flush into it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except (ValueError, OSError, ImportError, MemoryError) as error:
            end(launch, 2, f"error: {error}")
        except jax.errors.JaxRuntimeError as error:
            out_of_memory(launch, error)
        try:
            session.run()
        except OSError as error:  # such as a full disk
            end(launch, 1, f"error: {error}: {session.advice}")
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            out_of_memory(launch, error)
        except KeyboardInterrupt:
            said = f"stopped at once; {session.advice}"
            if argv is None:
                # The compiled program still runs and may call MuJoCo through Python. If Python
                # ended meanwhile, it would crash or hang.
                print(said, file=sys.stderr, flush=True)
                os._exit(130)
            end(launch, 130, said)


def check_script(name: str) -> None:
    """ValueError if a copy of an algorithm's file would start the original."""
    running, folder = sys.modules["__main__"], Path(__file__).resolve().parents[1]
    script = Path(getattr(running, "__file__", "")).resolve()
    if hasattr(running, "make_train") and script != folder / f"{name}.py":
        move = "" if script.parent == folder else f"move it to {folder} and "
        raise ValueError(
            f"{script.name} ends with launch.main({name!r}), which would run algos/{name}.py: "
            f"{move}write launch.main({script.stem!r})"
        )


def prepare(algorithm: ModuleType, config: Any, launch: Launch) -> Rows:
    """The rows of a launch that is checked, and jax set up for them; ValueError in one line."""
    rows = make_rows(launch, config, algorithm.TRACEABLE)
    common.check(config)
    setup_jax(len(rows.seeds))
    return rows


def end(launch: Launch | None, status: int, text: str) -> NoReturn:
    """End in an `except` block: one line and an exit status, or the traceback with --verbose 2."""
    if launch and launch.verbose == 2:
        raise
    print(" ".join(text.splitlines()), file=sys.stderr)  # MuJoCo's messages have several
    raise SystemExit(status) from None


def out_of_memory(launch: Launch | None, error: Exception) -> NoReturn:
    """End in an `except` block: one line if the memory is full, else the error as it is."""
    full = re.search("RESOURCE_EXHAUSTED|Out of memory", str(error))
    if not full and not isinstance(error, MemoryError):
        raise
    reason = str(error).partition("\n")[0].rstrip(".")
    advice = (
        "start a smaller run: fewer seeds, environments or evaluation episodes, narrower "
        "networks, or a smaller replay buffer; or end the program that holds the memory"
    )
    end(launch, 1, f"error: {reason}: {advice}")


class Session:
    """One launch: its position, its run directory and its log. `open` is what starts it."""

    def __init__(self, name: str, config: Any, launch: Launch, rows: Rows):
        self.name, self.config, self.launch, self.rows = name, config, launch, rows
        self.lead = jax.process_index() == 0  # the host that writes and prints
        self.run_dir = rundir.expanded(launch.run_dir or default_run_dir(name, config, launch))
        self.log = logs.Log(launch.verbose if self.lead else -1)
        self.update = 0
        self.seconds = {"compile": 0.0, "train": 0.0, "eval": 0.0}
        self.evals: dict[str, list] = {}  # as `rundir.write_evals` takes them
        # Metrics since the last evaluation: sums over updates, and where they begin.
        self.interval: dict[str, Any] = {"update": 0, "train": 0.0, "totals": {}}
        self.speed = 0.0  # steps per second of all rows, in the last interval
        self.dead = np.zeros(len(rows.seeds), bool)
        self.restored: Any = None
        self.unsaved = False  # there is something that ctrl-C must save
        self.stop = False
        self.told_of_broken: set[str] = set()  # training, evaluation
        self.started = time.monotonic()

    @property
    def step(self) -> int:
        """Finished steps of one row."""
        return self.update * self.config.steps_per_update

    @property
    def advice(self) -> str:
        """How to go on after an early end."""
        run_dir = shlex.quote(str(self.run_dir))
        if (self.run_dir / "done.json").exists():  # a run that is resumed has none
            draw = f": draw it with python experiments/render.py {run_dir}"
            return "the run is complete" + draw * self.launch.render
        if self.program.stateful:
            kept = f", its policies are in {run_dir}" * any(self.run_dir.glob("policy_s*.npz"))
            return f"{self.config.env} cannot be resumed{kept}"
        return f"go on with --resume {run_dir}"

    # the run directory

    def check_run_dir(self) -> None:
        """ValueError if a new launch would write where a run is."""
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise ValueError(f"{self.run_dir} is a file: choose another --run-dir")
        found = rundir.files(self.run_dir)
        if self.lead and not self.launch.resume and found:
            if not (self.run_dir / "config.json").exists():
                raise ValueError(
                    f"{self.run_dir} is not empty ({found[0].name}): choose another --run-dir"
                )
            saved = rundir.checkpoints(self.run_dir)
            again = "" if saved else ", which starts again, as it has no checkpoint,"
            raise ValueError(
                f"{self.run_dir} already holds a run ({found[0].name}): --resume it{again} or "
                "choose another --run-dir"
            )

    def open(self, program: Program, held: contextlib.ExitStack) -> None:
        """Take or restore the run directory; ValueError in one line if that is not possible.

        Its lock is released when `held` is closed.
        """
        self.program = program
        digests = [rundir.digest(x) for x in program.data]
        if self.lead:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            held.callback(rundir.lock(self.run_dir).release)
            self.check_run_dir()  # again: from here on nobody else can come first
        if self.launch.resume:
            if self.lead:
                rundir.check_data(self.run_dir, digests)
            self.restore()
        if self.lead:
            about = self.write_description(digests)
            # Without a checkpoint, drop everything logged before, step 0 included.
            step = -1 if self.restored is None else self.step
            self.log.open(self.run_dir, about, self.launch, self.rows, step)

    def write_description(self, digests: list[str]) -> dict[str, Any]:
        """config.json, from which the launch can be run again, and meta.json with its history.

        Says so if the algorithm's file has changed since the launch that this one resumes.
        Returns config.json, the run's id and what this launch is made with.
        """
        description = {
            "algo": self.name,
            "config": dataclasses.asdict(self.config),
            "launch": dataclasses.asdict(dataclasses.replace(self.launch, resume="", run_dir="")),
            "rows": {"seeds": self.rows.seeds.tolist(), "labels": self.rows.labels},
        }
        rundir.write_json(self.run_dir / "config.json", description)
        made_with = logs.surroundings() | {"data": digests}
        made_with["num_devices"] = len(self.devices()) * jax.process_count()
        made_with["source"] = source = rundir.source_digest(self.name)
        path, meta = self.run_dir / "meta.json", made_with
        if self.launch.resume and path.exists():
            first = rundir.read_json(path)
            last = [first, *first.get("resumed", [])][-1]
            if last.get("source", source) != source:
                self.log.say(
                    f"algos/{self.name}.py has changed: from here on the new file learns", 0
                )
            meta = first | {"resumed": [*first.get("resumed", []), made_with]}
        meta = {"id": secrets.token_hex(6)} | meta  # a resumed run keeps its own
        rundir.write_json(path, meta)
        return description | made_with | {"id": meta["id"]}

    def restore(self) -> None:
        """Read the last checkpoint and forget what was logged after it."""
        saved = rundir.checkpoints(self.run_dir)
        done = self.run_dir / "done.json"
        if not saved:
            if done.exists():
                raise ValueError(f"{self.run_dir} has no checkpoint to resume from")
            if self.lead:
                self.refuse_copy()
            self.log.say(f"{self.run_dir} has no checkpoint: it starts again")
            self.evals = rundir.rewind(self.run_dir, len(self.rows.seeds), -1, write=self.lead)
            return
        template = jax.eval_shape(self.program.init, *inputs(self.rows))
        planned = rundir.read_description(self.run_dir)["config"]["total_timesteps"]
        try:
            self.restored, meta = rundir.load_tree(saved[-1], template)
        except ValueError as error:
            if planned == self.config.total_timesteps:
                raise
            raise ValueError(
                f"{error}; if a size in it depends on --total-timesteps, resume with {planned}"
            ) from None
        if meta["update"] and not (self.run_dir / "eval.npz").exists():
            raise ValueError(f"{self.run_dir} has no eval.npz: its curve so far is lost")
        self.update, self.seconds = meta["update"], meta["seconds"]
        self.started -= self.seconds.pop("wall")
        self.dead = np.array(meta["dead"])
        totals = {k: np.array(v) for k, v in meta["interval"]["totals"].items()}
        self.interval = meta["interval"] | {"totals": totals}
        if self.dead.all() and done.exists():
            raise ValueError(f"{self.run_dir} is complete: every seed died")
        # Without done.json the run stopped after its last update: `finish` is still to do.
        if self.update >= self.config.num_updates and done.exists():
            raise ValueError(
                f"{self.run_dir} is complete ({self.step:,} steps): "
                "raise --total-timesteps to train on"
            )
        if self.update > self.config.num_updates:
            raise ValueError(
                f"{self.run_dir} has {self.update} updates, more than the "
                f"{self.config.num_updates} of --total-timesteps {self.config.total_timesteps}: "
                "raise it"
            )
        annealed = [x for x in vars(self.config) if x.startswith("anneal") and vars(self.config)[x]]
        if annealed and planned != self.config.total_timesteps:
            self.log.say(
                f"{', '.join(annealed)}: from here on towards the new end, so this is not what a "
                f"run of\n  {self.config.total_timesteps:,} steps gives"
            )
        self.log.say(f"continues after {self.step:,} steps of each row")
        self.evals = rundir.rewind(self.run_dir, len(self.rows.seeds), self.step, write=self.lead)
        if self.lead:  # these describe a shorter run
            done.unlink(missing_ok=True)
            (self.run_dir / "final.npz").unlink(missing_ok=True)
            for picture in render.files(self.run_dir):
                picture.unlink()

    def refuse_copy(self) -> None:
        """ValueError if checkpoints are missing that this run has written: it is a copy."""
        evals = rundir.evals_until(self.run_dir / "eval.npz", len(self.rows.seeds), sys.maxsize)
        count, every = len(evals.get("steps", ())), self.launch.checkpoint_every
        if every and count > every + 1:  # the one at step 0 has none
            raise ValueError(
                f"{self.run_dir} has {count} evaluations and no checkpoint, as a copy has: start a "
                "new run, or delete its eval.npz to begin this one again"
            )

    def devices(self) -> list[jax.Device]:
        """The devices of this host that train."""
        return row_devices(len(self.rows.seeds) // jax.process_count())

    def plan(self) -> str:
        """What will run, and where."""
        config, devices = self.config, self.devices()
        rows = f"{len(self.rows.seeds)} {'row' if self.launch.sweep else 'seed'}"
        rows += "s" * (len(self.rows.seeds) > 1)
        where = f"{len(devices)} x {devices[0].device_kind}"
        return (
            f"{self.name} on {envs.canonical(config.env)}, {where}\n"
            f"{rows} x {config.num_updates * config.steps_per_update:,} steps "
            f"({config.num_updates:,} updates of {config.steps_per_update:,})\n"
            f"run directory: {self.run_dir}"
        )

    # the steps of a run

    def run(self) -> None:
        """Compile, train, evaluate, save; exit status 130 if interrupted, 3 if every seed died."""
        handlers, complete = {}, False
        if threading.current_thread() is threading.main_thread():  # others may not set them
            # SIGHUP: the terminal was closed; under nohup it stays ignored.
            numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            taken = [x for x in numbers if signal.getsignal(x) != signal.SIG_IGN]
            handlers = {x: signal.signal(x, self.on_signal) for x in taken}
        try:
            state, trained = self.train(self.compile())
            complete = trained and self.finish(state)
            if not complete:
                self.save(state)
                self.log.say(f"stopped and saved; {self.advice}", 0)
            elif self.launch.render and self.lead:
                self.draw()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close(complete and not self.dead.all())
        if not complete or self.dead.all():
            raise SystemExit(3 if complete else 130)

    def train(self, state: Any) -> tuple[Any, bool]:
        """Train, evaluate and save until the end; the state, and False if interrupted."""
        total = self.config.num_updates * self.config.steps_per_update * len(self.rows.seeds)
        with self.log.progress(total, self.step * len(self.rows.seeds)):
            for i, point in self.eval_points():
                if self.dead.all():
                    break
                state = self.train_until(point, state)
                if self.stopped() or not self.evaluate(state):
                    return state, False
                self.export(state, self.partial_rows(), "partial", self.evals["returns"][-1])
                every = self.launch.checkpoint_every
                last = point == self.config.num_updates or self.dead.all()
                if last or (every and i % every == 0 and i > 0):
                    self.save(state)
        return state, True

    def stopped(self) -> bool:
        """Whether a signal asked for the end, on any host: they stop together."""
        return bool(gather(np.array([self.stop])).any())

    def compile(self) -> Any:
        """Trace and compile the program; returns the state to go on from."""
        start, rows = time.monotonic(), local(self.rows)
        with self.log.waiting("tracing"):
            traced = trace(self.program, rows)
        with self.log.waiting("compiling"):
            self.program = compile_ahead(traced)
            check_memory(self.program, len(self.devices()))
            state = jax.block_until_ready(self.program.init(*inputs(rows)))
        self.log.say(memory_text(self.program, state))
        self.seconds["compile"] += time.monotonic() - start
        self.unsaved = True
        if self.restored is None:
            return state
        shardings = jax.tree.map(lambda x: x.sharding, state)
        del state  # a device may not have memory for two
        restored, self.restored = self.restored, None
        return place(restored, shardings)

    def eval_points(self):
        """Evaluations still to come: (number, finished updates).

        A run resumed with another --num-evals skips the points of the new schedule that are past.
        """
        num_updates = self.config.num_updates
        count = min(self.launch.num_evals, num_updates)
        points = [(i, round(i * num_updates / count)) for i in range(count + 1)]
        done = self.evals["steps"][-1] // self.config.steps_per_update if self.evals else -1
        return [(i, point) for i, point in points if point > done and point >= self.update]

    def train_until(self, point: int, state: Any) -> Any:
        """Train in slices of about SLICE_SECONDS until `point` updates are done, then log."""
        hparams = inputs(local(self.rows))[1]
        totals = self.interval["totals"]
        length = 1
        # Hosts must stay in step, so several of them stop only where they meet: at evaluations.
        while self.update < point and not (self.stop and jax.process_count() == 1):
            length = min(length, point - self.update)
            start = time.monotonic()
            state, sums = self.program.train(state, hparams, jnp.int32(length), *self.program.data)
            sums = jax.block_until_ready(sums)  # heeds ctrl-C, which np.asarray does not
            sums = {k: np.asarray(v, np.float64) for k, v in sums.items()}
            elapsed = time.monotonic() - start
            for k, x in sums.items():
                totals[k] = reduction(k)(totals[k], x) if k in totals else x
            self.update += length
            self.seconds["train"] += elapsed
            self.log.advance(length * self.config.steps_per_update * len(self.rows.seeds))
            length = max(1, int(length * SLICE_SECONDS / max(elapsed, 1e-6)))
        if totals and self.update == point:  # a run that was stopped goes on with its sums
            self.log_training()
        return state

    def log_training(self) -> None:
        """Turn the sums of the interval into means, and name the seeds that died."""
        totals = {k: gather(v) for k, v in self.interval["totals"].items()}
        num_updates = self.update - self.interval["update"]
        seconds = self.seconds["train"] - self.interval["train"]
        self.interval = {"update": self.update, "train": self.seconds["train"], "totals": {}}
        died = (totals["health/finite"] < num_updates) & ~self.dead
        for i in np.flatnonzero(died):
            self.log.say(
                f"{self.rows.name(int(i))} is dead and left out: parameters or loss are not finite",
                0,
            )
        self.dead |= died
        self.tell_of_broken("training", totals.get("health/env_nan", np.zeros(1)).sum())
        # A group with a count is averaged over what was counted, such as the episodes that ended.
        counts = {k.split("/")[0]: totals.pop(k) for k in [*totals] if k.endswith("/count")}
        values: dict[str, Any] = {}
        for k, total in totals.items():
            if k != "health/env_nan" and not k.endswith("/max"):
                count = counts.get(k.split("/")[0], num_updates)
                total = total / np.where(count > 0, count, np.nan)
            values[k.replace("episodes/", "charts/episodic_")] = total
        values = {k: np.where(self.dead, np.nan, v) for k, v in values.items()}
        values["health/finite"] = (~self.dead).astype(float)
        values["health/seeds_alive"] = float((~self.dead).sum())
        steps = num_updates * self.config.steps_per_update * len(self.rows.seeds)
        values["charts/SPS"] = self.speed = steps / seconds
        self.write(values)

    def tell_of_broken(self, where: str, count: float) -> None:
        """Say once of training and once of evaluations that the physics broke in some steps."""
        if count and where not in self.told_of_broken:
            self.told_of_broken.add(where)
            self.log.say(
                f"{count:,.0f} steps of {where} had a reward or observation that is not finite: "
                "they end their\n  episodes with reward 0",
                0,
            )

    def play(self, state: Any, part: int = 0) -> dict[str, Any] | None:
        """Returns and lengths [R, K] of a part of an evaluation, by name; None if interrupted."""
        begun = time.monotonic()
        plays = self.program.begin(evaluation_keys(local(self.rows), self.update, part))
        length, alive = EVAL_STEPS, True
        while alive and not (self.stop and jax.process_count() == 1):
            start = time.monotonic()
            plays = self.program.play(state, plays, jnp.int32(length))
            plays = jax.block_until_ready(plays)  # raises errors, for which np.asarray waits
            alive = any(np.asarray(play.alive).any() for play in plays.values())
            elapsed = time.monotonic() - start
            length = max(1, int(length * SLICE_SECONDS / max(elapsed, 1e-6)))
        self.seconds["eval"] += time.monotonic() - begun
        if alive:
            return None
        broken = np.stack([gather(np.asarray(play.broken)) for play in plays.values()])
        self.tell_of_broken("evaluation", broken[:, ~self.dead].sum())
        of_live = lambda x: np.where(self.dead[:, None], np.nan, gather(np.asarray(x)))
        played = {rundir.returns_of(name): of_live(play.returns) for name, play in plays.items()}
        return played | {"lengths": of_live(plays[""].lengths)}

    def evaluate(self, state: Any) -> bool:
        """Greedy evaluation, to the log, eval.npz and the console; False if interrupted."""
        played = self.play(state)
        if played is None:
            return False
        for key, value in {"steps": self.step, "seconds": self.seconds["train"], **played}.items():
            self.evals.setdefault(key, []).append(value)
        self.write(evaluation_metrics("eval", played))
        if self.lead:
            rundir.write_evals(self.run_dir, self.evals)
        spent = self.seconds["train"] + self.seconds["eval"]
        left = spent * (self.config.num_updates / self.update - 1) if self.update else None
        total = self.config.num_updates * self.config.steps_per_update
        labels = np.array(self.rows.labels)
        returns = played["returns"].mean(1)
        shown = {x: returns[labels == x] for x in dict.fromkeys(self.rows.labels)}
        self.log.evaluation(self.step, total, shown, self.speed, left)
        return True

    def write(self, values: dict[str, Any]) -> None:
        """Log `values` with the times so far."""
        self.log.write(self.step, values | {f"time/{k}": v for k, v in self.times().items()})

    def times(self) -> dict[str, float]:
        """Seconds of all launches of the run, in parts and in all (`wall`)."""
        return self.seconds | {"wall": time.monotonic() - self.started}

    def save(self, state: Any) -> None:
        """Write a checkpoint: the whole state, keys included, of all rows of all hosts.

        If the state lacks the environments, no run can go on from it: only the policies are kept.
        """
        if self.program.stateful:
            unknown = np.full((len(self.rows.seeds), 1), np.nan)
            self.export(state, range(len(self.rows.seeds)), "policy", unknown)
            return
        arrays = {k: np.asarray(v) for k, v in rundir.flatten(state).items()}
        arrays = {k: v if k == ".update" else gather(v) for k, v in arrays.items()}
        # Several hosts stop only at evaluations, where `interval` has no sums that others lack.
        totals = {k: x.tolist() for k, x in self.interval["totals"].items()}
        interval = self.interval | {"totals": totals}
        meta = {"update": self.update, "seconds": self.times(), "dead": self.dead.tolist()}
        meta["interval"] = interval
        if self.lead:
            rundir.save_checkpoint(self.run_dir, arrays, meta)

    def partial_rows(self) -> Any:
        """Rows whose last two evaluations are the first two in a row to reach the return."""
        target = self.launch.partial_at_return
        if target is None or len(self.evals["returns"]) < 2:
            return []
        reached = np.stack(self.evals["returns"]).mean(-1) >= target  # [E, R], never if dead
        twice = reached[1:] & reached[:-1]
        return np.flatnonzero(twice[-1] & ~twice[:-1].any(0))

    def export(self, state: Any, rows: Any, prefix: str, returns: np.ndarray) -> None:
        """Write the policies of some rows, with their returns [R, K], as PREFIX_sNNN.npz."""
        if not len(rows):
            return
        arrays = rundir.flatten(self.program.policies(state))
        arrays = {k: gather(np.asarray(v)) for k, v in arrays.items()}
        for i in rows if self.lead else []:
            record = {
                "seed": int(self.rows.seeds[i]),
                "label": self.rows.labels[i],
                "step": self.step,
                "return": rundir.jsonable(returns[i].mean()),
            }
            path = self.run_dir / f"{prefix}_s{i:03d}.npz"
            row = {k: v[i] for k, v in arrays.items()}
            interface = self.program.interface
            config = dataclasses.replace(self.config, **self.rows.swept(i))
            policies.save_policy(path, row, self.name, config, interface, record)
            if prefix == "partial":
                self.log.say(f"{self.rows.name(int(i))} reached the return: {path.name}")

    def finish(self, state: Any) -> bool:
        """Play the last episodes, export policies, draw the curve; False if interrupted.

        The last evaluation has more episodes than the others; done.json is written last.
        """
        parts = [{k: x[-1] for k, x in self.evals.items() if k not in ("steps", "seconds")}]
        count = math.ceil(self.launch.final_episodes / self.launch.eval_episodes)
        with self.log.waiting("last evaluation"):
            for part in range(1, count):
                played = parts[0] if self.dead.all() else self.play(state, part)
                if played is None:
                    return False
                parts.append(played)
        final = {k: np.concatenate([part[k] for part in parts], 1) for k in parts[0]}
        self.export(state, range(len(self.rows.seeds)), "policy", final["returns"])
        if not self.lead:
            return True
        rundir.write_final(self.run_dir, final)
        run = rundir.read_run(self.run_dir)
        curve = self.run_dir / "plots" / "curve.png"
        lines = [report.Entry(label or self.name, run, rows) for label, rows in report.groups(run)]
        title = f"{self.name} on {self.config.env}"
        report.plot_curves(lines, curve, title, xs=("steps", "seconds"))
        results = report.results(run)
        self.log.results(results, run.final.shape[1])
        seconds = self.times()
        done: dict[str, Any] = {"steps": int(run.steps[-1]), "alive": int((~self.dead).sum())}
        done |= {"episodes": run.final.shape[1], "results": results, "seconds": seconds}
        self.write(evaluation_metrics("final", final))
        rundir.write_json(self.run_dir / "done.json", done)
        times = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
        self.log.say(f"seconds: {times}\ncurve: {curve}")
        self.log.attach(self.run_dir, [curve, *sorted(self.run_dir.glob("policy_s*.npz"))])
        return True

    def draw(self) -> None:
        """Draw the best, median and worst seed, unless a signal came before."""
        self.unsaved = False  # from here on a signal stops at once
        if self.stop:
            self.log.say(f"stopped; {self.advice}", 0)
            return
        render.render_run(self.run_dir, self.log.say)
        self.log.attach(self.run_dir, render.files(self.run_dir))

    def on_signal(self, number, frame) -> None:
        """First signal: stop after the slice. A further ctrl-C: at once, losing what is not saved.

        The others may come twice: shell and kernel both report that a terminal was closed. Before
        training, and while pictures are drawn, nothing is unsaved, so one process stops at once.
        """
        at_once = not self.unsaved and jax.process_count() == 1
        if at_once or (self.stop and number == signal.SIGINT):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one kills, even inside XLA
            raise KeyboardInterrupt
        if not self.stop:
            self.stop = True
            self.log.say("stopping after this slice; ctrl-C again to stop at once", 0)


def evaluation_metrics(group: str, played: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics [R] of an evaluation: means of its returns and lengths [R, K]."""
    means = {name: x.mean(1) for name, x in played.items()}
    metrics = {"episodic_return": means["returns"], "episodic_length": means["lengths"]}
    metrics |= {f"{name}_return": x for name, x in rundir.further_of(means).items()}
    return {f"{group}/{name}": x for name, x in metrics.items()}


def default_run_dir(name: str, config: Any, launch: Launch) -> str:
    """`runs/<env>/<algo>/<time>_s<seed>x<seeds>_<hash>`."""
    settings = dataclasses.asdict(config) | dataclasses.asdict(launch)
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    env = re.sub("[^A-Za-z0-9_.]+", "-", envs.canonical(config.env))
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"runs/{env}/{name}/{stamp}_s{launch.seed}x{launch.num_seeds}_{digest[:6]}"


def place(tree: Any, shardings: Any) -> Any:
    """Put this host's rows of `tree` on devices."""
    count, index = jax.process_count(), jax.process_index()

    def put(x, sharding):
        if x.ndim:
            part = len(x) // count
            x = x[index * part : (index + 1) * part]
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree, shardings)
