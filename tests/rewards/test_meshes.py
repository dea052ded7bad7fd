"""Generated surfaces become rigid bodies: clean, upright by a rotation, standing on the floor; or they are refused with a reason."""

import numpy as np
import pytest
import torch

from visalign.media import load_media, save_media
from visalign.rewards.meshes import TO_Z_UP, InvalidMeshError, rigid_body
from visalign.types import Media


def box(a, b, c):
    """A box around the origin with outward faces."""
    corners = np.array([[x, y, z] for x in (-a / 2, a / 2) for y in (-b / 2, b / 2) for z in (-c / 2, c / 2)])
    faces = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
             [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
    return corners, np.array(faces)


def tilted(mesh, degrees):
    """The mesh turned about the x axis."""
    t = np.radians(degrees)
    return mesh[0] @ np.array([[1, 0, 0], [0, np.cos(t), -np.sin(t)], [0, np.sin(t), np.cos(t)]]).T, mesh[1]


def l_shape(length):
    """A column 0.2 x 0.2 x 1 with a beam of that length and height 0.2 from its top, as two closed boxes."""
    column, faces = box(0.2, 0.2, 1)
    beam = box(length, 0.2, 0.2)[0] + [length / 2 + 0.1, 0, 0.4]
    return np.concatenate([column, beam]), np.concatenate([faces, faces + 8])


def cone(sides=48):
    """Base radius 0.5 on z = 0, tip at z = 1."""
    angle = np.arange(sides) * 2 * np.pi / sides
    rim = np.stack([0.5 * np.cos(angle), 0.5 * np.sin(angle), np.zeros(sides)], axis=1)
    following = (np.arange(sides) + 1) % sides
    faces = [[i, j, sides] for i, j in enumerate(following)] + [[j, i, sides + 1] for i, j in enumerate(following)]
    return np.concatenate([rim, [[0, 0, 1], [0, 0, 0]]]), np.array(faces)


def volume(vertices, faces):
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return float((np.cross(a, b) * c).sum() / 6)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_the_up_axis_is_turned_not_mirrored(axis):
    """A swap of two axes has determinant -1 and turns the volume negative."""
    turn = TO_Z_UP[axis]
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=0)
    assert np.linalg.det(turn) == pytest.approx(1)
    assert (turn @ np.eye(3)["xyz".index(axis)]).tolist() == [0, 0, 1]
    vertices, faces = rigid_body(*l_shape(1.0), up=axis, size=None)
    assert volume(vertices, faces) == pytest.approx(volume(*l_shape(1.0)))
    assert volume(vertices, faces) > 0


def test_it_stands_on_the_floor_around_the_origin_at_the_size_asked_for():
    vertices, _ = rigid_body(tilted(box(2, 4, 8), 20)[0] + [5, -7, 11], box(1, 1, 1)[1], up="z", size=1.0)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    assert low[2] == 0
    np.testing.assert_allclose(low[:2], -high[:2], atol=1e-12)
    assert (high - low).max() == pytest.approx(1)
    metres, _ = rigid_body(*box(2, 4, 8), up="y", size=None)
    np.testing.assert_allclose(np.ptp(metres, axis=0), [2, 8, 4])


def test_triangle_soup_becomes_the_surface_it_describes():
    """Every face with vertices of its own, all faces twice (once inside out), a needle, and a far vertex that no face uses."""
    vertices, faces = box(1, 1, 1)
    soup = vertices[faces].reshape(-1, 3)
    own = np.arange(len(soup)).reshape(-1, 3)
    far = [[0, 0, 9], [0.1, 0, 0]]
    rows = np.concatenate([own, own[:, ::-1], [[0, 1, 0], [2, 2, 2]]])
    clean, corners = rigid_body(np.concatenate([soup, far]), rows, up="z", size=None)
    assert (len(clean), len(corners)) == (8, 12)
    assert volume(clean, corners) == pytest.approx(1)
    assert clean[:, 2].max() == pytest.approx(1)


def test_a_face_without_area_holds_nothing_up():
    """Its vertices are its own, far above: with them the hull would be a mast."""
    vertices, faces = box(1, 1, 1)
    mast = [[0, 0, 5], [0, 0, 6], [0, 0, 7]]
    clean, corners = rigid_body(np.concatenate([vertices, mast]), np.concatenate([faces, [[8, 9, 10]]]), up="z", size=None)
    assert (len(clean), len(corners)) == (8, 12)
    assert clean[:, 2].max() == pytest.approx(1)


