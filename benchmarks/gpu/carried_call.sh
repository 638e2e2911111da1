#!/bin/sh
# One call on a borrowed GPU without network: first the kernels' tests on the device, then the benchmark. It takes about
# eight minutes. Run it in the repository's root. Arguments go to `python -m benchmarks.gpu`.
#   KIT    folder with unpack.sh and packs of vLLM, default .gpukit; nothing is unpacked where it has none
#   SITE   folder that the packs are unpacked to, default regrad-site at home
#   OUT    folder for the logs, default .
# Exit status 75: a pack is still to be carried.
set -eu
kit=${KIT:-.gpukit} site=${SITE:-$HOME/regrad-site} out=${OUT:-.}
if [ -f "$kit/unpack.sh" ]; then
    sh "$kit/unpack.sh" --need "$site" || exit 75
fi
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_USE_DEEP_GEMM=0 VLLM_NO_USAGE_STATS=1
python=${PYTHON:-python3}
# Wrong kernels are measured all the same, but the log says that they are wrong.
timeout 150 $python -m pytest -q --noconftest -p no:cacheprovider -o filterwarnings=default \
    tests/serve/kernels/test_device_layers.py tests/serve/kernels/test_device_tables.py \
    tests/serve/worker/test_cuda_device.py tests/serve/seams/test_cuda_wrapper.py >"$out/tests.log" 2>&1 || true
tail -n 15 "$out/tests.log"
timeout 330 $python -m benchmarks.gpu "$@" >"$out/bench.json" 2>"$out/bench.log" || true
grep -E '^\{"(kernels|decode|load|worker|encode)"' "$out/bench.log" || tail -n 40 "$out/bench.log"
tail -n 1 "$out/bench.json"
