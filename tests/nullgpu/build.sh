#!/usr/bin/env bash
# Build the null GPU into build/, which git ignores: bash tests/nullgpu/build.sh
#
#   PYTHON   an interpreter with a CUDA 13 build of torch, and Triton (default: python3)
#   CC       the C compiler (default: gcc)
#
# The null GPU consists of libraries that replace CUDA's libraries and NCCL, and run no kernels (see docs/gpu.md). src/
# implements the functions whose results matter. A few functions of the real libraries work without a GPU, and are used.
# All other functions that torch imports from CUDA's libraries, or that the driver's header declares, become stubs that
# return 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
packages=$("${PYTHON:-python3}" -c '
import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("torch").origin).parents[1])')
cuda=$packages/nvidia/cu13/include              # headers of CUDA's runtime
triton=$packages/triton/backends/nvidia/include # headers of the driver
[[ -e $cuda/cuda_runtime_api.h ]] || {
  echo "$cuda: has no headers of CUDA; set PYTHON to an interpreter with a CUDA 13 build of torch" >&2
  exit 1
}
compile=("${CC:-gcc}" -O2 -fPIC -fvisibility=hidden -Wall -Wno-unused-parameter -Wno-builtin-declaration-mismatch
  -I"$cuda" -I"$triton")
mkdir -p build

functions_in() { nm "$@" | awk '$2 == "T" { print $3 }' | sort -u; }
stubs() { sed 's/.*/__attribute__((visibility("default"))) int &(void) { return 0; }/'; }

# These functions of the real libraries work without a GPU, so they are used.
works='^(cuda(GetErrorName|GetErrorString|RuntimeGetVersion)'
works+='|cudnn(GetVersion|GetErrorString|GetCudartVersion|GetProperty|GetLastErrorString)'
works+='|nccl(GetVersion|GetErrorString|GetLastError)|cublasLtGetVersion|cublasGetStatusString)$'

objects=()
for name in record memory graphs runtime libraries; do
  "${compile[@]}" -c "src/$name.c" -o "build/$name.o"
  objects+=("build/$name.o")
done
for library in c10_cuda torch_cuda torch_python torch_cuda_linalg; do
  nm -D --undefined-only "$packages/torch/lib/lib$library.so" 2>/dev/null | awk '{ sub("@.*", "", $2); print $2 }' || true
done | grep -E '^(cuda|cublas|cudnn|nccl|curand|cusolver|cusparse|cufft|__cudaLaunch|__cudaGetKernel)' |
  grep -vE "$works" | sort -u | comm -23 - <(functions_in "${objects[@]}") | stubs >build/stubs.c
"${compile[@]}" -c build/stubs.c -o build/stubs.o
"${CC:-gcc}" -shared -o build/libnullgpu.so "${objects[@]}" build/stubs.o -lpthread -ldl

"${compile[@]}" -c src/driver.c -o build/driver.o
{
  grep -ohE '\bcu[A-Z][A-Za-z0-9]+(_v[0-9]+|_ptsz)?\(' "$triton/cuda.h" | tr -d '('
  grep -ohE '#define cu[A-Z][A-Za-z0-9]+ +cu\S+_v[0-9]+' "$triton/cuda.h" | awk '{ print $3 }'
} | sort -u | comm -23 - <(functions_in build/driver.o) | stubs >build/driver_stubs.c
"${compile[@]}" -c build/driver_stubs.c -o build/driver_stubs.o
"${CC:-gcc}" -shared -Wl,-soname,libcuda.so.1 -o build/libcuda.so.1 build/driver.o build/driver_stubs.o
ln -sf libcuda.so.1 build/libcuda.so
echo "built the null GPU: $(functions_in "${objects[@]}" build/driver.o | wc -l) functions, and" \
  "$(cat build/stubs.c build/driver_stubs.c | wc -l) stubs"
