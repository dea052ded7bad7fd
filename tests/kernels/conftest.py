"""The CUDA sources on the host, compiled once per session and specialisation."""

import pytest

from tests.kernels.host_engine import COMPILER, HostEngine


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return HostEngine(tmp_path_factory.mktemp("kernels"))
