"""Adapter for gymnax: classic control, MinAtar and bsuite.

The environments' own transition functions are used, with their default parameters; gymnax's time
limit and auto-reset are not.
"""

import colorsys
import math

import gymnax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from envs import viewer
from envs.wrappers import RawEnv

# These episodes end by the clock because the task does: the observation shows the time and nothing
# comes after.
ENDS_AT_LIMIT = ("DiscountingChain-bsuite",)

GRIDS = ("-MinAtar", "Catch-bsuite", "DeepSea-bsuite")


def make(task: str) -> RawEnv:
    """Build a gymnax task from its registered name."""
    env, params = gymnax.make(task)
    space = env.action_space(params)
    discrete = not hasattr(space, "low")
    obs_shape = env.observation_space(params).shape
    obs_dtype = jnp.bool_ if task.endswith("-MinAtar") else jnp.float32  # MinAtar is zeros and ones

    def flat(obs):
        return jnp.ravel(obs).astype(obs_dtype)

    def reset(key):
        obs, state = env.reset_env(key, params)
        return flat(obs), state

    def step(key, state, action):
        if discrete:
            action = action.astype(jnp.int32)
        else:
            action = space.low + (action + 1) / 2 * (space.high - space.low)
        obs, state, reward, terminated, _ = env.step_env(key, state, action, params)
        if task in ENDS_AT_LIMIT:
            terminated = terminated | env.is_truncated(state, params)
        return flat(obs), state, jnp.float32(reward), terminated, {}

    grid = task.endswith(GRIDS)
    drawable = grid or (len(obs_shape) == 1 and not task.endswith("-bsuite"))

    def frame(state):
        obs = env.get_obs(state)
        return jnp.append(obs, state.last_u) if task == "Pendulum-v1" else obs

    def render(frames, path):
        draw = _draw_grid if grid else lambda obs: _draw_lines(task, obs)
        return viewer.write_gif([draw(obs) for obs in frames], path.with_suffix(".gif"), 0.04)

    return RawEnv(
        reset=reset,
        step=step,
        obs_size=math.prod(obs_shape),
        obs_shape=tuple(obs_shape),
        action_size=space.n if discrete else space.shape[0],
        discrete=discrete,
        max_steps=params.max_steps_in_episode,
        reset_mode="fresh",
        frame=frame if drawable else None,
        render=render if drawable else None,
        action_range=None if discrete else [[x] * space.shape[0] for x in (space.low, space.high)],
    )


# --- drawing: a frame is an observation, on pendulum with the torque at its end ---

# Width and colour of lines.
FIXED, MOVING, PIVOT, TORQUE = (3, "#999999"), (9, "#22577a"), (14, "#1b1b1b"), (4, "#d1495b")


def _draw_lines(task, frame):
    """Picture [2, 2] units wide of a classic control task."""
    if task == "CartPole-v1":
        x, theta = frame[0] / 2.4, frame[2]
        tip = (x + 0.7 * math.sin(theta), 0.7 * math.cos(theta) - 0.4)
        rail, cart = [(-1, -0.4), (1, -0.4)], [(x - 0.15, -0.4), (x + 0.15, -0.4)]
        lines = [(FIXED, rail), (MOVING, cart), (MOVING, [(x, -0.4), tip])]
    elif task == "Pendulum-v1":
        theta, torque = math.atan2(frame[1], frame[0]), frame[3]  # the angle is from upright
        at = lambda radius, angle: (-radius * math.sin(angle), radius * math.cos(angle))
        lines = [(MOVING, [(0, 0), at(0.8, theta)]), (PIVOT, [(0, 0)] * 2)]
        if abs(torque) > 0.02:  # an arrow; that of the greatest torque is a quarter of a circle
            end = theta + torque * math.pi / 4
            tail = end - math.copysign(0.25, torque)
            arc = [at(0.35, angle) for angle in np.linspace(theta, end, 20)]
            lines += [(TORQUE, arc), (TORQUE, [at(0.42, tail), arc[-1], at(0.28, tail)])]
    elif task == "Acrobot-v1":
        first, second = math.atan2(frame[1], frame[0]), math.atan2(frame[3], frame[2])
        elbow = (0.45 * math.sin(first), -0.45 * math.cos(first))
        end = (
            elbow[0] + 0.45 * math.sin(first + second),
            elbow[1] - 0.45 * math.cos(first + second),
        )
        goal, arm = [(-1, 0.45), (1, 0.45)], [(0, 0), elbow, end]
        lines = [(FIXED, goal), (MOVING, arm), (PIVOT, [(0, 0)] * 2)]
    else:  # the mountain cars: height is sin(3 x) over positions -1.2 to 0.6
        height = lambda position: 0.5 * math.sin(3 * position)
        to_unit = lambda position: (position + 0.3) / 0.9
        hill = [(to_unit(x), height(x)) for x in np.linspace(-1.2, 0.6, 60)]
        car = (to_unit(frame[0]), height(frame[0]))
        lines = [(FIXED, hill), (MOVING, [car, (car[0], car[1] + 0.12)])]
    size, scale = 300, 3  # drawn larger, for smooth edges
    image = Image.new("RGB", (scale * size, scale * size), "white")
    draw = ImageDraw.Draw(image)
    for (width, colour), line in lines:
        points = [(scale * (150 + 140 * x), scale * (150 - 140 * y)) for x, y in line]
        draw.line(points, fill=colour, width=scale * width, joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            draw.circle((x, y), scale * width / 2, fill=colour)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _draw_grid(obs):
    """Picture of a grid [rows, columns] or [rows, columns, channels]: one colour per channel."""
    grid = np.asarray(obs, np.float32)
    grid = grid if grid.ndim == 3 else grid[..., None]
    channels = grid.shape[-1]
    colours = np.array([colorsys.hsv_to_rgb(c / channels, 0.65, 0.95) for c in range(channels)])
    top = grid.shape[-1] - 1 - grid[..., ::-1].argmax(-1)  # the last channel that is on wins
    pixels = np.where(grid.any(-1)[..., None], colours[top], 0.12)
    image = Image.fromarray((255 * pixels).astype(np.uint8))
    return image.resize((30 * image.width, 30 * image.height), Image.Resampling.NEAREST)
