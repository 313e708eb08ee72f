"""Environments behind one signature: `make(name, num_envs)`; see docs/environments.md.

Names are `source/Task?option=value&option=value`; ALIASES holds the short ones, and
`module.path:factory` calls a function of your own that returns a RawEnv. Adapters are imported only
when one of their tasks is asked for.
"""

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from envs.options import COUNT, Kind, choice, read, spell
from envs.wrappers import RESET_MODES, Env, Goals, RawEnv, check, countable, wrap

# Make calls of compiled programs on a CPU wait for their results: if Python exits while one of them
# still calls MuJoCo through it, the process crashes or hangs.
jax.config.update("jax_cpu_enable_async_dispatch", False)

__all__ = ["ALIASES", "Env", "Goals", "RawEnv", "canonical", "cores", "make"]

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # limit of the control group, on Linux

BRAX_BACKENDS = ("mjx", "generalized", "spring", "positional")

# All games that ale-py ships.
ATARI = """
    Adventure AirRaid Alien Amidar Assault Asterix Asteroids Atlantis Atlantis2 Backgammon
    BankHeist BasicMath BattleZone BeamRider Berzerk Blackjack Bowling Boxing Breakout Carnival
    Casino Centipede ChopperCommand Combat CrazyClimber Crossbow Darkchambers Defender
    DemonAttack DonkeyKong DoubleDunk Earthworld ElevatorAction Enduro Entombed Et FishingDerby
    FlagCapture Freeway Frogger Frostbite Galaxian Gopher Gravitar Hangman HauntedHouse Hero
    HumanCannonball IceHockey Jamesbond JourneyEscape Joust Kaboom Kangaroo KeystoneKapers
    KingKong Klax Koolaid Krull KungFuMaster LaserGates LostLuggage MarioBros MazeCraze
    MiniatureGolf MontezumaRevenge MrDo MsPacman NameThisGame Othello Pacman Phoenix Pitfall
    Pitfall2 Pong Pooyan PrivateEye Qbert Riverraid RoadRunner Robotank Seaquest SirLancelot
    Skiing Solaris SpaceInvaders SpaceWar StarGunner Superman Surround Tennis Tetris TicTacToe3d
    TimePilot Trondead Turmoil Tutankham UpNDown Venture VideoCheckers VideoChess VideoCube
    VideoPinball Warlords WizardOfWor WordZapper YarsRevenge Zaxxon
"""

TASKS: dict[str, tuple[str, ...]] = {
    "gym": (
        "Ant-v5",
        "HalfCheetah-v5",
        "Hopper-v5",
        "Humanoid-v5",
        "HumanoidStandup-v5",
        "InvertedDoublePendulum-v5",
        "InvertedPendulum-v5",
        "Pusher-v5",
        "Reacher-v5",
        "Swimmer-v5",
        "Walker2d-v5",
    ),
    "brax": (
        "ant",
        "halfcheetah",
        "hopper",
        "humanoid",
        "humanoidstandup",
        "inverted_double_pendulum",
        "inverted_pendulum",
        "pusher",
        "reacher",
        "swimmer",
        "walker2d",
    ),
    "playground": (
        # DeepMind Control
        "AcrobotSwingup",
        "AcrobotSwingupSparse",
        "BallInCup",
        "CartpoleBalance",
        "CartpoleBalanceSparse",
        "CartpoleSwingup",
        "CartpoleSwingupSparse",
        "CheetahRun",
        "FingerSpin",
        "FingerTurnEasy",
        "FingerTurnHard",
        "FishSwim",
        "HopperHop",
        "HopperStand",
        "HumanoidRun",
        "HumanoidStand",
        "HumanoidWalk",
        "PendulumSwingup",
        "PointMass",
        "ReacherEasy",
        "ReacherHard",
        "SwimmerSwimmer6",
        "WalkerRun",
        "WalkerStand",
        "WalkerWalk",
        # humanoid robots that follow a joystick
        "ApolloJoystickFlatTerrain",
        "BerkeleyHumanoidJoystickFlatTerrain",
        "BerkeleyHumanoidJoystickRoughTerrain",
        "G1JoystickFlatTerrain",
        "G1JoystickRoughTerrain",
        "H1InplaceGaitTracking",
        "H1JoystickGaitTracking",
        "Op3Joystick",
        "T1JoystickFlatTerrain",
        "T1JoystickRoughTerrain",
    ),
    "gymnax": (
        "CartPole-v1",
        "Pendulum-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "MountainCarContinuous-v0",
        "Asterix-MinAtar",
        "Breakout-MinAtar",
        "Freeway-MinAtar",
        "Seaquest-MinAtar",
        "SpaceInvaders-MinAtar",
        "Catch-bsuite",
        "DeepSea-bsuite",
        "DiscountingChain-bsuite",
        "MemoryChain-bsuite",
        "SimpleBandit-bsuite",
        "UmbrellaChain-bsuite",
    ),
    "arm": ("reacher-moving", "reacher-static"),
    "atari": tuple(ATARI.split()),
    "probe": (
        "value",
        "value-continuous",
        "observation",
        "discount",
        "action",
        "action-continuous",
        "both",
        "both-continuous",
        "truncation",
        "truncation-continuous",
        "termination",
        "termination-continuous",
        "rare",
    ),
}

