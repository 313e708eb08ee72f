"""What Brax's mjx backend and Playground share: a small state, solver settings, drawing."""

import jax
import jax.numpy as jnp

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


def pack(data, extra: tuple[str, ...] = ()) -> dict:
    """The integration state of an mjx.Data, and `extra` fields that the task reads."""
    return {field: getattr(data, field) for field in INTEGRATION_STATE + extra}


def unpack(packed: dict, template):
    """An mjx.Data with these fields and zeros elsewhere; template: its shapes and dtypes."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
    return zeros.replace(**packed)


def set_solver(model, iterations: int | None, ls_iterations: int | None):
    """An mjx.Model with other solver limits; None leaves the model's own."""
    if iterations:
        model = model.tree_replace({"opt.iterations": iterations})
    if ls_iterations:
        model = model.tree_replace({"opt.ls_iterations": ls_iterations})
    return model


def all_finite(tree) -> jax.Array:
    """Whether every entry of every leaf is finite, as one bool."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
