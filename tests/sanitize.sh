#!/usr/bin/env bash
# Builds the extension and the raw kernels with a sanitizer and runs the test suite with it.
#
#   tests/sanitize.sh address    address and undefined-behaviour sanitizer
#   tests/sanitize.sh thread     thread sanitizer
#
# TESTS="tests/test_tree.py -k thread" runs these only.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
python=$PWD/${VENV:-.venv}/bin/python
lib=$PWD/build/sanitize-$kind

FASTCIFAR_SANITIZE=$kind FASTCIFAR_HOST=1 "$python" setup.py --quiet \
  build --build-base "$lib/base" --build-lib "$lib/lib" >/dev/null

case $kind in
  address)
    # libstdc++ goes in with the sanitizer, or it is not there when torch throws its first exception. Leaks: Python and
    # torch leak at exit by design, and that ours do not is what make fuzz watches.
    preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    export ASAN_OPTIONS=detect_leaks=0,protect_shadow_gap=0,log_path=$lib/report
    export UBSAN_OPTIONS=print_stacktrace=1,halt_on_error=1,log_path=$lib/report
    ;;
  thread)
    preload=$(g++ -print-file-name=libtsan.so)
    # Only our code is instrumented; what torch's own thread pool does between its threads cannot be judged.
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1,halt_on_error=1,exitcode=66,log_path=$lib/report
    ;;
esac

# From the sanitized copy, not from the editable install: PYTHONPATH comes first.
root=$PWD
rm -f "$lib"/report.*
ln -sfn "$root/examples" "$lib/lib/examples"  # the images that tests read beside the package
cd "$lib"
export PYTHONPATH=$lib/lib FASTCIFAR_EXPECT=$lib/lib OMP_WAIT_POLICY=passive
LD_PRELOAD=$preload "$python" -c 'import fastcifar, os; assert fastcifar.__file__.startswith(os.environ["FASTCIFAR_EXPECT"])'

skipped=(
  test_triton.py test_triton_diffusion.py test_triton_earlyexit.py   # Triton's interpreter: Python, none of our C++
  test_triton_fixedpoint.py test_triton_spectral.py test_triton_edges.py
  test_package.py test_distribution.py test_instructions.py          # start other Pythons, builds and valgrind
  test_ap_fixed.py test_hls.py test_cuda_body.py                     # compile C++ of their own, without the sanitizer
  test_docs.py test_diffusion_examples.py test_fuzz.py               # start other Pythons
  test_data.py test_found_schedules.py                               # none of our C++
)
ignore=()
for name in "${skipped[@]}"; do ignore+=("--ignore=$root/tests/$name"); done
# By name: what inductor compiles is not instrumented; the others start processes of their own.
words="not inductor and not aoti and not ddp and not fsdp and not environment and not dask and not processes"
words="$words and not examples_run"
# The thread sanitizer ends a process that starts threads after a fork, by design; the matrix has no threads of its own.
if [ "$kind" = thread ]; then words="$words and not ecosystem and not data_loader"; fi

status=0
# shellcheck disable=SC2086
LD_PRELOAD=$preload "$python" -m pytest -q -n "${JOBS:-2}" -p no:cacheprovider -c "$root/pyproject.toml" \
  --rootdir "$root" ${TESTS:-"$root/tests" "${ignore[@]}" -k "$words"} || status=$?
# pytest has captured what went to stderr, and a test that expects an error may have swallowed a report.
for report in "$lib"/report.*; do
  if [ -e "$report" ]; then head -n 60 "$report"; status=1; fi
done
exit $status
