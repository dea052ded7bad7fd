#!/usr/bin/env bash
# What only a machine with a GPU can prove, once, from a checkout with PyTorch installed: the kernels compile and load, their bits and gradients,
# no bad memory access and no race, their speed. Rows of results are appended to benchmarks/results/kernels.jsonl; commit them.
# Usage: scripts/gpu_checks.sh [--quick]        (about 10 minutes on one GPU of the data-centre kind; less with --quick)
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
quick=("$@")
python=$(command -v python || command -v python3)

echo "== device and compiler"
"$python" - <<'PY'
import torch
from visalign.kernels.backend import device_name, unavailable
device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
why = unavailable(device)
if why is not None:
    raise SystemExit(f"no kernels here: {why}")
print(device_name(device.index), "torch", torch.__version__)
PY

echo "== tests on the GPU"
"$python" -m pytest -m gpu tests/kernels/test_on_gpu.py -ra

if command -v compute-sanitizer >/dev/null; then
    few="noise_has_the_bits or wrappers_agree or paired_error_agrees or addresses or ((transition_log_prob_has or paired_error_has) and bfloat16)"
    # Every tensor is an allocation of its own: inside a block that PyTorch keeps for later, an access past a tensor's end is not seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck synccheck; do
        echo "== compute-sanitizer $tool"
        # cuda.bindings asks the driver for functions that an older one lacks, which memcheck would count as errors; ours raise in Python.
        options=(); [[ $tool == memcheck ]] && options=(--report-api-errors no)
        compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 1 --target-processes application-only \
            "$python" -m pytest -q -m gpu tests/kernels/test_on_gpu.py -k "$few" -p no:cacheprovider
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
    echo "== compute-sanitizer is not installed; memory accesses were not checked"
fi

echo "== benchmarks"
"$python" -m scripts.benchmark_kernels "${quick[@]}"
if "$python" -c 'import diffusers, peft, transformers' 2>/dev/null; then
    "$python" -m scripts.benchmark_iteration
else
    echo "diffusers is not installed: no end-to-end row"
fi
"$python" -m scripts.kernel_results
echo "done: docs/kernels.md shows the results"
