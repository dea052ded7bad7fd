"""Inception v3 through torch-fidelity, on random weights in a file; the architecture is the published one."""

import pytest
import torch
from safetensors.torch import save_file

from visalign.rewards.encoders import as_encoder
from visalign.types import Media

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

from visalign.rewards.encoders.inception import InceptionEncoder  # noqa: E402 - skipped without the package


class Bare(fidelity.FeatureExtractorInceptionV3):
    """The extractor with the weights it was initialised with."""

    def load_state_dict(self, state_dict, *args, **kwargs):
        return None


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty") / "empty.pth"
    torch.save({}, empty)
    torch.manual_seed(0)
    return Bare("bare", ["2048"], str(empty))


@pytest.fixture(scope="module")
def weights(extractor, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(extractor.state_dict(), path)
    return path


def images(n, size=(24, 32)):
    generator = torch.Generator().manual_seed(1)
    return [Media("image", torch.randint(0, 256, (3, *size), generator=generator).to(torch.uint8)) for _ in range(n)]


def test_features_are_the_extractors_pool_of_uint8_images(extractor, weights):
    encoder = as_encoder({"encoder": "inception", "weights": str(weights)})
    media = [*images(2), *images(1, (40, 20))]
    rows = torch.cat(encoder.encode(media))
    assert rows.shape == (3, 2048)
    assert rows.dtype == torch.float64
    assert encoder.name == "inception"
    assert not encoder.model.training
    expected = torch.cat([extractor(one.data[None])[0] for one in media])
    torch.testing.assert_close(rows.float(), expected, atol=1e-6, rtol=1e-4)
    assert float((rows[0] - rows[2]).abs().max()) > 1e-4 * float(rows.abs().max())


def test_the_hash_follows_the_weights_and_safetensors_are_the_same(extractor, weights, tmp_path):
    encoder = InceptionEncoder(str(weights))
    save_file({name: tensor.contiguous() for name, tensor in extractor.state_dict().items()}, tmp_path / "same.safetensors")
    assert InceptionEncoder(str(tmp_path / "same.safetensors")).hash == encoder.hash
    moved = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
    moved["Conv2d_1a_3x3.conv.weight"] += 1e-3
    torch.save(moved, tmp_path / "moved.pth")
    assert InceptionEncoder(str(tmp_path / "moved.pth")).hash != encoder.hash


def test_nothing_is_downloaded_and_nothing_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download was tried"))
    with pytest.raises(ValueError, match="nothing is downloaded for you, get https://"):
        InceptionEncoder(str(tmp_path / "missing.pth"))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pth")
    with pytest.raises(ValueError, match="could run code"):
        InceptionEncoder(str(tmp_path / "code.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights of torch-fidelity's Inception v3"):
        InceptionEncoder(str(tmp_path / "other.pth"))
