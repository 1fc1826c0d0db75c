// CUDA graphs: operations are counted when a stream captures them, and each launch of a graph is counted once. A launch
// does not repeat the captured operations, because kernels have no effect anyway.
#include "nullgpu.h"
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

// Captures are numbered from 1, and at most one capture is active. The first eight bytes of a stream hold the number of
// the capture in which the stream takes part. The second eight bytes of an event hold the number of the capture in
// which the event was recorded. Numbers of earlier captures have no meaning.
static unsigned long long captures;  // number of the last capture, or 0
static unsigned long long active;    // number of the active capture, or 0
static size_t captured;              // number of kernel launches in the active capture

unsigned long long capture_of(const void *stream) {
  unsigned long long id = stream > (void *)2 ? *(const unsigned long long *)stream : 0;
  return id && id == __atomic_load_n(&active, __ATOMIC_RELAXED) ? id : 0;  // handles 0 to 2 are default streams
}
int join_capture(void *stream, unsigned long long id) {
  if (!id || id != __atomic_load_n(&active, __ATOMIC_RELAXED)) return !capture_of(stream);
  if (stream <= (void *)2) return 0;
  *(unsigned long long *)stream = id;
  return 1;
}
int capture(const void *stream) {
  if (!__atomic_load_n(&active, __ATOMIC_RELAXED)) return 0;
  if (!capture_of(stream)) {
    count(STRAY);
    return 0;
  }
  __atomic_add_fetch(&captured, 1, __ATOMIC_RELAXED);
  count(CAPTURED);
  return 1;
}
int capturing(void) { return __atomic_load_n(&active, __ATOMIC_RELAXED) != 0; }

// On a real GPU, if the host waits for a stream that is captured, the wait returns an error and the capture fails. This
// function returns the same error.
int waits_for(const void *stream, const char *what) {
  if (!(stream ? capture_of(stream) : active)) return cudaSuccess;
  fprintf(stderr, "nullgpu: %s during the capture of a graph\n", what);
  return cudaErrorStreamCaptureUnsupported;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  if (stream <= (cudaStream_t)2) return cudaErrorStreamCaptureUnsupported;
  if (active) return cudaErrorIllegalState;
  captured = 0;
  __atomic_store_n(&active, ++captures, __ATOMIC_RELAXED);
  join_capture(stream, active);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (!capture_of(stream)) return cudaErrorIllegalState;
  *graph = malloc(sizeof(size_t));
  *(size_t *)*graph = captured;
  __atomic_store_n(&active, 0, __ATOMIC_RELAXED);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *number) {
  cudaStreamIsCapturing(stream, status);
  if (id) *id = capture_of(stream);
  if (number) *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *number) {
  *number = *(size_t *)graph;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  *made = malloc(1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  count(GRAPHS);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  free(graph);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  free(graph);
  return cudaSuccess;
}

// The null GPU's libcuda.so.1 is a separate library. It calls this function for Triton's kernels.
EXPORT int nullgpu_capture(const void *stream) { return capture(stream); }
