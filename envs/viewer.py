"""Drawing of MuJoCo models without a display: a GIF where a GL library is there, else one
self-contained HTML page.

The page holds shapes, poses and a short script that draws them on a canvas; it loads nothing, so it
works offline. Drag turns the camera, the wheel zooms, space pauses.
"""

import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mujoco
import numpy as np

FPS = 30  # of what is shown; frames are dropped or kept to play at the task's own speed
SIZE = (480, 360)
UNCOLOURED = np.array([0.5, 0.5, 0.5, 1], np.float32)  # colour of a geom that was given none
PAGE = Path(__file__).with_name("viewer.html")


def frame(physics: dict) -> dict:
    """What one picture needs of an integration state."""
    return {field: physics[field] for field in ("qpos", "mocap_pos", "mocap_quat")}


def render(model: mujoco.MjModel, frames: dict, path: Path, dt: float, gif: bool) -> Path:
    """Write frames (leaves [T, ...], dt s apart) to path.html, or .gif if `gif` and GL allow."""
    stride = max(1, round(1 / (FPS * dt)))
    frames = {field: np.asarray(value)[::stride] for field, value in frames.items()}
    picture = path.with_suffix(".gif")
    chosen = os.environ.get("MUJOCO_GL")
    backends = [chosen] if chosen else ["egl", "osmesa"]
    if gif and any(_render_gif(gl, model, frames, picture, dt * stride) for gl in backends):
        return picture
    return write_html(model, frames, path.with_suffix(".html"), dt * stride)


def write_gif(images, path: Path, dt: float) -> Path:
    """Write Pillow images as a looping GIF, dt seconds apart."""
    milliseconds = max(20, round(1000 * dt / 10) * 10)  # viewers slow down anything shorter
    first, *rest = images
    timing = {"duration": milliseconds, "loop": 0}
    with whole(path) as file:
        first.save(file, save_all=True, append_images=rest, optimize=True, **timing)
    return path


@contextlib.contextmanager
def whole(path: Path):
    """A path to write to in its place: the file appears at `path` once it is complete."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _poses(model, frames):
    """Yield an MjData posed for each frame."""
    data = mujoco.MjData(model)
    for t in range(len(frames["qpos"])):
        data.qpos[:] = frames["qpos"][t]
        if model.nmocap and "mocap_pos" in frames:
            data.mocap_pos[:] = frames["mocap_pos"][t].reshape(model.nmocap, 3)
            data.mocap_quat[:] = frames["mocap_quat"][t].reshape(model.nmocap, 4)
        mujoco.mj_forward(model, data)
        yield data


# --- GIF through MuJoCo's renderer ---


def _render_gif(backend, model, frames, path, dt):
    """Draw in another process, as MuJoCo binds to a GL library on import; say if it worked."""
    with tempfile.TemporaryDirectory() as folder:
        mujoco.mj_saveModel(model, f"{folder}/model.mjb")
        np.savez(f"{folder}/frames.npz", **frames)
        run = subprocess.run(
            [sys.executable, __file__, folder, str(path), str(dt)],
            env={**os.environ, "MUJOCO_GL": backend},
            capture_output=True,
            check=False,
        )
    return run.returncode == 0


def _draw_gif(folder, path, dt):
    from PIL import Image

    model = mujoco.MjModel.from_binary_path(f"{folder}/model.mjb")
    frames = dict(np.load(f"{folder}/frames.npz"))
    with mujoco.Renderer(model, height=SIZE[1], width=SIZE[0]) as renderer:
        images = []
        for data in _poses(model, frames):
            renderer.update_scene(data, 0 if model.ncam else -1)
            images.append(Image.fromarray(renderer.render()).quantize(64))
    write_gif(images, Path(path), float(dt))


# --- self-contained page ---


def write_html(model: mujoco.MjModel, frames: dict, path: Path, dt: float) -> Path:
    """Write the page: geoms, float32 poses [T, geoms, 7] (position, quaternion), script."""
    shown = [
        g
        for g in range(model.ngeom)
        if model.geom_group[g] < 3 and _colour(model, g)[3] > 0  # MuJoCo's default visibility
    ]
    geoms = [_geom(model, g) for g in shown]
    poses = np.array(
        [np.hstack([data.geom_xpos[shown], _quats(data, shown)]) for data in _poses(model, frames)]
    )
    scene = {
        "geoms": geoms,
        "poses": base64.b64encode(poses.astype("<f4").tobytes()).decode(),
        "dt": dt,
        "extent": float(model.stat.extent),
    }
    with whole(path) as file:
        file.write_text(PAGE.read_text().replace("SCENE", json.dumps(scene)))
    return path


def _colour(model, g):
    """As MuJoCo: the geom's if the model gives it one, else its material's, textures averaged."""
    material = model.geom_matid[g]
    if material < 0 or (model.geom_rgba[g] != UNCOLOURED).any():
        return model.geom_rgba[g]
    texture = model.mat_texid[material, mujoco.mjtTextureRole.mjTEXROLE_RGB]
    if texture < 0:
        return model.mat_rgba[material]
    channels, start = model.tex_nchannel[texture], model.tex_adr[texture]
    size = model.tex_height[texture] * model.tex_width[texture] * channels
    mean = model.tex_data[start : start + size].reshape(-1, channels).mean(0)[:3] / 255
    return model.mat_rgba[material] * [*mean, 1]


def _geom(model, g):
    kind = mujoco.mjtGeom(model.geom_type[g])
    name, size = kind.name.removeprefix("mjGEOM_").lower(), model.geom_size[g]
    centre = [0.0, 0.0, 0.0]
    if name not in ("plane", "sphere", "capsule", "cylinder", "ellipsoid", "box"):
        name, centre, size = "box", model.geom_aabb[g, :3].tolist(), model.geom_aabb[g, 3:]
    return {
        "type": name,
        "size": [round(float(x), 5) for x in size],
        "centre": centre,
        "rgb": [int(255 * x) for x in _colour(model, g)[:3]],
        "fixed": bool(model.geom_bodyid[g] == 0),
    }


def _quats(data, shown):
    quats = np.zeros((len(shown), 4))
    for i, g in enumerate(shown):
        mujoco.mju_mat2Quat(quats[i], data.geom_xmat[g])
    return quats


if __name__ == "__main__":
    _draw_gif(*sys.argv[1:])
