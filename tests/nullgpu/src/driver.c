// libcuda.so.1 of the null GPU: the driver's functions that Triton calls. A launch of a kernel is only counted.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define NOT_FOUND 500

// These functions are in the preloaded library, libnullgpu.so. Its dlsym replaces that of the C library.
extern int cudaDeviceGetAttribute(int *, int, int);
extern int cudaGetDeviceCount(int *);
extern int cudaMemGetInfo(size_t *, size_t *);
extern void nullgpu_register_kernel(const void *, const char *);
extern void nullgpu_count_kernel(const void *);
extern int nullgpu_capture(const void *);
extern void *dlsym(void *, const char *);

EXPORT int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
EXPORT int cuDeviceGetCount(int *number) { return cudaGetDeviceCount(number); }
EXPORT int cuDeviceGet(int *device, int index) {
  *device = index;
  return 0;
}
EXPORT int cuDeviceGetName(char *text, int size, int device) {
  snprintf(text, (size_t)size, "null GPU");
  return 0;
}
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  size_t left;
  return cudaMemGetInfo(&left, bytes);
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, attribute, device);
}
static int give_context(void **context) {
  *context = (void *)8;
  return 0;
}
EXPORT int cuCtxGetCurrent(void **context) { return give_context(context); }
EXPORT int cuDevicePrimaryCtxRetain(void **context, int device) { return give_context(context); }
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
EXPORT int cuCtxGetDevice(int *device) {
  *device = 0;
  return 0;
}
EXPORT int cuGetErrorString(int error, const char **text) {
  *text = "an error of the null GPU";
  return 0;
}
EXPORT int cuGetErrorName(int error, const char **text) { return cuGetErrorString(error, text); }

EXPORT int cuModuleLoadData(void **module, const void *image) {
  *module = calloc(1, 8);
  return 0;
}
EXPORT int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values) {
  return cuModuleLoadData(module, image);
}
EXPORT int cuModuleGetFunction(void **function, void *module, const char *name) {
  char text[256];
  snprintf(text, sizeof text, "triton:%s", name);
  char *kept = strdup(text);  // never freed: a kernel lives as long as the process
  nullgpu_register_kernel(kept, kept);
  *function = kept;
  return 0;
}
EXPORT int cuFuncGetAttribute(int *value, int attribute, void *function) {
  enum { MOST_THREADS = 0, REGISTERS = 4 };
  *value = attribute == MOST_THREADS ? 1024 : attribute == REGISTERS ? 32 : 0;
  return 0;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
  *blocks = 2;
  return 0;
}
EXPORT int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments,
                          void **more) {
  if (!nullgpu_capture(stream)) nullgpu_count_kernel(function);
  return 0;
}
typedef struct {
  unsigned sizes[7];  // grid, block and shared memory
  void *stream;
} Launch;
EXPORT int cuLaunchKernelEx(const Launch *config, void *function, void **arguments, void **more) {
  if (!nullgpu_capture(config->stream)) nullgpu_count_kernel(function);
  return 0;
}
EXPORT int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer;  // Triton requests the address on the device
  return 0;
}
EXPORT int cuGetExportTable(const void **table, const void *id) { return NOT_FOUND; }
EXPORT int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *result) {
  *function = dlsym((void *)0, name);  // RTLD_DEFAULT
  if (result) *result = *function ? 0 : 1;
  return *function ? 0 : NOT_FOUND;
}
