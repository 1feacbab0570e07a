#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: build, the whole test suite on CUDA, compute-sanitizer on a short
# selection, and the benchmarks. Results go to $OUT (build/gpu); commit $OUT/results.json under bench/results/.
#
# Uses .venv where there is one, else python3 with the torch that it has, and reaches for no package index.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-build/gpu}")
mkdir -p "$out"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu-check: torch sees no GPU here (python -c 'import torch; print(torch.cuda.is_available())')"
  exit 1
}
failed=0
step() { # name, command...
  local name=$1
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "   FAILED, see $name.log"; }
  tail -n 3 "$out/$name.log"
}

FASTCIFAR_HOST=1 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable . || exit 1
if command -v nvcc >/dev/null; then step cuda make cuda; fi # else Triton alone
step doctor "$python" -m fastcifar doctor
step selftest "$python" -m fastcifar selftest
step tests "$python" -m pytest -q tests

if command -v compute-sanitizer >/dev/null; then
  # Without torch's caching allocator, so that an access beyond a tensor is beyond an allocation.
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 66 \
      "$python" -m pytest -q tests/conformance.py -k "cuda and (small_sizes or subset_of_gradients)"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool-spectral" compute-sanitizer --tool "$tool" --error-exitcode 66 \
      "$python" -m pytest -q tests/test_triton_spectral.py -k "layouts or runs_of_images"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool-fixedpoint" compute-sanitizer --tool "$tool" --error-exitcode 66 \
      "$python" -m pytest -q tests/test_triton_fixedpoint.py -k "channels_last or several_tiles or range"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool-earlyexit" compute-sanitizer --tool "$tool" --error-exitcode 66 \
      "$python" -m pytest -q tests/test_triton_earlyexit.py -k "several_tiles or many_rows"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool-diffusion" compute-sanitizer --tool "$tool" --error-exitcode 66 \
      "$python" -m pytest -q tests/test_triton_diffusion.py -k "layouts or drawn or table"
  done
fi

step spectral "$python" bench/gpu_spectral.py "$out/spectral.json"
step fixedpoint "$python" bench/gpu_fixedpoint.py "$out/fixedpoint.json"
step diffusion "$python" bench/gpu_diffusion.py "$out/diffusion.json"
FASTCIFAR_BENCH_DEVICE=cuda step bench "$python" -m pytest bench --benchmark-json="$out/results.json"
[ "$failed" = 0 ] && echo "gpu-check: all passed; results in $out"
exit "$failed"
