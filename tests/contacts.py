"""Where MJX has other contacts than MuJoCo's C engine, so that forces differ, in float64 too.

1. If a model has the numbers max_geom_pairs and max_contact_points, as Playground's have, MJX keeps
   of the links that could touch each other the pairs that are nearest by their bounding spheres,
   and of all contacts of one dimension the deepest. C ignores these numbers.
2. Friction is a pyramid. Where a capsule touches a plane, it is turned with the capsule, but MJX
   turns it to the y axis if the capsule is within 30 degrees of the normal.
"""

import copy

import mujoco
import numpy as np

# Bodies move within a step, in which RK4 evaluates contacts again: geoms that are nearly in contact
# count, and capsules that nearly stand.
NEAR = 0.02  # m
STANDING = np.cos(np.radians(40))


def differ(model, data, num_steps):
    """Whether they have other contacts within the physics steps from the state of `data`."""
    seen = copy.copy(model)
    if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4:
        seen.geom_margin[:] = NEAR
    there, result = mujoco.MjData(seen), False
    for _ in range(num_steps):
        there.qpos[:], there.mocap_pos[:] = data.qpos, data.mocap_pos
        mujoco.mj_fwdPosition(seen, there)
        result |= bool(dropped(seen, there) or any(turned(seen, there, x) for x in there.contact))
        mujoco.mj_step(model, data)
    return result


def dropped(model, data):
    """Whether there may be contacts that MJX does not see."""
    index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_NUMERIC, "max_contact_points")
    if index < 0 or not data.ncon:
        return False
    between_links = (model.geom_bodyid[data.contact.geom] > 0).all(-1).any()
    limit = model.numeric_data[model.numeric_adr[index]]
    return between_links or np.bincount(data.contact.dim).max() > limit


def turned(model, data, contact):
    """Whether MJX turns the pyramid of a capsule on a plane to other axes than C does."""
    first, second = contact.geom
    kinds = model.geom_type[first], model.geom_type[second]
    if contact.dim == 1 or kinds != (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_CAPSULE):
        return False
    normal, tangent = contact.frame[:3], contact.frame[3:6]
    axis = data.geom_xmat[second].reshape(3, 3)[:, 2]
    along_axes = np.abs(tangent).max() > 1 - 1e-9  # as in a planar task: the same pyramid
    return abs(axis @ normal) > STANDING and not along_axes
