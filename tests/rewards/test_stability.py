"""What stands, what falls and by which angle, with closed forms; failures of meshes, simulations and processes."""

import math
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("mujoco")

import mujoco
import numpy as np

from tests.rewards.test_meshes import box, cone, l_shape, tilted
from visalign.rewards import tumble
from visalign.rewards.simulators import Simulators
from visalign.rewards.stability import SimulatorStability
from visalign.scoring import score as score_all
from visalign.types import Media, Prompt


def media(mesh):
    vertices, faces = mesh
    return Media("mesh", torch.from_numpy(vertices).float(), faces=torch.from_numpy(faces).long())


def scores(reward, meshes):
    return score_all({"stability": reward}, [media(mesh) for mesh in meshes], [Prompt("x")] * len(meshes), range(len(meshes)))["stability"]


@pytest.fixture(scope="module")
def reward():
    one = SimulatorStability("z", workers=1, timestep=5e-3)
    yield one
    one.close()


def test_the_angle_of_scenes_with_a_known_end(reward):
    """The L falls over onto the edge between the foot of its column and the end of its beam: atan(0.8 / 1.4) from the floor."""
    scenes = [(box(1, 1, 1), 0.0), (box(0.2, 0.2, 1), 0.0), (tilted(box(1, 1, 1), 30), 30.0), (tilted(box(0.2, 0.2, 1), 30), 60.0),
              (tilted(box(0.2, 0.2, 1), 5), 5.0), (l_shape(1.4), math.degrees(math.atan2(0.8, 1.4))), (l_shape(0.8), 45.0)]
    found = scores(reward, [mesh for mesh, _ in scenes])
    assert found.valid.all()
    torch.testing.assert_close(found.details["tilt"], torch.tensor([angle for _, angle in scenes]), atol=0.02, rtol=0)
    assert found.value.tolist() == [1, 1, 0, 0, 1, 0, 0]
    assert torch.equal(found.raw, found.value)


def test_a_cone_stands_on_its_base_and_falls_from_its_tip(reward):
    """Fallen, it lies on its flank: its axis rises from the floor by half the angle of its tip."""
    standing, inverted = cone(), tilted(cone(), 180)
    found = scores(reward, [standing, inverted])
    assert found.value.tolist() == [1, 0]
    assert found.details["tilt"][1] == pytest.approx(90 - math.degrees(math.atan2(0.5, 1)), abs=0.5)
    unpushed = tumble.rest(*grounded(inverted), num_steps=2000, timestep=5e-3)
    assert tumble.tilt(unpushed) < 1  # the balance of an exact symmetry, which the push is there to end


def grounded(mesh):
    vertices, faces = mesh
    return vertices - [0, 0, vertices[:, 2].min()], faces.astype(np.int32)


def test_yaw_is_no_tilt_and_both_quaternions_of_a_rotation_have_its_angle():
    half = math.radians(45)
    yaw = (math.cos(half), 0.0, 0.0, math.sin(half))
    assert (tumble.tilt(yaw), tumble.rotation_angle(yaw)) == (0.0, pytest.approx(90))
    q = np.array([-0.99, math.sqrt(1 - 0.99**2), 0, 0])
    assert tumble.rotation_angle(q) == tumble.rotation_angle(-q) == pytest.approx(16.219, abs=1e-3)
    rng = np.random.default_rng(0)
    for q in rng.normal(size=(20, 4)):
        w, x, y, _ = q / np.linalg.norm(q)
        assert tumble.tilt(q) == pytest.approx(math.degrees(math.acos(1 - 2 * (x * x + y * y))))
        assert tumble.rotation_angle(q) == pytest.approx(2 * math.degrees(math.acos(abs(w))))


def test_an_object_that_spins_on_the_spot_stands():
    model = tumble.scene(*grounded(box(1, 1, 0.2)), timestep=5e-3)
    data = mujoco.MjData(model)
    data.qvel[5] = 8.0
    mujoco.mj_step(model, data, nstep=400)
    assert tumble.rotation_angle(data.qpos[3:7]) > 30
    assert tumble.tilt(data.qpos[3:7]) < 0.5


def test_scores_are_functions_of_the_angle():
    quaternions = [(math.cos(math.radians(a / 2)), math.sin(math.radians(a / 2)), 0, 0) for a in (0, 5, 19.9, 20.1, 90)]
    expected = {"binary": [1, 1, 1, 0, 0], "linear": [1, 0.75, 0.005, 0, 0],
                "exponential": [math.exp(-angle / 20) for angle in (0, 5, 19.9, 20.1, 90)]}
    for shape, values in expected.items():
        found = SimulatorStability("z", shape=shape, workers=1)._scores(quaternions, [None] * 5)
        torch.testing.assert_close(found.value, torch.tensor(values, dtype=torch.float32), atol=1e-6, rtol=0)
    turned = [(math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5))]
    assert SimulatorStability("z", workers=1)._scores(turned, [None]).value.tolist() == [1]
    assert SimulatorStability("z", measure="rotation", workers=1)._scores(turned, [None]).value.tolist() == [0]


