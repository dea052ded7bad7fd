"""Let one rigid mesh go on a floor in MuJoCo and see where it comes to rest; run as a script, a worker that does so on request.

The worker reads requests from its standard input, a JSON line with ``vertices``, ``faces`` (their numbers), ``num_steps``,
``timestep`` and ``push``, followed by the arrays, and answers each with a JSON line: ``{"quaternion": [w, x, y, z]}`` or
``{"failed": reason, "message": what MuJoCo says}``. NumPy and MuJoCo are all it imports.

Contacts of a mesh with a floor are those of its convex hull, exactly. Mass and inertia are those of a thin shell of the mesh's
faces, which need no closed and no consistently oriented surface. Everything is deterministic: the work is a number of steps.

Source: Direct Simulation Optimization, arXiv:2503.22677.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import mujoco
import numpy as np
from numpy.typing import NDArray

SIMULATOR = f"mujoco{mujoco.__version__}"
_GAP = 1e-4            # metres between floor and object at the start: no penetration to be repelled from
_PUSH_AXIS = (math.cos(1.0), math.sin(1.0))  # horizontal, along no axis and no diagonal of a mesh
_ON_FLOOR = 0.05       # how far the lowest vertex may end from the floor, in sizes of the object, or in metres for large ones


class SimulationError(ValueError):
    """The simulation says nothing about the mesh: ``reason`` is short, the message is MuJoCo's where it has one."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


def scene(vertices: NDArray[np.float64], faces: NDArray[np.int32], timestep: float) -> Any:
    """``mujoco.MjModel`` of the mesh, lowest vertex at z = 0 in its own coordinates, free above an infinite floor.

    Raises:
        SimulationError: MuJoCo finds no hull or no mass in the mesh.
    """
    spec = mujoco.MjSpec()
    spec.option.timestep = timestep
    # A diverging simulation restarts itself by default, and would end upright.
    spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    mesh = spec.add_mesh(name="object", uservert=vertices.ravel().tolist(), userface=faces.ravel().tolist())
    mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0.0, 0.0, 0.05])
    body = spec.worldbody.add_body(name="object", pos=[0.0, 0.0, _GAP])
    body.add_freejoint()
    body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="object")
    try:
        return spec.compile()
    except ValueError as error:
        raise SimulationError("refused by the simulator", " ".join(str(error).split())) from error


def rest(vertices: NDArray[np.float64], faces: NDArray[np.int32], *, num_steps: int, timestep: float = 1e-3,
         push: float = 0.0) -> NDArray[np.float64]:
    """Orientation (w, x, y, z), float64 (4,), relative to the start after ``num_steps`` steps of ``timestep`` seconds.

    Args:
        vertices, faces: (V, 3) in metres, z up, standing on z = 0; (F, 3).
        push: speed in degrees per second at which the object starts to tip: what stands on its tip by symmetry alone falls.
    Raises:
        SimulationError: the mesh was refused, the state became non-finite, or the object did not end on the floor.
    """
    model = scene(vertices, faces, timestep)
    data = mujoco.MjData(model)
    data.qvel[3:5] = math.radians(push) * np.array(_PUSH_AXIS)
    mujoco.mj_step(model, data, nstep=num_steps)
    troubles = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
    if not np.isfinite(data.qpos).all() or any(data.warning[int(kind)].number for kind in troubles):
        raise SimulationError("diverged")
    mujoco.mj_kinematics(model, data)
    rotation, position = data.body("object").xmat.reshape(3, 3), data.body("object").xpos
    lowest = float((vertices @ rotation[2]).min() + position[2])
    if abs(lowest) > _ON_FLOOR * min(1.0, float(np.ptp(vertices, axis=0).max())):
        raise SimulationError("not on the floor", f"lowest vertex at {lowest:.3g} m")
    return np.array(data.qpos[3:7])


def tilt(quaternion: Sequence[float] | NDArray[np.floating]) -> float:
    """Degrees in [0, 180] between the object's upright direction before and after: ``arccos(1 - 2 (x^2 + y^2))``, blind to yaw."""
    w, x, y, z = quaternion
    return math.degrees(2 * math.atan2(math.hypot(x, y), math.hypot(w, z)))


def rotation_angle(quaternion: Sequence[float] | NDArray[np.floating]) -> float:
    """Degrees in [0, 180] of the whole rotation, ``2 arccos |w|``: q and -q are one rotation."""
    w, x, y, z = quaternion
    return math.degrees(2 * math.atan2(math.hypot(x, y, z), abs(w)))


def request(vertices: NDArray[np.float64], faces: NDArray[np.int32], *, num_steps: int, timestep: float, push: float) -> bytes:
    """What to write to a worker."""
    header = {"vertices": len(vertices), "faces": len(faces), "num_steps": num_steps, "timestep": timestep, "push": push}
    return json.dumps(header).encode() + b"\n" + vertices.astype("<f8").tobytes() + faces.astype("<i4").tobytes()


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until they end."""
    while line := requests.readline():
        header = json.loads(line)
        vertices = np.frombuffer(requests.read(24 * header["vertices"]), dtype="<f8").reshape(-1, 3)
        faces = np.frombuffer(requests.read(12 * header["faces"]), dtype="<i4").reshape(-1, 3)
        try:
            settled = rest(vertices, faces, num_steps=header["num_steps"], timestep=header["timestep"], push=header["push"])
            answer: dict[str, Any] = {"quaternion": settled.tolist()}
        except SimulationError as error:
            answer = {"failed": error.reason, "message": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as own:
        os.dup2(2, 1)  # whatever a library prints must not pass for an answer
        serve(sys.stdin.buffer, own)
