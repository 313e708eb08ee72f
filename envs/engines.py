"""MuJoCo inside a compiled program: several engines behind one interface.

c: MuJoCo's C engine on the threads of a CPU, called through XLA's FFI. mjx: MJX, compiled into the
program, for any device. warp: MJX on NVIDIA's Warp kernels.

An engine makes pure functions that reset and step one simulation. After each of them it calls the
rule of the task, which is written once for all engines:

    rule(xp, data, memory) -> memory, outputs

`data` holds MuJoCo's fields by name: qpos, qvel, ctrl and those that the task reads. As after
mj_step, derived fields such as xpos belong to the last evaluation of the dynamics, not to the new
qpos. `memory` [..., k] is what the rule keeps for its next call (zeros at the first), and `outputs`
any pytree of arrays. With c, xp is numpy, and arrays are float64 with a leading batch axis; with
mjx, xp is jax.numpy, and they are float32 without one.
"""

import contextlib
import copy
import ctypes
import importlib.util
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco.batch import Batch

from envs import cores, viewer

# Otherwise every unstable simulation writes a line to ./MUJOCO_LOG.TXT and to the terminal.
mujoco.set_mju_user_warning(lambda message: None)


class Physics(NamedTuple):
    """What is simulated, and what a task makes of it."""

    name: str
    model: mujoco.MjModel
    frame_skip: int  # physics steps per environment step
    reads: tuple[str, ...]  # derived fields of MjData that the rule reads
    rule: Callable  # xp, data, memory -> memory, outputs
    memory_size: int
    inputs: tuple[str, ...] = ("ctrl",)  # fields of the integration state that a caller sets


class Engine(NamedTuple):
    """Pure functions of one simulation, to be vmapped."""

    reset: Callable  # qpos [nq], qvel [nv], all inputs or none -> state, outputs
    step: Callable  # state, inputs (a ctrl [nu] by default) -> state, outputs, unstable []
    frame: Callable  # state -> pytree that `poses` needs
    poses: Callable  # frames (numpy leaves [T, ...]) -> qpos, mocap_pos, mocap_quat, each [T, ...]


def chosen(engine: str | None) -> str:
    """The name of the engine that runs; None: c on a CPU, else mjx. ValueError for other names."""
    if engine not in (None, "c", "mjx", "warp"):
        raise ValueError(f"engine={engine!r}: choose c, mjx or warp")
    return engine or ("c" if jax.default_backend() == "cpu" else "mjx")


def make(engine: str | None, physics: Physics) -> Engine:
    """The engine of that name; None: the default, see `chosen`."""
    device, engine = jax.default_backend(), chosen(engine)
    if engine == "c" and device != "cpu":
        raise ValueError(f"{physics.name}: engine=c needs a CPU, and this is a {device}: use mjx")
    if engine == "warp" and device != "gpu":
        raise ValueError(f"{physics.name}: engine=warp needs an NVIDIA GPU, and this is a {device}")
    if engine == "warp" and importlib.util.find_spec("warp") is None:
        raise ImportError(f"{physics.name}: engine=warp needs NVIDIA Warp: pip install warp-lang")
    if engine == "warp" and "cfrc_ext" in physics.reads:
        raise ValueError(f"{physics.name}: Warp has no contact forces (cfrc_ext): use engine=mjx")
    return _c(physics) if engine == "c" else _mjx(physics, "jax" if engine == "mjx" else "warp")


# --- c ---

# MuJoCo resets an unstable simulation (a bad ctrl it sets to zero) and counts a warning.
UNSTABLE = [
    int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{part}"))
    for part in ("QPOS", "QVEL", "QACC", "CTRL")
]
WARNING_COUNT = 1  # index of the count in a row of Batch.warning


def _c(physics: Physics) -> Engine:
    """State: float64 [nstate + memory_size], as uint32 of twice the length: jax has no float64.

    Its first nstate numbers are mjSTATE_INTEGRATION, from which the physics continues exactly.
    """
    model = physics.model
    # Devices step at the same time: they divide the CPU's cores and share no simulations.
    threads = max(1, cores() // jax.local_device_count())
    idle: defaultdict[int, SimpleQueue] = defaultdict(SimpleQueue)  # by number of simulations

    @contextlib.contextmanager
    def borrow(n):
        try:
            simulations = idle[n].get_nowait()
        except Empty:
            simulations = _Simulations(physics, n, threads)
        yield simulations
        idle[n].put(simulations)  # an exception skips this: its simulations are not used again

    def reset(qpos, qvel, *inputs):
        with borrow(len(qpos)) as simulations:
            return simulations.reset(qpos, qvel, inputs)

    def step(state, *inputs):
        with borrow(len(state)) as simulations:
            return simulations.step(state, inputs)

    def poses(frames):
        rows = np.ascontiguousarray(frames).view(np.float64)
        batch = Batch(model, len(rows))
        batch.state[:] = rows[:, : batch.nstate]
        return {field: batch.bind(field) for field in ("qpos", "mocap_pos", "mocap_quat")}

    nstate = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)
    row = jax.ShapeDtypeStruct((2 * (nstate + physics.memory_size),), jnp.uint32)
    fresh = mujoco.MjData(model)
    defaults = [np.float32(getattr(fresh, field)) for field in physics.inputs]
    like = lambda size: jax.ShapeDtypeStruct(size, jnp.float32)
    vectors, extras = [like((model.nq,)), like((model.nv,))], [like(x.shape) for x in defaults]
    host_reset = host_function(f"{physics.name}/reset", reset, *vectors, *extras)
    return Engine(
        reset=lambda qpos, qvel, *inputs: host_reset(qpos, qvel, *(inputs or defaults)),
        step=host_function(f"{physics.name}/step", step, row, *extras),
        frame=lambda state: state,
        poses=poses,
    )


