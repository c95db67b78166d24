#!/usr/bin/env bash
# Everything that needs a CUDA device, in at most 15 minutes: tests, fast paths, and whole runs of ViT-B with random weights.
#   bash scripts/gpu.sh [FOLDER]      writes its output to FOLDER (default: build/gpu); PYTHON names the interpreter
# torch has to be a CUDA build; the rest is what scripts/setup.sh installs.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=${1:-build/gpu}
mkdir -p "$folder"
export PYTHONPATH=$PWD PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1
failed=0

run() { # NAME SECONDS COMMAND …
    local name=$1 limit=$2
    shift 2
    timeout "$limit" "$@" >"$folder/$name.txt" 2>"$folder/$name.log" || { failed=1; echo "$name: status $?"; }
    tail -n 12 "$folder/$name.txt"
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "torch finds no CUDA device"; exit 1; }
run device 60 "$python" -m flows.cli doctor
run tests 240 "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/fitting/test_viterbi_kernels.py
run paths 120 "$python" benchmarks/gpu_paths.py
run search 180 "$python" benchmarks/models.py --only vit_base_patch16_224 --preset fast --device cuda --no-onnx
run best 300 "$python" benchmarks/models.py --only vit_base_patch16_224 --preset best --device cuda --no-onnx
exit "$failed"
