"""A generated mesh as the surface of one rigid body, or the reason why it is none. NumPy only.

What a simulator sees is the convex hull of the vertices and the area of the faces, so both must be honest: vertices that no face
uses are dropped (they would hold the hull up like invisible legs), and so are doubled faces (they would weigh twice). Holes, loose
parts and inside-out faces are kept: a shell has a mass and a hull without being closed, and all its parts move as one body.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["x", "y", "z"]

# Rotations (determinant +1) that turn the axis upwards; exchanging two axes would mirror the object.
TO_Z_UP: dict[Axis, NDArray[np.float64]] = {
    "x": np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    "y": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]),
    "z": np.eye(3),
}
_MERGE = 1e-6      # vertices closer than this, in sizes of the object, are one
_THICKNESS = 1e-5  # a body thinner than this, in sizes of the object, has no inside


class InvalidMeshError(ValueError):
    """The mesh is not the surface of a body; ``str(error)`` is the reason a sample is invalid for."""


def rigid_body(vertices: NDArray[np.floating], faces: NDArray[np.integer], *, up: Axis,
               size: float | None) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Vertices in metres with z up, standing on z = 0 around the origin, and the faces between them.

    Args:
        vertices: (V, 3) in any unit.
        faces: (F, 3) rows of ``vertices``.
        up: the axis of the mesh that points up.
        size: length of the longest side of the upright bounding box in metres; ``None`` where the unit of ``vertices`` is metres.
    Returns:
        Float64 (V', 3) and int32 (F', 3): equal vertices merged; faces without area, doubled faces and unused vertices dropped.
    Raises:
        InvalidMeshError: no faces, a face without its vertices, NaN or infinite vertices, or everything lies in one plane.
    """
    if not len(vertices) or not len(faces):
        raise InvalidMeshError("empty mesh")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise InvalidMeshError("faces without vertices")
    points = vertices.astype(np.float64)[np.unique(faces)]
    if not np.isfinite(points).all():
        raise InvalidMeshError("nonfinite vertices")
    extent = np.ptp(points, axis=0).max()
    if not extent > 0 or not np.isfinite(extent):
        raise InvalidMeshError("flat mesh")

    merged, corners = _merge(vertices.astype(np.float64), faces, _MERGE * extent)
    kept = _distinct(corners[_areas(merged, corners) > (_MERGE * extent) ** 2])
    if not len(kept):
        raise InvalidMeshError("flat mesh")
    used, corners = np.unique(kept, return_inverse=True)
    points = merged[used] @ TO_Z_UP[up].T
    if np.linalg.svd(points - points.mean(axis=0), compute_uv=False)[-1] / np.sqrt(len(points)) < _THICKNESS * extent:
        raise InvalidMeshError("flat mesh")

    low, high = points.min(axis=0), points.max(axis=0)
    points = points - [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]]
    if size is not None:
        points = points * (size / (high - low).max())
    return points, corners.reshape(-1, 3).astype(np.int32)


def _merge(vertices: NDArray[np.float64], faces: NDArray[np.integer], tolerance: float) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """One vertex per cell of a grid of side ``tolerance``, the first in it, and the faces renumbered."""
    used, corners = np.unique(faces, return_inverse=True)
    points = vertices[used]
    cells = np.round((points - points.min(axis=0)) / tolerance).astype(np.int64)
    _, first, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    return points[first], cell.reshape(-1)[corners.reshape(-1, 3)]


def _areas(points: NDArray[np.float64], corners: NDArray[np.intp]) -> NDArray[np.float64]:
    a, b, c = (points[corners[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def _distinct(corners: NDArray[np.intp]) -> NDArray[np.intp]:
    """Faces with different vertices, in their order; the first of those that share all three stays."""
    _, first = np.unique(np.sort(corners, axis=1), axis=0, return_index=True)
    return corners[np.sort(first)]
