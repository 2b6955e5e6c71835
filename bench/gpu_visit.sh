#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a machine with a GPU, from the repository root, the libraries built: tests, then timings, then
# the memory checkers. Results go to $OUT (default: build/gpu). Each part has its own time limit.
#
#   bench/gpu_visit.sh [test] [triton] [time] [sanitize]     (all four where none is named)
set -uo pipefail
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
OUT=${OUT:-build/gpu}
mkdir -p "$OUT"
PARTS=${*:-test triton time sanitize}
PYTEST="python3 -m pytest -p no:cacheprovider -q --no-header"
status=0

for part in $PARTS; do
  case $part in
    test)
      timeout 300 $PYTEST tests/test_cuda.py tests/test_cuda_numbers.py -n 8 --dist worksteal --maxfail 40 --durations 12 --tb short \
        >"$OUT/tests.log" 2>&1 || status=1
      grep -E "^(FAILED|ERROR)|passed|failed|error" "$OUT/tests.log" | cut -c1-220 | tail -n 45
      ;;
    triton)
      timeout 300 $PYTEST tests/test_triton.py tests/test_triton_room.py -m gpu -n 15 --dist worksteal --maxfail 40 \
        --durations 12 --tb short >"$OUT/triton.log" 2>&1 || status=1
      grep -E "^(FAILED|ERROR)|passed|failed|error" "$OUT/triton.log" | cut -c1-220 | tail -n 45
      ;;
    time)
      timeout 200 python3 bench/quantize.py --device cuda --save "$OUT/quantize.json" \
        --sweep "$OUT/sweep.json" 2>&1 | tee "$OUT/quantize.log" || status=1
      ;;
    sanitize)
      for tool in memcheck racecheck initcheck; do
        # Racecheck does not follow rings: see tests/test_matmul_sanitize.py.
        which="sanitizers" && [ $tool = racecheck ] && which="sanitizers and not rings"
        timeout 150 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
          $PYTEST tests/test_cuda.py tests/test_matmul_sanitize.py -m gpu -k "$which" \
          >"$OUT/$tool.log" 2>&1 || touch "$OUT/$tool.failed" &
      done
      wait
      for tool in memcheck racecheck initcheck; do
        [ -e "$OUT/$tool.failed" ] && status=1
        echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$tool.log" | tail -n 1)" \
          "$(grep -E '[0-9]+ (passed|failed)' "$OUT/$tool.log" | tail -n 1)"
      done
      ;;
  esac
done
exit $status
