"""The CUDA sources on the host, compiled once per session and specialisation."""

import pytest
import torch

from tests.kernels.host_engine import COMPILER, HostEngine
from visalign.kernels import backend, guided_step, paired_error, transition_log_prob


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return HostEngine(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels_on_cpu(engine, monkeypatch):
    """CPU tensors take the CUDA backend: the registered operators run the CUDA sources on the host, through wrappers and autograd as on a
    device. Gives the list of kernels that were launched."""
    launched = []

    class Noting:
        resident_blocks = engine.resident_blocks

        def launch(self, source, kernel, *rest):
            launched.append(kernel)
            engine.launch(source, kernel, *rest)

    library = torch.library.Library("visalign", "IMPL")
    for module in (guided_step, paired_error, transition_log_prob):
        monkeypatch.setattr(module, "engine_of", lambda device: Noting())
    for name, function in (("guided_step", guided_step._cuda), ("transition_log_prob", transition_log_prob._cuda),
                           ("transition_log_prob_backward", transition_log_prob._backward_cuda), ("paired_error", paired_error._cuda),
                           ("paired_error_backward", paired_error._backward_cuda)):
        library.impl(name, function, "CPU", allow_override=True)
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, "device_name", lambda index: "the host")
    backend._say.cache_clear()
    yield launched
    library._destroy()
    backend._say.cache_clear()
