#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with a driver, PyTorch and, best, nvcc: builds the kernels, runs their tests
# plainly and under compute-sanitizer, measures them, and runs TensorRT for RTX if it is installed.
#
#     benchmarks/gpu_check.sh results
#
# A step that fails or takes too long stops no other one. Writes logs, JSON and summary.json to the folder given, and ends
# with 0 if no step failed. Under 9 minutes. PYTHON names the interpreter; RECONTRAST_PLAN plans (a:b) that were built
# elsewhere, with their models beside them.
set -uo pipefail

out=${1:?usage: $0 FOLDER}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/train:$PWD/export${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XDG_CACHE_HOME="$out/cache"
fatbin=recontrast_edge/kernels/kernels.fatbin
steps=()

# step NAME SECONDS COMMAND...: 77 means that something it needs is not there.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    echo "== $name"
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    case $code in
        0) status=passed ;;
        77) status=skipped ;;
        124 | 137) status=timeout ;;
        *) status=failed ;;
    esac
    [ $status = passed ] || tail -n 15 "$out/$name.log"
    echo "-- $name: $status in $((SECONDS - start)) s"
    steps+=("{\"step\": \"$name\", \"status\": \"$status\", \"exit_code\": $code, \"seconds\": $((SECONDS - start))}")
}

machine() {
    nvidia-smi || return 77
    nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,MEMORY
    "$python" -c 'import sys, platform; print(sys.version, platform.platform())'
    "$python" -m pip list 2>/dev/null | grep -i -E 'cuda|torch|cupy|tensorrt|numpy|scipy|onnx|pydantic|pytest' || true
    nvcc --version || true
}

build() {
    command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null || return 77
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return 1
    nvcc -std=c++17 -fatbin -arch="sm_$arch" --resource-usage -o "$fatbin" recontrast_edge/kernels/kernels.cu
}

# pytest ends with 5 when it found no test, and with 0 when all were skipped, which is no pass here.
tests() {
    "$python" -m pytest -p no:cacheprovider -q -s "$@" 2>&1 | tee "$out/pytest.tmp"
    local code=${PIPESTATUS[0]}
    if [ "$code" -eq 5 ] || { [ "$code" -eq 0 ] && ! grep -q -E '[0-9]+ passed' "$out/pytest.tmp"; }; then code=77; fi
    rm -f "$out/pytest.tmp"
    return "$code"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || return 77
    local tool=$1
    # Few blocks are enough: the sanitizer slows every access down.
    compute-sanitizer --target-processes all --tool "$tool" --error-exitcode 99 \
        "$python" -m pytest -p no:cacheprovider -q tests/gpu/test_kernels.py \
        -k 'geometry_of_a_real_model or same_bits or leaves_nothing_behind or less_aligned or word_loads or ties or 37-45'
}

rtx() {
    nvidia-smi >/dev/null && "$python" -c 'import tensorrt_rtx' || return 77
    local plans=${RECONTRAST_PLAN:-}
    if [ -z "$plans" ]; then
        "$python" -m recontrast_edge build recontrast_edge/models/demo.onnx --out "$out/demo.plan" --flavor tensorrt-rtx \
            --precision fp16 --batch 1,1,16 || return 1
        cp recontrast_edge/models/demo.onnx "$out/"
        plans=$out/demo.plan
    fi
    local plan failed=0
    for plan in ${plans//:/ }; do
        "$python" -m recontrast_edge bench --engine "$plan" --frames 2000 --warmup 200 --batch 1,4,16 --line-rate 200 \
            --json "$out/bench-$(basename "$plan").json" --plot "$out/bench-$(basename "$plan").png" || failed=1
    done
    return $failed
}

export -f machine build tests sanitize rtx
export python out fatbin

step machine 20 bash -c machine
step build 40 bash -c build
step kernel-tests 80 bash -c 'tests tests/gpu/test_kernels.py'
step kernel-benchmark 150 "$python" benchmarks/kernel.py --json "$out/kernel.json" --dtypes float16
step memcheck 60 bash -c 'sanitize memcheck'
step racecheck 60 bash -c 'sanitize racecheck'
step engine-tests 60 bash -c 'tests tests/gpu/test_engine.py'
step rtx 60 bash -c rtx

(IFS=,; printf '[%s]\n' "${steps[*]}") >"$out/summary.json"
rm -rf "$out/cache"
cat "$out/summary.json"
! grep -q -E '"status": "(failed|timeout)"' "$out/summary.json"
