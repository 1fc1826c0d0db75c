// Declarations shared by the source files of the null GPU. docs/gpu.md explains what the null GPU is.
#pragma once
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

// Events that are counted, in the same order as COUNTER_NAMES in record.c.
typedef enum {
  LAUNCHES,          // launches of kernels, except for kernels inside cuBLAS and cuDNN
  PRODUCTS,          // calls of cuBLAS
  FP8_PRODUCTS,      // calls of cuBLAS that multiply two FP8 matrices
  CUDNN_CALLS,       // executions of a cuDNN plan
  CUDNN_PLANS,       // cuDNN plans built
  COLLECTIVES,       // NCCL operations, including sends and receives
  COMMUNICATORS,     // NCCL communicators opened
  STREAM_WAITS,      // waits of the host for a stream
  DEVICE_WAITS,      // waits of the host for the device
  EVENT_WAITS,       // waits of the host for an event
  BLOCKING_COPIES,   // copies for which the host waits until they are done
  PAGEABLE_COPIES,   // copies from or to pageable host memory, which block the host at least in part
  COPIES,            // all copies
  ALLOCATIONS,       // requests of the caching allocator for device memory
  GRAPHS,            // launches of CUDA graphs
  CAPTURED,          // captured kernel launches, and calls of cuBLAS, cuDNN and NCCL during a capture. They do not
                     // count as LAUNCHES, PRODUCTS, CUDNN_CALLS or COLLECTIVES, but products of two FP8 matrices also
                     // count as FP8_PRODUCTS. Copies during a capture still count as COPIES.
  STRAY,             // launches on a stream that is not captured, while another stream is captured
  COUNTERS
} Counter;

typedef enum { UNKNOWN_MEMORY, HOST_MEMORY, DEVICE_MEMORY } MemoryKind;

void count(Counter what);
void count_kernel(const void *key);                        // count a launch; a registered kernel has its own count too
void register_kernel(const void *key, const char *name);   // `key` identifies the kernel in launches
const char *kernel_name(const void *key);
void count_collective(const char *operation, size_t bytes, int ranks);

MemoryKind memory_kind(const void *address);
size_t device_memory(void);        // total memory of the card in bytes
size_t free_device_memory(void);   // free memory of the card in bytes

// Return whether a launch on this stream is captured. If so, count it as CAPTURED. If only other streams are captured,
// count it as STRAY.
int capture(const void *stream);
unsigned long long capture_of(const void *stream);  // the id of the stream's active capture; 0: it has none
// A stream waits for an event of capture `id`. If this capture is active, add the stream to it. Return whether the wait
// is allowed.
int join_capture(void *stream, unsigned long long id);
int capturing(void);                               // whether any stream is captured
// The host waits for `stream`. Return an error if this stream is captured. NULL stands for the whole device: if
// `stream` is NULL, return an error if any stream is captured.
int waits_for(const void *stream, const char *what);

long setting(const char *variable, long otherwise);  // the variable's value, or `otherwise` if it is unset or empty

// Return this library's implementation of the driver's memory function `name`, or NULL if it has none. torch requests
// these functions by name.
void *memory_function(const char *name);
