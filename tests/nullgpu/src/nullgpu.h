// Declarations that the source files of the null GPU share. docs/gpu.md explains what the null GPU is.
#pragma once
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

// Events that are counted. The order is that of COUNTER_NAMES in record.c.
typedef enum {
  LAUNCHES,          // kernels, without those inside cuBLAS and cuDNN
  PRODUCTS,          // calls of cuBLAS
  FP8_PRODUCTS,      // those of two FP8 matrices
  CUDNN_CALLS,       // executions of a cuDNN plan
  CUDNN_PLANS,       // cuDNN plans built
  COLLECTIVES,       // NCCL operations, including sends and receives
  COMMUNICATORS,     // NCCL communicators
  STREAM_WAITS,      // the host waits for a stream
  DEVICE_WAITS,      // the host waits for the device
  EVENT_WAITS,       // the host waits for an event
  BLOCKING_COPIES,   // copies that return only when they are done
  PAGEABLE_COPIES,   // asynchronous copies from or to pageable host memory, which block the host in part
  COPIES,            // all copies
  ALLOCATIONS,       // requests of the caching allocator to the device
  COUNTERS
} Counter;

typedef enum { UNKNOWN_MEMORY, HOST_MEMORY, DEVICE_MEMORY } MemoryKind;

void count(Counter what);
void count_kernel(const void *key);                        // a launch of a registered kernel
void register_kernel(const void *key, const char *name);   // `key` identifies the kernel in launches
const char *kernel_name(const void *key);
void count_collective(const char *operation, size_t bytes, int ranks);

MemoryKind memory_kind(const void *address);
size_t device_memory(void);        // bytes of the card
size_t free_device_memory(void);   // bytes that are left

long setting(const char *variable, long otherwise);  // a number from the environment

// The driver's functions for reserving addresses and mapping memory, which torch requests by name.
void *memory_function(const char *name);