MODULES = {
    "gym": "envs.gym",
    "brax": "envs.brax",
    "playground": "envs.playground",
    "gymnax": "envs.gymnax",
    "arm": "envs.arm",
    "atari": "envs.atari",
    "probe": "envs.probes",
}

ENGINE = {"engine": choice("c", "mjx", "warp")}  # of MuJoCo; see envs/engines.py
SOLVER = {"iterations": COUNT, "ls_iterations": COUNT}
LIMIT = {"max_steps": COUNT}  # the time limit, in place of the task's

# Tasks of gym have options of their own besides; see envs/gym.py
OPTIONS: dict[str, dict[str, Kind]] = {
    "gym": {**ENGINE, **LIMIT},
    "brax": {"backend": choice(*BRAX_BACKENDS), **ENGINE, **SOLVER, **LIMIT},
    "playground": {**ENGINE, **SOLVER, **LIMIT},
    "gymnax": LIMIT,
    "arm": {**ENGINE, **LIMIT},
    "atari": {},
    "probe": LIMIT,
}

ALIASES: dict[str, str] = {
    "cartpole": "gymnax/CartPole-v1",
    "pendulum": "gymnax/Pendulum-v1",
    "acrobot": "gymnax/Acrobot-v1",
    "mountaincar": "gymnax/MountainCar-v0",
    "mountaincar_continuous": "gymnax/MountainCarContinuous-v0",
    "asterix": "gymnax/Asterix-MinAtar",
    "breakout": "gymnax/Breakout-MinAtar",
    "freeway": "gymnax/Freeway-MinAtar",
    "seaquest": "gymnax/Seaquest-MinAtar",
    "space_invaders": "gymnax/SpaceInvaders-MinAtar",
    **{task: f"gymnax/{task}" for task in TASKS["gymnax"]},
    **{task: f"gym/{task}" for task in TASKS["gym"]},
    **{task: f"brax/{task}" for task in TASKS["brax"]},
    **{task: f"playground/{task}" for task in TASKS["playground"]},
}


def make(
    name: str,
    num_envs: int,
    *,
    stagger: bool = True,
    reset_mode: str | None = None,
    max_steps: int | None = None,
    privileged: bool = False,
) -> Env:
    """Build `num_envs` environments with time limit, auto-reset and episode log.

    stagger draws each environment's elapsed time at reset uniformly in [0, max_steps), so that they
    do not time out together; pass False for evaluation. reset_mode and max_steps override what the
    task asks for. privileged appends what only a critic may see to the observation, if the task has
    it (`privileged_size` entries). Raises ValueError for an unknown name, option or value, and
    ImportError when an optional package is missing.
    """
    name = canonical(name)
    if not countable(num_envs):
        raise ValueError(f"num_envs={num_envs!r}: it should be an int from 1 to 2**31 - 1")
    if reset_mode is not None and reset_mode not in RESET_MODES:
        raise ValueError(f"reset_mode={reset_mode!r}: choose one of {', '.join(RESET_MODES)}")
    if max_steps is not None and not countable(max_steps):
        raise ValueError(f"max_steps={max_steps!r}: it should be an int from 1 to 2**31 - 1")
    if name.startswith("atari/"):
        if max_steps is not None:
            raise ValueError(f"{name}: max_steps={max_steps} cannot be changed")
        purpose = "training" if stagger else "evaluation"  # with emulators of their own
        game = name.removeprefix("atari/")
        return importlib.import_module(MODULES["atari"]).make(game, num_envs, purpose)
    raw = _load(name, _factory(name)) if ":" in name else _load(name)
    raw = raw._replace(
        reset_mode=reset_mode or raw.reset_mode, max_steps=max_steps or raw.max_steps
    )
    return wrap(raw, name, num_envs, stagger, privileged)


