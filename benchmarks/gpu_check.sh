#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with a driver, PyTorch and, best, nvcc, the most wanted first:
#
#   kernels   build them, their tests, compute-sanitizer, time and bandwidth beside PyTorch and CuPy
#   engines   TensorRT for RTX, if it is there: does it run on this GPU, tests, FP16 and INT8 against the model, latency
#   training  images a second and memory of ResNet-18 and WideResNet50-2
#
#     benchmarks/gpu_check.sh results                  # all, half an hour at most
#     benchmarks/gpu_check.sh results kernels engines  # some
#
# A step that fails or takes too long stops no other one, and what a step found is in the folder when it ends: log.txt,
# summary.json, kernel*.json and, with everything else, results.tar.gz. Ends with 0 if no step failed.
#
# PYTHON     interpreter, default python3
# LIMIT_S    stop after so many seconds; the steps that are left then are recorded as not reached
# WHEELS     folder of wheels to install for this check alone, for machines without a network. NAME.whl.00, .01 ... are
#            parts of one, as `split -d` makes them; they may come in several calls
# SCRATCH    folder for what later calls go on with, default /tmp/recontrast-gpu-check
# COMMIT     what is being checked, where the folder is no git checkout
set -uo pipefail

usage="usage: $0 FOLDER [kernels|engines|training ...]"
out=${1:?$usage}
shift
for group in "$@"; do
    case $group in kernels | engines | training) ;; *) echo "error: $group: $usage" >&2 && exit 2 ;; esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
groups=" ${*:-kernels engines training} "
python=${PYTHON:-python3}
scratch=${SCRATCH:-/tmp/recontrast-gpu-check}
site=$scratch/site
found=$scratch/found
limit_s=${LIMIT_S:-1800}
mkdir -p "$scratch" "$found" || exit 1
export PYTHONPATH="$PWD:$PWD/train:$PWD/export:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XDG_CACHE_HOME="$scratch/cache" PATH="$PATH:/usr/local/cuda/bin"
export python out scratch site found
steps=$scratch/steps.tsv
: >"$steps"
rm -f "$scratch/refused"
: >"$out/log.txt"

# step NAME SECONDS COMMAND...: 77 means that something it needs is not there.
step() {
    local name=$1 limit=$2 start=$SECONDS status code=0
    shift 2
    local left=$((limit_s - SECONDS))
    ((limit < left)) || limit=$left
    echo "== $name" | tee -a "$out/log.txt"
    local before
    before=$(wc -c <"$out/log.txt")
    if ((limit < 5)); then
        status="not reached"
    else
        timeout --kill-after=5 "$limit" "$@" >>"$out/log.txt" 2>&1 </dev/null
        code=$?
        case $code in
            0) status=passed ;;
            77) status=skipped ;;
            124 | 137) status=timeout ;;
            *) status=failed ;;
        esac
    fi
    tail -c "+$((before + 1))" "$out/log.txt" | tail -n 20
    echo "-- $name: $status in $((SECONDS - start)) s" | tee -a "$out/log.txt"
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$code" "$((SECONDS - start))" >>"$steps"
    keep
}

# After every step, so that nothing is lost if this is the last one.
keep() {
    "$python" - "$steps" "$found/machine.json" <<'PYTHON' >"$scratch/summary.json"
import json, pathlib, sys

rows = [line.split("\t") for line in pathlib.Path(sys.argv[1]).read_text().splitlines()]
steps = [{"step": name, "status": status, "exit_code": int(code), "seconds": int(s)} for name, status, code, s in rows]
try:
    machine = json.loads(pathlib.Path(sys.argv[2]).read_text())
except (OSError, ValueError):
    machine = None
print(json.dumps({"machine": machine, "steps": steps}, indent=1))
PYTHON
    mv "$scratch/summary.json" "$out/"
    tar -C "$found" -czf "$scratch/results.tar.gz" . && mv "$scratch/results.tar.gz" "$out/"
}

machine() {
    local gpu=""
    gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader | head -n 1)
    COMMIT=${COMMIT:-$(git rev-parse HEAD 2>/dev/null)} GPU=$gpu "$python" - >"$found/machine.json" <<'PYTHON'
import importlib.metadata as metadata, json, os, platform, subprocess, sys

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

def last_line(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[-1]
    except (OSError, IndexError):
        return None

names = ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "cuda-bindings", "tensorrt-rtx-cu13-libs", "tensorrt",
         "numpy", "scipy", "onnx", "onnxruntime", "pydantic", "nvidia-cuda-nvrtc")