def test_small_parts_survive_in_any_unit():
    for unit in (1e-6, 1.0, 1e6):
        vertices, faces = l_shape(1.4)
        clean, corners = rigid_body(vertices * unit, faces, up="z", size=1.0)
        assert len(corners) == 24
        np.testing.assert_allclose(np.ptp(clean, axis=0), np.array([1.6, 0.2, 1.0]) / 1.6, atol=1e-6)


@pytest.mark.parametrize(("vertices", "faces", "reason"), [
    (np.zeros((0, 3)), np.zeros((0, 3), dtype=int), "empty mesh"),
    (box(1, 1, 1)[0], np.zeros((0, 3), dtype=int), "empty mesh"),
    (box(1, 1, 1)[0], box(1, 1, 1)[1] + 1, "faces without vertices"),
    (box(1, 1, 1)[0], box(1, 1, 1)[1] - 1, "faces without vertices"),
    (np.where(np.arange(24).reshape(8, 3) == 7, np.inf, box(1, 1, 1)[0]), box(1, 1, 1)[1], "nonfinite vertices"),
    (np.where(np.arange(24).reshape(8, 3) == 7, np.nan, box(1, 1, 1)[0]), box(1, 1, 1)[1], "nonfinite vertices"),
    (np.ones((8, 3)), box(1, 1, 1)[1], "flat mesh"),
    (box(1, 1, 0)[0], box(1, 1, 1)[1], "flat mesh"),
    (tilted(box(1, 1, 1e-7), 33)[0], box(1, 1, 1)[1], "flat mesh"),
    (box(1, 0, 0)[0], box(1, 1, 1)[1], "flat mesh"),
])
def test_what_is_no_surface_of_a_body_has_a_reason(vertices, faces, reason):
    with pytest.raises(InvalidMeshError, match=f"^{reason}$"):
        rigid_body(vertices, faces, up="y", size=1.0)


def test_an_unused_vertex_that_is_not_finite_harms_nobody():
    vertices, faces = box(1, 1, 1)
    clean, _ = rigid_body(np.concatenate([vertices, [[np.nan] * 3]]), faces, up="z", size=None)
    assert len(clean) == 8


@pytest.mark.parametrize("suffix", ["obj", "ply", "glb", "stl"])
def test_every_file_format_holds_the_same_body(tmp_path, suffix):
    trimesh = pytest.importorskip("trimesh")
    vertices, faces = l_shape(1.4)
    if suffix == "obj":
        path = save_media(Media("mesh", torch.from_numpy(vertices).float(), faces=torch.from_numpy(faces)), tmp_path / "l")
    else:
        path = tmp_path / f"l.{suffix}"
        trimesh.Trimesh(vertices, faces, process=False).export(path)
    read = load_media(path)
    assert (read.kind, read.data.dtype, read.faces.dtype) == ("mesh", torch.float32, torch.int64)
    clean, corners = rigid_body(read.data.numpy(), read.faces.numpy(), up="z", size=None)
    assert (len(clean), len(corners)) == (14, 24)  # the beam touches the column in two corners
    assert volume(clean, corners) == pytest.approx(volume(vertices, faces), rel=1e-5)


def test_the_parts_of_a_scene_are_read_where_they_stand(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    scene, moved = trimesh.Scene(), np.eye(4)
    moved[:3, 3] = [5, 0, 0]
    scene.add_geometry(trimesh.Trimesh(*box(1, 2, 3)))
    scene.add_geometry(trimesh.Trimesh(*box(1, 2, 3)), transform=moved)
    scene.export(tmp_path / "two.glb")
    read = load_media(tmp_path / "two.glb").data
    assert (read.amax(0) - read.amin(0)).tolist() == [6, 2, 3]


@pytest.mark.parametrize(("name", "content"), [("a.ply", b"no"), ("a.glb", b"glTFxxxx"), ("a.glb", b""), ("a.stl", b"zz" * 50)])
def test_a_file_without_a_mesh_is_named(tmp_path, name, content):
    pytest.importorskip("trimesh")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: not a readable mesh file"):
        load_media(tmp_path / name)