def test_the_verdict_does_not_depend_on_step_size_scale_or_orientation_of_faces():
    vertices, faces = tilted(l_shape(1.4), 3)
    reference = tumble.tilt(tumble.rest(*grounded((vertices, faces)), num_steps=10_000, timestep=1e-3))
    assert reference > 20
    for changed, timestep in (((vertices, faces), 1e-2), ((vertices, faces[:, ::-1].copy()), 5e-3), ((vertices * 3, faces), 5e-3)):
        angle = tumble.tilt(tumble.rest(*grounded(changed), num_steps=round(10 / timestep), timestep=timestep))
        assert angle == pytest.approx(reference, abs=0.5)


def test_a_surface_with_holes_is_judged(reward):
    vertices, faces = box(1, 1, 1)
    assert scores(reward, [(vertices, faces[2:])]).value.tolist() == [1]


def test_the_up_axis_decides_what_stands():
    tall = box(0.2, 1, 0.2)  # long along y
    leaning = (tilted(tall, 15)[0], tall[1])
    with_y, with_z = (SimulatorStability(up, workers=1, timestep=5e-3) for up in ("y", "z"))
    assert scores(with_y, [tall, leaning]).details["tilt"].tolist() == pytest.approx([0, 75], abs=0.05)
    assert scores(with_z, [tall, leaning]).details["tilt"].tolist() == pytest.approx([0, 15], abs=0.05)


def test_repeats_and_the_number_of_workers_change_no_bit(reward):
    meshes = [tilted(l_shape(1.4), 3), tilted(box(0.3, 0.5, 1), 12), cone()]
    first, again = scores(reward, meshes), scores(reward, meshes[::-1])
    both = scores(SimulatorStability("z", workers=2, timestep=5e-3), meshes)
    assert torch.equal(first.details["rotation"], again.details["rotation"].flip(0))
    assert torch.equal(first.details["rotation"], both.details["rotation"])


def test_meshes_nobody_can_judge_are_invalid_and_their_neighbours_are_not(reward, caplog):
    vertices, faces = box(1, 1, 1)
    broken = vertices.copy()
    broken[3, 1] = np.nan
    found = scores(reward, [(vertices, faces), (broken, faces), (vertices, faces[:0]), (vertices * [1, 1, 0], faces),
                            (vertices, faces + 4)])
    assert found.valid.tolist() == [True, False, False, False, False]
    assert found.reasons == (None, "nonfinite vertices", "empty mesh", "flat mesh", "faces without vertices")
    assert found.value[1:].isnan().all()
    assert "sample 3: flat mesh" in caplog.text


def test_what_a_simulation_cannot_tell_is_not_a_verdict():
    cube = grounded(box(1e12, 1e12, 1e12))
    with pytest.raises(tumble.SimulationError, match="lowest vertex"):
        tumble.rest(*cube, num_steps=1000, timestep=5e-3)
    with pytest.raises(tumble.SimulationError) as refused:
        tumble.rest(*grounded(box(1e-9, 1e-9, 1e-9)), num_steps=1)
    assert refused.value.reason == "refused by the simulator"
    model = tumble.scene(*grounded(box(1, 1, 1)), timestep=1e-3)
    assert model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)


WORKER = """
import json, os, sys, time
for line in sys.stdin.buffer:
    word = line.decode().strip()
    if word == "die":
        print("out of luck", file=sys.stderr, flush=True)
        os.abort()
    if word == "hang":
        time.sleep(600)
    print(json.dumps({"word": word, "process": os.getpid()}), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path / "worker.py"


def test_a_crash_and_a_hang_cost_their_own_request(script):
    workers = Simulators(script, workers=2, timeout=5)
    began = time.monotonic()
    answers = workers.ask([b"a\n", b"die\n", b"b\n", b"hang\n", b"c\n"])
    assert [answer.get("word") for answer in answers] == ["a", None, "b", None, "c"]
    assert answers[1] == {"failed": "crashed", "message": "exit status -6: out of luck"}
    assert answers[3] == {"failed": "timeout", "message": "no answer within 5 s"}
    assert time.monotonic() - began < 60
    workers.close()


def test_processes_are_kept_between_calls_and_start_again_after_close(script):
    workers = Simulators(script, workers=1, timeout=60)
    (first,), (second,) = workers.ask([b"a\n"]), workers.ask([b"b\n"])
    assert first["process"] == second["process"]
    workers.close()
    assert workers.ask([b"c\n"])[0]["process"] != first["process"]
    assert workers.ask([]) == []
    workers.close()


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"up 'w' is none of x, y, z; shape 'soft' .*threshold -1.*push 50.*workers 0"):
        SimulatorStability("w", shape="soft", threshold=-1, push=50, workers=0)
    with pytest.raises(ValueError, match=r"timestep 0\.5 s must be at most 0\.01"):
        SimulatorStability("y", timestep=0.5)