def cores() -> int:
    """CPU cores that this process may use. Clusters and containers grant fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:  # microseconds of all cores in each period, as `docker run --cpus` sets them
        quota, period = CPU_MAX.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit, or "max"
        return count


def canonical(name: str) -> str:
    """Full name: aliases resolved, options checked and sorted.

    Defaults are left out, except of `engine`, which depends on the device, and of `max_steps`.
    """
    if not isinstance(name, str):
        raise ValueError(f"name={name!r}: a string is wanted, module:function for one of your own")
    if ":" in name:
        return name
    source, task, options = _parse(name)
    if options.get("backend") == _default_backend(task):
        del options["backend"]
    query = "&".join(f"{option}={spell(options[option])}" for option in sorted(options))
    return f"{source}/{task}" + (f"?{query}" if query else "")


@functools.lru_cache(maxsize=16)
def _load(name: str, factory: Callable | None = None) -> RawEnv:
    """The adapter's environment, loaded and (by jit) traced once for training and evaluation.

    A user's `factory` is part of the cache's key: after its module is edited and loaded again, it
    is called again.
    """
    if factory:
        raw = _call(name, factory)
    else:
        source, task, options = _parse(name)
        max_steps = options.pop("max_steps", None)
        if source == "brax":
            options.setdefault("backend", _default_backend(task))
        with _without_warp() if options.get("engine") != "warp" else contextlib.nullcontext():
            adapter = importlib.import_module(MODULES[source])
            raw = adapter.make(task, **options)
        raw = raw._replace(max_steps=max_steps or raw.max_steps)
    return raw._replace(reset=precise(raw.reset), step=precise(raw.step))


@contextlib.contextmanager
def _without_warp():
    """Let mujoco.mjx believe that Warp is missing: importing Warp's kernels takes two seconds.

    mujoco.mjx prints that it is missing, which nobody needs to read.
    """
    hidden = "warp" not in sys.modules
    if hidden:
        sys.modules["warp"] = None  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if hidden:
            del sys.modules["warp"]


def precise(function):
    """Compiled in full single precision: physics fails under the TF32 of NVIDIA's matrix units."""

    @jax.jit
    def wrapper(*args):
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return wrapper


def _factory(name: str) -> Callable:
    """The user's function that a name such as my_module:my_factory stands for."""
    path, _, attribute = name.partition(":")
    if "?" in attribute:
        raise ValueError(f"{name!r}: a function of your own takes no options, set them in it")
    function = None
    try:
        if all(part.isidentifier() for part in path.split(".")):
            function = getattr(importlib.import_module(path), attribute, None)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise ImportError(f"{name}: {error}") from error
    if not callable(function):
        raise ValueError(
            f"{name!r}: no such function; the module must be importable (its folder on PYTHONPATH)"
        )
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the function must need no arguments ({error})") from None
    return function


def _call(name: str, factory: Callable) -> RawEnv:
    """The environment that a user's function returns, checked."""
    try:
        raw = factory()
    except ValueError as error:  # such as MuJoCo's, of a model
        raise ValueError(f"{name}: {error}") from error
    except TypeError as error:
        if "RawEnv" not in str(error):  # otherwise a field of it is missing or unknown
            raise
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(raw, RawEnv):
        raise ValueError(f"{name!r} returned {type(raw).__name__}; it must return envs.RawEnv")
    check(raw, name)
    return raw


def _default_backend(task: str) -> str:
    return "generalized" if task == "swimmer" else "mjx"  # Brax refuses any other for swimmer


def _parse(name: str) -> tuple[str, str, dict[str, Any]]:
    """Source, task and the options that are not the defaults."""
    base, _, query = name.partition("?")
    source, _, task = ALIASES.get(base, base).partition("/")
    if task not in TASKS.get(source, ()):
        known = [*ALIASES, *(f"{source}/{task}" for source in TASKS for task in TASKS[source])]
        # A loaded module may have no spec that can be found, as __main__.
        own = base in sys.modules or (base.isidentifier() and importlib.util.find_spec(base))
        hint = f" A function of your module is {base}:FUNCTION" if own else ""
        raise ValueError(
            f"unknown environment {name!r}; did you mean {_nearest(base, known)}?{hint}"
        )
    kinds, owner = OPTIONS[source], source
    if source == "gym":
        kinds, owner = kinds | importlib.import_module("envs.gym").kinds(task), task
    options: dict[str, Any] = {}
    for option, _, text in (item.partition("=") for item in query.split("&") if item):
        if option not in kinds:
            listed = ", ".join(kinds) or "none"
            raise ValueError(f"{name!r}: unknown option {option!r}; {owner} has: {listed}")
        if option in options:
            raise ValueError(f"{name!r}: {option} is given twice")
        options[option] = read(text, kinds[option], f"{name!r}: {option}")
    options = {option: x for option, x in options.items() if x != kinds[option].default}
    fixed = {x: value for x, value in options.items() if x != "max_steps"}
    if task == "swimmer" and fixed not in ({}, {"backend": "generalized"}):
        raise ValueError(
            f"{name!r}: Brax implements swimmer for backend=generalized only, which takes no other "
            "option than max_steps"
        )
    return source, task, options


def _nearest(name: str, known: list[str]) -> str:
    """The five closest known names, ignoring case, the same source first."""
    source, _, task = name.lower().rpartition("/")
    alike = lambda one, other: difflib.SequenceMatcher(None, one, other.lower()).ratio()
    score = {
        other: max(alike(name.lower(), other), alike(task, other.split("/")[-1]))
        + 0.3 * other.startswith(f"{source or task}/")
        for other in known
    }
    return ", ".join(sorted(known, key=lambda other: (-score[other], len(other)))[:5])