class _Simulations:
    """n simulations in C, and live views of their fields; used by one call at a time."""

    def __init__(self, physics: Physics, n: int, threads: int):
        self.physics = physics
        # mj_step does not compute cfrc_ext. mj_rnePostConstraint does, from a whole MjData, which
        # only a persistent batch keeps. No task that reads it has equality constraints,
        # so a simulation without contacts has no such forces.
        self.forces = "cfrc_ext" in physics.reads
        self.batch = Batch(physics.model, n, threads, persistent=self.forces)
        fields = {"qpos", "qvel", "ctrl", *physics.inputs, *physics.reads} - {"cfrc_ext"}
        self.data = SimpleNamespace(**{field: self.batch.bind(field) for field in fields})
        if self.forces:
            self.data.cfrc_ext = np.zeros((n, physics.model.nbody, 6))
            self.num_contacts = self.batch.bind("ncon")
            self.scratch = mujoco.MjData(physics.model)

    def reset(self, qpos, qvel, inputs):
        """As mj_resetData, the new fields, mj_forward."""
        self.batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._write(inputs)
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        self.batch.forward()
        if self.forces:
            self.data.cfrc_ext[:] = 0.0
        return self._apply_rule(np.zeros((len(qpos), self.physics.memory_size)))

    def step(self, state, inputs):
        """As mj_step `frame_skip` times."""
        rows = state.view(np.float64)
        self.batch.state[:] = rows[:, : self.batch.nstate]
        self._write(inputs)
        self.batch.warning[:, UNSTABLE, WARNING_COUNT] = 0
        self.batch.step(nstep=self.physics.frame_skip)
        unstable = self.batch.warning[:, UNSTABLE, WARNING_COUNT].any(-1)
        if self.forces:
            self.data.cfrc_ext[:] = 0.0
            for i in np.flatnonzero(self.num_contacts):
                self.batch.get_data(i, self.scratch)
                mujoco.mj_rnePostConstraint(self.physics.model, self.scratch)
                self.data.cfrc_ext[i] = self.scratch.cfrc_ext
        return *self._apply_rule(rows[:, self.batch.nstate :]), unstable

    def _write(self, inputs):
        for field, value in zip(self.physics.inputs, inputs, strict=True):
            getattr(self.data, field)[:] = value

    def _apply_rule(self, memory):
        memory, outputs = self.physics.rule(np, self.data, memory)
        state = np.concatenate([self.batch.state, memory], axis=1).view(np.uint32)
        return state, jax.tree.map(_single, outputs)


def _single(array):
    """A copy in single precision, as jax has it."""
    return np.array(array, np.float32 if array.dtype == np.float64 else array.dtype)


# --- mjx ---

# MuJoCo's integration state (mjSTATE_INTEGRATION): a step is a function of these fields, all others
# of mjx.Data are derived. Carrying these alone keeps tens of kilobytes per environment out of the
# train state and its checkpoints.
INTEGRATION_STATE = (
    "time",
    "qpos",
    "qvel",
    "act",
    "qacc_warmstart",
    "ctrl",
    "qfrc_applied",
    "xfrc_applied",
    "eq_active",
    "mocap_pos",
    "mocap_quat",
)


def pack(data) -> dict:
    """The integration state of an mjx.Data."""
    return {field: getattr(data, field) for field in INTEGRATION_STATE}


def unpack(packed: dict, template):
    """An mjx.Data with these fields and zeros elsewhere; template: its shapes and dtypes."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
    return zeros.replace(**packed)


def bounded(tree) -> jax.Array:
    """Whether no entry of any leaf is NaN or above MuJoCo's own bound of 1e10, as one bool."""
    fine = [jnp.all(jnp.abs(leaf) <= mujoco.mjMAXVAL) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.array(fine))


