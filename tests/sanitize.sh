#!/usr/bin/env bash
# Builds the extension and the raw kernels with a sanitizer and runs the tests that reach every kernel under it.
#
#   tests/sanitize.sh address    address and undefined-behaviour sanitizer
#   tests/sanitize.sh thread     thread sanitizer
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1
python=$PWD/${VENV:-.venv}/bin/python
lib=$PWD/build/sanitize-$kind

FASTCIFAR_SANITIZE=$kind FASTCIFAR_HOST=1 "$python" setup.py --quiet \
  build --build-base "$lib/base" --build-lib "$lib/lib" >/dev/null

case $kind in
  address)
    # libstdc++ goes in with the sanitizer, or it is not there when torch throws its first exception.
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
cd "$lib"
export PYTHONPATH=$lib/lib FASTCIFAR_EXPECT=$lib/lib
LD_PRELOAD=$preload "$python" -c 'import fastcifar, os; assert fastcifar.__file__.startswith(os.environ["FASTCIFAR_EXPECT"])'
root=$OLDPWD tests=$OLDPWD/tests
run() {
  LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" "$@" ||
    { status=$?; head -n 60 "$lib"/report.* 2>/dev/null; exit $status; }  # pytest has captured what went to stderr
}
run "$tests"/test_{host,spiking,neurons,surrogates,spectral,fixedpoint,fixed_products,earlyexit,tree_kernels}.py \
  -k "${SELECT:-not inductor and not spikingjelly and not snntorch and not peer and not environment}"
# Of the matrix what reaches a kernel in another way than these do: threads, empty and single sizes, NaN and infinity.
run "$tests/conformance.py" -k "threads or thread_count or small or infinity"
