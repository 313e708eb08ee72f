"""The state that engines on MJX carry."""

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


def pack(data) -> dict:
    """The integration state of an mjx.Data."""
    return {field: getattr(data, field) for field in INTEGRATION_STATE}


def unpack(packed: dict, template):
    """An mjx.Data with these fields and zeros elsewhere; template: its shapes and dtypes."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), template)
    return zeros.replace(**packed)


def all_finite(tree) -> jax.Array:
    """Whether every entry of every leaf is finite, as one bool."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
