// Counters of events, of launches by kernel, and of collectives by operation, size and number of ranks. Python reads
// the counters of events through ctypes. It reads all other counters from a file that nullgpu_write writes.
#include "nullgpu.h"
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const COUNTER_NAMES[COUNTERS] = {
    "launches", "products", "fp8_products", "cudnn_calls", "cudnn_plans", "collectives", "communicators", "stream_waits",
    "device_waits", "event_waits", "blocking_copies", "pageable_copies", "copies", "allocations", "graphs",
    "captured", "stray",
};
static long counters[COUNTERS];

void count(Counter what) { __atomic_add_fetch(&counters[what], 1, __ATOMIC_RELAXED); }

EXPORT long nullgpu_counter(const char *name) {
  for (int i = 0; i < COUNTERS; i++)
    if (strcmp(COUNTER_NAMES[i], name) == 0) return __atomic_load_n(&counters[i], __ATOMIC_RELAXED);
  return -1;
}

long setting(const char *variable, long otherwise) {
  const char *text = getenv(variable);
  return text && *text ? strtol(text, NULL, 10) : otherwise;
}

// Kernels: a hash table with open addressing. CUDA registers about 100,000 kernels while torch's libraries are loaded.
#define SLOTS ((size_t)1 << 19)
typedef struct {
  const void *key;
  const char *name;
  long launches;
} Kernel;
static Kernel *kernels;
static size_t registered;
static pthread_mutex_t kernels_lock = PTHREAD_MUTEX_INITIALIZER;

static Kernel *slot_of(const void *key) {
  if (!kernels) kernels = calloc(SLOTS, sizeof *kernels);
  size_t slot = (size_t)(((uint64_t)(uintptr_t)key * 0x9E3779B97F4A7C15u) >> 45) % SLOTS;
  while (kernels[slot].key && kernels[slot].key != key) slot = (slot + 1) % SLOTS;
  return &kernels[slot];
}

void register_kernel(const void *key, const char *name) {
  pthread_mutex_lock(&kernels_lock);
  Kernel *kernel = slot_of(key);
  if (!kernel->key && ++registered > SLOTS / 2) {
    fprintf(stderr, "nullgpu: more than %zu kernels are registered; raise SLOTS\n", SLOTS / 2);
    abort();
  }
  kernel->key = key;
  kernel->name = name;
  pthread_mutex_unlock(&kernels_lock);
}

void count_kernel(const void *key) {
  count(LAUNCHES);
  pthread_mutex_lock(&kernels_lock);
  Kernel *kernel = slot_of(key);
  if (kernel->key) kernel->launches++;
  pthread_mutex_unlock(&kernels_lock);
}

const char *kernel_name(const void *key) {
  pthread_mutex_lock(&kernels_lock);
  const char *name = slot_of(key)->name;
  pthread_mutex_unlock(&kernels_lock);
  return name ? name : "(unknown)";
}

// The null GPU's libcuda.so.1 is a separate library. It calls these two functions for Triton's kernels.
EXPORT void nullgpu_register_kernel(const void *key, const char *name) { register_kernel(key, name); }
EXPORT void nullgpu_count_kernel(const void *key) { count_kernel(key); }

// Collectives: calls of one kind have the same operation, size and number of ranks. There are few kinds, so a list
// suffices.
#define KINDS 4096
static struct {
  const char *operation;
  size_t bytes;
  int ranks;
  long calls;
} collectives[KINDS];
static int kinds;
static pthread_mutex_t collectives_lock = PTHREAD_MUTEX_INITIALIZER;

void count_collective(const char *operation, size_t bytes, int ranks) {
  if (capturing()) {
    count(CAPTURED);
    return;
  }
  count(COLLECTIVES);
  pthread_mutex_lock(&collectives_lock);
  int i = 0;
  while (i < kinds && (collectives[i].operation != operation || collectives[i].bytes != bytes ||
                       collectives[i].ranks != ranks))
    i++;
  if (i < KINDS) {
    collectives[i].operation = operation;
    collectives[i].bytes = bytes;
    collectives[i].ranks = ranks;
    collectives[i].calls++;
    if (i == kinds) kinds++;
  }
  pthread_mutex_unlock(&collectives_lock);
}

// Write one line for each launched kernel: the number of launches, and the kernel's name. Also write one line for each
// kind of collective: the number of calls, the operation, the size in bytes, and the number of ranks.
EXPORT int nullgpu_write(const char *path) {
  FILE *file = fopen(path, "w");
  if (!file) return -1;
  pthread_mutex_lock(&kernels_lock);
  for (size_t i = 0; kernels && i < SLOTS; i++)
    if (kernels[i].launches) fprintf(file, "kernel\t%ld\t%s\n", kernels[i].launches, kernels[i].name);
  pthread_mutex_unlock(&kernels_lock);
  pthread_mutex_lock(&collectives_lock);
  for (int i = 0; i < kinds; i++)
    fprintf(file, "collective\t%ld\t%s %zu bytes over %d\n", collectives[i].calls, collectives[i].operation,
            collectives[i].bytes, collectives[i].ranks);
  pthread_mutex_unlock(&collectives_lock);
  return fclose(file);
}