print(json.dumps({
    "commit": os.environ["COMMIT"] or None,
    "gpu, driver, compute capability, memory": os.environ["GPU"] or None,
    "nvcc": last_line("nvcc", "--version"),
    "compute-sanitizer": last_line("compute-sanitizer", "--version"),
    "python": sys.version.split()[0],
    "os": platform.platform(),
    "cpus": os.cpu_count(),
    "packages": {name: version(name) for name in names},
}, indent=1))
PYTHON
    cat "$found/machine.json"
    nvidia-smi || return 77
    nvidia-smi -q -d CLOCK,POWER,TEMPERATURE,MEMORY
}

wheels() {
    [ -d "${WHEELS:-}" ] || return 77
    local kept=$scratch/wheels part whole
    mkdir -p "$kept"
    # Not -n, which fails in some versions where a file of an earlier call is there already.
    cp -u "$WHEELS"/*.whl* "$kept"/ || return 1
    for part in "$kept"/*.whl.00; do
        [ -e "$part" ] || continue
        whole=${part%.00}
        cat "$whole".[0-9][0-9] >"$whole"
        # Parts may still be to come.
        "$python" -m zipfile -t "$whole" >/dev/null 2>&1 || rm -f "$whole"
    done
    local wheel failed=0
    for wheel in "$kept"/*.whl; do
        [ -e "$wheel.installed" ] && continue
        if "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheel"; then
            touch "$wheel.installed"
        else
            failed=1
        fi
    done
    ls "$site"
    return $failed
}

build() {
    command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null || return 77
    local arch
    arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    [ -n "$arch" ] || return 1
    nvcc -std=c++17 -fatbin -arch="sm_$arch" --resource-usage -o "$scratch/kernels.fatbin" \
        recontrast_edge/kernels/kernels.cu && mv "$scratch/kernels.fatbin" recontrast_edge/kernels/kernels.fatbin
}

# tests COMMAND... -- ARGUMENTS...: pytest, under a command if there is one. It ends with 5 when it found no test, and
# with 0 when all were skipped, which is no pass here.
tests() {
    local under=() code log
    while [ "$1" != -- ]; do under+=("$1") && shift; done
    shift
    log=$(mktemp)
    "${under[@]}" "$python" -m pytest -p no:cacheprovider -q -s "$@" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 5 ] || { [ "$code" -eq 0 ] && ! grep -q -E '[0-9]+ passed' "$log"; }; then code=77; fi
    rm -f "$log"
    return "$code"
}

sanitize() {
    command -v compute-sanitizer >/dev/null || return 77
    local options=(--target-processes all --tool "$1" --error-exitcode 99)
    # Every return code is checked anyway, and the binding asks for functions that a driver need not have.
    [ "$1" != memcheck ] || options+=(--report-api-errors no)
    # Few blocks are enough: the sanitizer slows every access down.
    local chosen='geometry_of_a_real_model or same_bits or leaves_nothing_behind or less_aligned or word_loads or ties'
    chosen+=' or smallest or nv12'
    tests compute-sanitizer "${options[@]}" -- tests/gpu/test_kernels.py -k "$chosen"
}

has_rtx() {
    [ ! -e "$scratch/refused" ] || { echo "its first engine did not run on this GPU" && return 1; }
    nvidia-smi >/dev/null && "$python" -c 'import tensorrt_rtx; print(tensorrt_rtx.__version__)'
}

edge() { "$python" -m recontrast_edge "$@"; }

# ran PLAN: keeps its description, which says whether it was run. If not, no other engine needs to be tried.
ran() {
    cp "$1.json" "$found/"
    grep -q '"engine": null' "$1.json" || return 0
    touch "$scratch/refused"
    grep '"note"' "$1.json"
    return 1
}

# bench PLAN: latency and throughput, after a comparison with the model beside it.
bench() {
    local name
    name=$(basename "$1" .plan)
    edge bench --engine "$1" --frames 2000 --warmup 200 --batch 1,4,16 --json "$found/bench-$name.json" \
        --plot "$found/bench-$name.png"
}

line() {
    [ -d "$scratch/line" ] && return
    edge synth --product mixed --seed 1 --train 256 --test-good 16 --test-defect 16 --out "$scratch/line.part" &&
        mv "$scratch/line.part" "$scratch/line"
}

# demo PRECISION: the packaged model, which was trained. The first question: does an engine run on this GPU at all?
demo() {
    has_rtx || return 77
    local plan=$scratch/demo/demo.$1.plan int8=()
    mkdir -p "$scratch/demo" && cp recontrast_edge/models/demo.onnx "$scratch/demo/" && line || return 1
    [ "$1" != int8 ] || int8=(--calibration "$scratch/line/train/good")
    edge build "$scratch/demo/demo.onnx" --out "$plan" --flavor tensorrt-rtx --precision "$1" --batch 1,1,16 \
        --images "$scratch/line/test/good" "${int8[@]}" || return 1
    ran "$plan" && bench "$plan"
}

has_gpu() {
    nvidia-smi >/dev/null && "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 77)'
}

# train BACKBONE PRECISION: the last line of a run tells images a second and memory.
train() {
    has_gpu || return 77
    line || return 1
    local run=$scratch/runs/$1-$2
    rm -rf "$run"
    mkdir -p "$scratch/runs"
    edge train "$scratch/line" --out "$run" --backbone "$1" --weights random --precision "$2" --iterations 200 \
        --batch 16 --device cuda 2>&1 | tee "$run.log"
    local code=${PIPESTATUS[0]}
    { echo "$1 $2:" && grep -A 2 -E 'Trained for' "$run.log"; } >>"$found/training.txt"
    return "$code"
}

# engine BACKBONE PRECISION: export, build, whose gates compare graph and engine with the model, and measure.
engine() {
    has_rtx || return 77
    local run=$scratch/runs/$1-bf16 plan=$scratch/plans/$1.$2.plan
    local model=$scratch/plans/$1.onnx
    [ -f "$run/model.json" ] || train "$1" bf16 || return $?
    mkdir -p "$scratch/plans"
    [ -f "$model" ] || edge export "$run" --out "$model" --head features --images "$scratch/line/test/good" || return 1
    local int8=()
    [ "$2" != int8 ] || int8=(--calibration "$scratch/line/train/good")
    edge build "$model" --out "$plan" --flavor tensorrt-rtx --precision "$2" --batch 1,1,16 \
        --images "$scratch/line/test/good" "${int8[@]}" || return 1
    ran "$plan" && bench "$plan"
}

# The engine's tests with the plans that were built so far.
engine_tests() {
    has_rtx || return 77
    local plan plans=""
    for plan in "$scratch"/plans/*.plan "$scratch"/demo/*.plan; do
        [ -e "$plan" ] && plans=$plans${plans:+:}$plan
    done
    [ -n "$plans" ] || return 77
    RECONTRAST_PLAN=$plans tests -- tests/gpu/test_engine.py
}

export -f machine wheels build tests sanitize has_rtx edge ran bench line demo has_gpu train engine engine_tests

step wheels 90 bash -c wheels
step machine 60 bash -c machine
step build 60 bash -c build
if [[ $groups == *" kernels "* ]]; then
    kernel() { step "$1" "$2" "$python" benchmarks/kernel.py --dtypes float16 --json "$out/$1.json" "${@:3}"; }
    step kernel-tests 90 bash -c 'tests -- tests/gpu/test_kernels.py tests/gpu/test_way.py'
    step memcheck 75 bash -c 'sanitize memcheck'
    kernel kernel-wide 150 --models wide_resnet50_2 --batches 1,8
    step racecheck 75 bash -c 'sanitize racecheck'
    kernel kernel-large 60 --models wide_resnet50_2 --batches 32
    kernel kernel-resnet18 120 --models resnet18 --batches 1,8,32
fi
if [[ $groups == *" engines "* ]]; then
    step demo-fp16 90 bash -c 'demo fp16'
    step small-engine-tests 90 bash -c 'has_rtx || exit 77; tests -- tests/gpu/test_engine.py'
    step resnet18-fp16 120 bash -c 'engine resnet18 fp16'
    step demo-int8 90 bash -c 'demo int8'
    step wide-fp16 180 bash -c 'engine wide_resnet50_2 fp16'
    step engine-tests 90 bash -c engine_tests
    # Refused, where so short a training left a model whose map hardly depends on the image.
    step resnet18-int8 60 bash -c 'engine resnet18 int8'
    step wide-int8 120 bash -c 'engine wide_resnet50_2 int8'
fi
if [[ $groups == *" training "* ]]; then
    step train-wide-bf16 120 bash -c 'train wide_resnet50_2 bf16'
    step train-resnet18-bf16 60 bash -c 'train resnet18 bf16'
    step train-wide-fp32 120 bash -c 'train wide_resnet50_2 fp32'
    step train-resnet18-fp32 60 bash -c 'train resnet18 fp32'
fi

cat "$out/summary.json"
! grep -q -P '\t(failed|timeout|not reached)\t' "$steps"
