#!/usr/bin/env bash
# Installs the packages for GPUs that tests look at without a GPU, into an environment:
#
#     tests/install_gpu_packages.sh build/venv-test
#
# The Python part of the oldest and of newer TensorRT versions, the oldest cuda-bindings, and JetPack 6's NVRTC, each in a
# folder of its own (ENVIRONMENT/gpu-packages), and PyCUDA, which is compiled where nvcc is. What cannot be had is left out with a message;
# its tests say so and skip.
set -euo pipefail

environment=$(cd "$1" && pwd)
pip=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check)

# TensorRT of JetPack 6.1, of JetPack 7.0, and the newest that was looked at; of TensorRT for RTX the oldest.
for requirement in tensorrt-cu12-bindings=={10.3.0,10.13.3.9,11.4.0.106} tensorrt-rtx-cu13-bindings==1.4.0.76 \
  cuda-bindings==12.9.1 nvidia-cuda-nvrtc-cu12==12.6.85; do
  folder="$environment/gpu-packages/$requirement"
  [[ -d $folder ]] || "${pip[@]}" --no-deps --only-binary :all: --target "$folder" "$requirement" ||
    echo "note: $requirement cannot be installed for this Python; it is not tested here" >&2
done

if "$environment/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("pycuda"))'; then
  exit
fi
if ! nvcc=$(command -v nvcc) || ! command -v g++ >/dev/null; then
  echo "note: no nvcc, so PyCUDA is not compiled and not tested here" >&2
  exit
fi
cuda=$("$nvcc" -dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! "$environment/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary pycuda \
  --dest "$work" 'pycuda>=2024.1'; then
  echo "note: PyCUDA cannot be downloaded; it is not tested here" >&2
  exit
fi
tar --extract --directory "$work" --strip-components 1 --file "$work"/pycuda-*.tar.gz
# Without a driver there is no library to link against; an empty one does, because names are looked up when it runs.
mkdir "$work/driver"
g++ -shared -x c++ /dev/null -o "$work/driver/libcuda.so"
cat >"$work/siteconf.py" <<CONFIGURATION
CUDA_ROOT = "$cuda"
CUDA_INC_DIR = ["$cuda/include"]
CUDADRV_LIB_DIR = ["$work/driver"]
CUDADRV_LIBNAME = ["cuda"]
CUDART_LIB_DIR = ["$cuda/lib64"]
CUDA_ENABLE_CURAND = False
CUDA_ENABLE_GL = False
CXXFLAGS = ["-O0", "-g0"]
CONFIGURATION
"${pip[@]}" "$work" || echo "note: PyCUDA cannot be compiled; it is not tested here" >&2