def _mjx(physics: Physics, implementation: str) -> Engine:
    """State: MuJoCo's integration state by field, and the memory, in float32."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that warp is missing
        from mujoco import mjx

    model = copy.copy(physics.model)
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:  # which MJX does not have
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    try:
        compiled = mjx.put_model(model, impl=implementation)
        default = mjx.make_data(model, impl=implementation)
    except NotImplementedError as error:
        raise ValueError(
            f"{physics.name}: MJX cannot run this model ({error}): use engine=c, on a CPU"
        ) from None
    fields = {"qpos", "qvel", "ctrl", *physics.reads}
    named = lambda inputs: dict(zip(physics.inputs, inputs, strict=True)) if inputs else {}

    def apply_rule(data, memory):
        source = lambda field: data if field in data.__dataclass_fields__ else data._impl
        view = SimpleNamespace(**{field: getattr(source(field), field) for field in fields})
        memory, outputs = physics.rule(jnp, view, memory)
        return (pack(data), memory), outputs

    def reset(qpos, qvel, *inputs):
        start = default.replace(**named(inputs) | {"qpos": qpos, "qvel": qvel})
        data = mjx.forward(compiled, start)
        return apply_rule(data, jnp.zeros(physics.memory_size))

    def step(state, *inputs):
        packed, memory = state
        data = unpack(packed | named(inputs), default)
        data = jax.lax.fori_loop(
            0, physics.frame_skip, lambda _, data: mjx.step(compiled, data), data
        )
        if "cfrc_ext" in physics.reads:
            data = mjx.rne_postconstraint(compiled, data)
        return *apply_rule(data, memory), ~bounded((data.qpos, data.qvel))

    return Engine(
        reset=reset,
        step=step,
        frame=lambda state: viewer.frame(state[0]),
        poses=lambda frames: frames,
    )


# --- a numpy function in a compiled program, by XLA's foreign function interface ---
#
# jax.pure_callback would be shorter, but it puts its arrays on a device within the callback, which
# deadlocks when several CPU devices call back. Here XLA calls a function pointer with the addresses
# of its buffers, on the thread that runs a device's program: the caller's or one of XLA's own, for
# which ctypes takes the GIL. The structs are those of xla/ffi/api/c_api.h, as far as they are read.


class _Extension(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
    )


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("version", _Version))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _ErrorArguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


class _Api(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("create_error", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("dtype", ctypes.c_int),
        ("address", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("size", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _CallFrame(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("inputs", _Buffers),
        ("outputs", _Buffers),
    )


_Handler = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
_METADATA, _INTERNAL = 1, 13  # kind of extension; code of an error
_API_VERSION = (0, 1)  # the oldest with these structs: XLA supports a version for a year or more
_handlers: list[Any] = []  # XLA keeps their addresses for the life of the process
_names: Counter[str] = Counter()


def host_function(name: str, function: Callable, *inputs: jax.ShapeDtypeStruct) -> Callable:
    """A numpy function of arrays [B, ...], as a jax function of arrays without that axis.

    The axes of nested vmaps become B, and `function` runs once for all of them. Arrays are cast to
    the dtypes of `inputs`. `function` must be pure: XLA may call it on several threads at once. An
    exception in it ends the program.
    """
    # One call, on zeros, finds the shapes and types of the outputs.
    example = function(*(np.zeros((1, *x.shape), x.dtype) for x in inputs))
    leaves, structure = jax.tree.flatten(example)
    outputs = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]

    @_Handler
    def handler(frame):
        call = frame.contents
        try:
            if call.extension and call.extension.contents.type == _METADATA:  # at registration
                extension = ctypes.cast(call.extension, ctypes.POINTER(_MetadataExtension))
                version = extension.contents.metadata.contents.version
                version.major, version.minor = _API_VERSION
                return None
            arrays = map(_array, call.inputs.buffers[: len(inputs)], inputs)
            results = jax.tree.leaves(function(*arrays))
            buffers = map(_array, call.outputs.buffers[: len(outputs)], outputs)
            for buffer, result in zip(buffers, results, strict=True):
                buffer[:] = result
        except BaseException as error:  # nothing may be raised into C
            message = f"{name}: {type(error).__name__}: {error}".encode()
            size = ctypes.sizeof(_ErrorArguments)
            arguments = _ErrorArguments(size, None, message, _INTERNAL)
            return call.api.contents.create_error(arguments)
        return None

    target = f"{name}/{_names[name]}"  # the same in every run, for the compilation cache
    _names[name] += 1
    _handlers.append(handler)
    address = ctypes.cast(handler, ctypes.c_void_p).value
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(address), platform="cpu")
    call = jax.ffi.ffi_call(target, outputs, vmap_method="broadcast_all")

    def wrapper(*arrays):
        cast = (jnp.asarray(x, like.dtype) for x, like in zip(arrays, inputs, strict=True))
        return jax.tree.unflatten(structure, call(*cast))

    return wrapper


def _array(pointer, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """A view [B, ...] of XLA's buffer, `like` one row of it."""
    buffer = pointer.contents
    batch = math.prod(buffer.shape[: buffer.rank - len(like.shape)])
    size = batch * math.prod(like.shape) * like.dtype.itemsize
    memory = (ctypes.c_byte * size).from_address(buffer.address)
    return np.ndarray((batch, *like.shape), like.dtype, memory)
