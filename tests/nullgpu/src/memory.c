// Memory of the null GPU. Device memory is reserved address space. Only small copies, small fills and NCCL's small
// results are written to it.
#define _GNU_SOURCE
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GRANULE ((size_t)2 << 20)  // a GPU maps memory in pages of 2 MiB
#define MIB ((size_t)1 << 20)

// Copies up to these sizes are executed, so that lengths, flags and indices that a program reads back are correct.
// Fills are executed up to the second size.
#define LARGEST_HOST_COPY (16 * MIB)
#define LARGEST_DEVICE_COPY ((size_t)64 << 10)

typedef struct {
  char *start;
  size_t size;
  MemoryKind kind;
} Region;

static Region *regions;
static size_t region_count, region_capacity;
static size_t device_used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static size_t round_up(size_t size) { return (size + GRANULE - 1) / GRANULE * GRANULE; }

// Memory that CUDA's context needs on a real card before torch allocates anything.
static size_t context_memory(void) { return (size_t)setting("NULLGPU_CONTEXT_MIB", 560) * MIB; }
size_t device_memory(void) { return (size_t)setting("NULLGPU_MIB", 81559) * MIB; }
size_t free_device_memory(void) {
  size_t taken = device_used + context_memory();
  return taken < device_memory() ? device_memory() - taken : 0;
}

// Reserve aligned address space and remember it. The caller holds the lock.
static char *map_region(size_t size, MemoryKind kind) {
  char *raw = mmap(NULL, size + GRANULE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return NULL;
  char *start = (char *)round_up((size_t)raw);
  if (start > raw) munmap(raw, (size_t)(start - raw));
  size_t behind = GRANULE - (size_t)(start - raw);
  if (behind) munmap(start + size, behind);
  if (region_count == region_capacity) {
    region_capacity = region_capacity ? 2 * region_capacity : 256;
    regions = realloc(regions, region_capacity * sizeof *regions);
  }
  regions[region_count++] = (Region){start, size, kind};
  return start;
}

static void *allocate(size_t asked, MemoryKind kind) {
  size_t size = round_up(asked ? asked : 1);
  char *start = NULL;
  pthread_mutex_lock(&lock);
  if (kind != DEVICE_MEMORY || size <= free_device_memory()) start = map_region(size, kind);
  if (start && kind == DEVICE_MEMORY) device_used += size;
  pthread_mutex_unlock(&lock);
  return start;
}

static void release(void *start) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < region_count; i++) {
    if (regions[i].start != start) continue;
    munmap(start, regions[i].size);
    if (regions[i].kind == DEVICE_MEMORY) device_used -= regions[i].size;
    regions[i] = regions[--region_count];
    break;
  }
  pthread_mutex_unlock(&lock);
}

MemoryKind memory_kind(const void *address) {
  MemoryKind kind = UNKNOWN_MEMORY;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < region_count && !kind; i++) {
    const char *start = regions[i].start;
    if ((const char *)address >= start && (const char *)address < start + regions[i].size) kind = regions[i].kind;
  }
  pthread_mutex_unlock(&lock);
  return kind;
}

EXPORT cudaError_t cudaMalloc(void **pointer, size_t size) {
  count(ALLOCATIONS);
  *pointer = allocate(size, DEVICE_MEMORY);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
EXPORT cudaError_t cudaFree(void *pointer) {
  if (pointer) release(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
EXPORT cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  *pointer = allocate(size, HOST_MEMORY);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
EXPORT cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }
EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *free_bytes = free_device_memory();
  *total = device_memory();
  return cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  MemoryKind kind = memory_kind(pointer);
  memset(found, 0, sizeof *found);
  found->type = kind == DEVICE_MEMORY ? cudaMemoryTypeDevice
                : kind == HOST_MEMORY ? cudaMemoryTypeHost
                                      : cudaMemoryTypeUnregistered;
  cudaGetDevice(&found->device);  // a process uses only one device
  found->devicePointer = kind ? (void *)pointer : NULL;
  found->hostPointer = kind == HOST_MEMORY ? (void *)pointer : NULL;
  return cudaSuccess;
}

static void copy(void *to, const void *from, size_t size) {
  MemoryKind target = memory_kind(to), source = memory_kind(from);
  int within_device = target == DEVICE_MEMORY && source == DEVICE_MEMORY;
  count(COPIES);
  if (target == UNKNOWN_MEMORY || source == UNKNOWN_MEMORY) count(PAGEABLE_COPIES);
  if (size <= (within_device ? LARGEST_DEVICE_COPY : LARGEST_HOST_COPY)) memmove(to, from, size);
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  count(BLOCKING_COPIES);
  copy(to, from, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                   cudaStream_t stream) {
  copy(to, from, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size,
                                       cudaStream_t stream) {
  copy(to, from, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *pointer, int value, size_t size) {
  if (size <= LARGEST_DEVICE_COPY) memset(pointer, value, size);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
  return cudaMemset(pointer, value, size);
}
EXPORT cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char variable[64 << 10];
  *pointer = variable;
  return cudaSuccess;
}

// Memory of other processes. The null GPU runs one rank alone. When this rank gathers the handles of all ranks, it gets
// its own handle once for each rank. Therefore, data that this rank writes to another rank arrives in this rank's own
// memory.
EXPORT cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *pointer) {
  memset(handle, 0, sizeof *handle);
  memcpy(handle, &pointer, sizeof pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t handle, unsigned flags) {
  memcpy(pointer, &handle, sizeof *pointer);
  return cudaSuccess;
}

// Expandable segments: torch's allocator reserves addresses once, and creates and maps memory piece by piece. Here, the
// reserved region is usable at once, so mapping does nothing. Only created memory counts as used.
static int reserve_addresses(unsigned long long *pointer, size_t size, size_t alignment, unsigned long long wanted,
                             unsigned long long flags) {
  pthread_mutex_lock(&lock);
  char *start = map_region(round_up(size), DEVICE_MEMORY);
  pthread_mutex_unlock(&lock);
  *pointer = (unsigned long long)(uintptr_t)start;
  return start ? cudaSuccess : cudaErrorMemoryAllocation;
}
static int create_memory(unsigned long long *handle, size_t size, const void *properties, unsigned long long flags) {
  count(ALLOCATIONS);
  pthread_mutex_lock(&lock);
  int fits = size <= free_device_memory();
  if (fits) device_used += size;
  pthread_mutex_unlock(&lock);
  if (!fits) return cudaErrorMemoryAllocation;
  size_t *created = malloc(sizeof *created);  // the handle points to the size, which release_memory needs
  *created = size;
  *handle = (unsigned long long)(uintptr_t)created;
  return cudaSuccess;
}
static int release_memory(unsigned long long handle) {
  size_t *created = (size_t *)(uintptr_t)handle;
  pthread_mutex_lock(&lock);
  device_used -= *created;
  pthread_mutex_unlock(&lock);
  free(created);
  return cudaSuccess;
}
static int allocation_granularity(size_t *granularity, const void *properties, int option) {
  *granularity = GRANULE;
  return cudaSuccess;
}

void *memory_function(const char *name) {
  if (!strcmp(name, "cuMemAddressReserve")) return (void *)reserve_addresses;
  if (!strcmp(name, "cuMemCreate")) return (void *)create_memory;
  if (!strcmp(name, "cuMemRelease")) return (void *)release_memory;
  if (!strcmp(name, "cuMemGetAllocationGranularity")) return (void *)allocation_granularity;
  return NULL;
}
