"""Seeds are stable, order-sensitive and spread out."""

import subprocess
import sys

import pytest

from visalign.maths.seeds import derive_seed


@pytest.mark.parametrize(("values", "seed"), [
    ((0,), 6017775124710473527), ((0, 0, 0), 7343608927378593866), ((42, 7, 123456), 538320104647627624), ((-1,), 1651719646750529848),
])
def test_pinned_values(values, seed):
    """Changing these changes every run's samples: it needs a migration note."""
    assert derive_seed(*values) == seed


def test_splitmix64_reference_output():
    """First output of the public generator seeded with 0 is 0xE220A8397B1DCDAF."""
    from visalign.maths.seeds import _splitmix64

    assert _splitmix64(0) == 0xE220A8397B1DCDAF


def test_order_length_and_every_value_count():
    seeds = {derive_seed(*values) for values in [(1, 2), (2, 1), (1,), (1, 0), (0, 1), (2,), (1, 2, 0), (-1, 2)]}
    assert len(seeds) == 8


def test_no_collisions_and_balanced_bits():
    seeds = [derive_seed(0, iteration, sample) for iteration in range(100) for sample in range(100)]
    assert len(set(seeds)) == 10_000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    for bit in range(63):
        # A fair bit has a standard deviation of 50.
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 5000) < 250


def test_the_same_in_another_process_with_another_hash_seed():
    code = "from visalign.maths.seeds import derive_seed; print(derive_seed(3, 1, 4))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7",
                         "PYTHONPATH": ":".join(path for path in sys.path if path) or "."})
    assert int(out.stdout) == derive_seed(3, 1, 4)


def test_refusals():
    with pytest.raises(ValueError, match="at least one"):
        derive_seed()
    with pytest.raises(ValueError, match="64-bit"):
        derive_seed(1 << 64)
