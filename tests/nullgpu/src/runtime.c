// CUDA's runtime without a device: properties, streams, events, and launches of kernels that do not run.
#define _GNU_SOURCE
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DRIVER_VERSION 13000
#define SHARED_PER_BLOCK 49152
#define SHARED_PER_BLOCK_OPTIN 232448
#define SHARED_PER_MULTIPROCESSOR 233472
#define REGISTERS 65536
#define MULTIPROCESSORS 132
#define L2_BYTES 52428800
#define LARGEST_GRID 2147483647
#define LARGEST_GRID_YZ 65535
#define LARGEST_BLOCK 1024

// ---- Devices: by default, eight H100 GPUs with 80 GB each; CUDA_VISIBLE_DEVICES selects some of them ----
static __thread int current_device;
static int compute_capability(void) { return (int)setting("NULLGPU_SM", 90); }

EXPORT cudaError_t cudaGetDeviceCount(int *number) {
  *number = (int)setting("NULLGPU_DEVICES", 8);
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (visible) {
    *number = *visible && *visible != '-';
    for (; *visible; visible++) *number += *visible == ',';
  }
  return *number ? cudaSuccess : cudaErrorNoDevice;
}
EXPORT cudaError_t cudaGetDevice(int *device) {
  *device = current_device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int device) {
  current_device = device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int *version) {
  *version = DRIVER_VERSION;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *possible, int device, int peer) {
  *possible = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *lowest, int *highest) {
  if (lowest) *lowest = 0;
  if (highest) *highest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
  snprintf(text, (size_t)size, "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  const char *name = getenv("NULLGPU_NAME");
  memset(found, 0, sizeof *found);
  snprintf(found->name, sizeof found->name, "%s", name ? name : "NVIDIA H100 80GB HBM3");
  found->major = compute_capability() / 10;
  found->minor = compute_capability() % 10;
  found->totalGlobalMem = device_memory();
  found->totalConstMem = 65536;
  found->multiProcessorCount = MULTIPROCESSORS;
  found->warpSize = 32;
  found->maxThreadsPerBlock = LARGEST_BLOCK;
  found->maxThreadsPerMultiProcessor = 2 * LARGEST_BLOCK;
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = LARGEST_BLOCK;
  found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = LARGEST_GRID;
  found->maxGridSize[1] = found->maxGridSize[2] = LARGEST_GRID_YZ;
  found->maxBlocksPerMultiProcessor = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = REGISTERS;
  found->sharedMemPerBlock = SHARED_PER_BLOCK;
  found->sharedMemPerBlockOptin = SHARED_PER_BLOCK_OPTIN;
  found->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR;
  found->l2CacheSize = L2_BYTES;
  found->memoryBusWidth = 5120;
  found->textureAlignment = 512;
  found->asyncEngineCount = 3;
  found->pciBusID = device + 1;
  found->unifiedAddressing = found->concurrentKernels = found->cooperativeLaunch = found->hostRegisterSupported = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = compute_capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = compute_capability() % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = LARGEST_BLOCK; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2 * LARGEST_BLOCK; break;
    case cudaDevAttrMaxGridDimX: *value = LARGEST_GRID; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = LARGEST_GRID_YZ; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = REGISTERS; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_PER_BLOCK; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_PER_BLOCK_OPTIN; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_PER_MULTIPROCESSOR; break;
    case cudaDevAttrL2CacheSize: *value = L2_BYTES; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError(void) { return cudaSuccess; }
EXPORT cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }

// ---- Streams and events: all work counts as done as soon as it is enqueued ----
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  *stream = calloc(1, 8);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return cudaStreamCreate(stream);
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  count(STREAM_WAITS);
  return waits_for(stream, "cudaStreamSynchronize");
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
  count(DEVICE_WAITS);
  return waits_for(NULL, "cudaDeviceSynchronize");
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data,
                                         unsigned flags) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}

// An event holds the time at which it was recorded, in milliseconds. It also holds the id of the capture in which it
// was recorded, or 0 if no capture was active on its stream.
typedef struct {
  double time;
  unsigned long long capture;
} Event;
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof(Event));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  double time = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
  if (event) *(Event *)event = (Event){time, capture_of(stream)};
  return cudaSuccess;
}
// A stream that waits for an event of a capture takes part in the capture. As on a GPU, the default stream cannot take
// part in a capture, and a stream that is captured cannot wait for an event outside of the capture.
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  unsigned long long id = event ? ((Event *)event)->capture : 0;
  return join_capture(stream, id) ? cudaSuccess : cudaErrorStreamCaptureImplicit;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  count(EVENT_WAITS);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = (float)(((Event *)to)->time - ((Event *)from)->time);
  return cudaSuccess;
}

// ---- Kernels ----
// When a library is loaded, it registers the address of each kernel's host function together with the kernel's name.
EXPORT void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name, int limit,
                                   void *thread, void *block, void *block_size, void *grid_size, int *warp_size) {
  typedef void Register(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *);
  static Register *real;
  if (!real) real = (Register *)dlsym(RTLD_NEXT, "__cudaRegisterFunction");
  register_kernel(host, name);
  if (real) real(binary, host, device, name, limit, thread, block, block_size, grid_size, warp_size);
}

// A GPU refuses a launch whose grid or block is empty or too large, so the null GPU does too.
static cudaError_t launch(const void *kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  if (!capture(stream)) count_kernel(kernel);
  int empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  int large = grid.y > LARGEST_GRID_YZ || grid.z > LARGEST_GRID_YZ || block.x * block.y * block.z > LARGEST_BLOCK;
  if (!empty && !large) return cudaSuccess;
  fprintf(stderr, "nullgpu: impossible launch of %s: grid %u x %u x %u, block %u x %u x %u\n", kernel_name(kernel),
          grid.x, grid.y, grid.z, block.x, block.y, block.z);
  return cudaErrorInvalidConfiguration;
}
EXPORT cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                    cudaStream_t stream) {
  return launch(kernel, grid, block, stream);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                      cudaStream_t stream) {
  return launch((const void *)kernel, grid, block, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
  return launch(kernel, config->gridDim, config->blockDim, config->stream);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = LARGEST_BLOCK;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = compute_capability();
  found->maxDynamicSharedSizeBytes = SHARED_PER_BLOCK_OPTIN;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads,
                                                                 size_t shared) {
  *blocks = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int threads,
                                                                          size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *kernel, const cudaLaunchConfig_t *config) {
  *clusters = MULTIPROCESSORS / 2;
  return cudaSuccess;
}

// ---- Driver functions, which torch requests by name ----
static int succeed(void) { return 0; }
static int get_attribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
static int get_device(int *device, int index) {
  *device = index;
  return 0;
}
static int get_context(void **context) {
  *context = (void *)8;
  return 0;
}
static int get_version(int *version) {
  *version = DRIVER_VERSION;
  return 0;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
  *function = memory_function(name);
  if (!strcmp(name, "cuDeviceGetAttribute")) *function = (void *)get_attribute;
  if (!strcmp(name, "cuDeviceGet")) *function = (void *)get_device;
  if (!strcmp(name, "cuCtxGetCurrent") || !strcmp(name, "cuDevicePrimaryCtxRetain")) *function = (void *)get_context;
  if (!strcmp(name, "cuDriverGetVersion")) *function = (void *)get_version;
  if (!*function) *function = (void *)succeed;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                           enum cudaDriverEntryPointQueryResult *result) {
  return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}

// ---- dlsym ----
// Libraries that look up CUDA's functions by name, such as cuDNN's front end, must find the functions of this library.
static void *(*real_dlsym)(void *, const char *);
static void *this_library;

__attribute__((constructor)) static void find_libraries(void) {
  Dl_info here;
  real_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
  if (!real_dlsym) real_dlsym = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
  if (dladdr((void *)find_libraries, &here)) this_library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
}
EXPORT void *dlsym(void *handle, const char *name) {
  if (!real_dlsym) find_libraries();
  if (this_library && handle != RTLD_NEXT && (!strncmp(name, "cuda", 4) || !strncmp(name, "cudnn", 5))) {
    void *own = real_dlsym(this_library, name);
    if (own) return own;
  }
  return real_dlsym(handle, name);
}
