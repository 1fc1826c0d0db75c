// NCCL, cuBLAS and cuDNN: calls are counted. Nothing is computed, but NCCL's small results are written.
#include "nullgpu.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// ---- NCCL for a single process ----
// Reductions and broadcasts return this rank's data. Reduce-scatters return this rank's part of its own data, and
// all-gathers return this rank's data once for each rank. The results of other operations are not written.
#define LARGEST_ANSWER ((size_t)1 << 20)  // larger results, and larger parts of an all-gather, are not written

typedef struct {
  int rank, ranks;
} Communicator;
typedef struct {
  char bytes[128];
} UniqueId;
static int next_rank, next_ranks;

// ncclCommSplit does not get the size of the new communicator. Before the split, Python therefore announces the number
// of ranks in the new communicator, and this process's rank in it.
EXPORT void nullgpu_announce_group(int rank, int ranks) {
  next_rank = rank;
  next_ranks = ranks;
}

static int open_communicator(void **out, int rank, int ranks) {
  Communicator *opened = malloc(sizeof *opened);
  opened->rank = rank;
  opened->ranks = ranks;
  *out = opened;
  count(COMMUNICATORS);
  return 0;
}
EXPORT int ncclGetUniqueId(UniqueId *id) {
  memset(id, 1, sizeof *id);
  return 0;
}
EXPORT int ncclCommInitRank(void **out, int ranks, UniqueId id, int rank) { return open_communicator(out, rank, ranks); }
EXPORT int ncclCommInitRankConfig(void **out, int ranks, UniqueId id, int rank, void *config) {
  return open_communicator(out, rank, ranks);
}
EXPORT int ncclCommInitRankScalable(void **out, int ranks, int rank, int ids, UniqueId *id, void *config) {
  return open_communicator(out, rank, ranks);
}
EXPORT int ncclCommSplit(void *from, int color, int key, void **out, void *config) {
  *out = NULL;
  if (color < 0) return 0;  // this rank is not in the new group
  return open_communicator(out, next_ranks ? next_rank : key, next_ranks ? next_ranks : 1);
}
static int ranks_of(const void *communicator) { return communicator ? ((const Communicator *)communicator)->ranks : 1; }
EXPORT int ncclCommCount(void *communicator, int *ranks) {
  *ranks = ranks_of(communicator);
  return 0;
}
EXPORT int ncclCommUserRank(void *communicator, int *rank) {
  *rank = communicator ? ((Communicator *)communicator)->rank : 0;
  return 0;
}
EXPORT int ncclCommGetAsyncError(void *communicator, int *error) {
  *error = 0;
  return 0;
}

static size_t bytes_of(size_t elements, int type) {
  // int8, uint8, int32, uint32, int64, uint64, fp16, fp32, fp64, bf16, and two forms of fp8
  static const unsigned char size[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return elements * size[type];
}
static void answer(void *to, const void *from, size_t bytes) {
  if (to && from && to != from && bytes <= LARGEST_ANSWER) memmove(to, from, bytes);
}
EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, void *comm, void *stream) {
  count_collective("all_reduce", bytes_of(n, type), ranks_of(comm));
  answer(to, from, bytes_of(n, type));
  return 0;
}
EXPORT int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, void *comm, void *stream) {
  count_collective("reduce", bytes_of(n, type), ranks_of(comm));
  answer(to, from, bytes_of(n, type));
  return 0;
}
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, void *comm, void *stream) {
  count_collective("broadcast", bytes_of(n, type), ranks_of(comm));
  answer(to, from, bytes_of(n, type));
  return 0;
}
EXPORT int ncclBcast(void *data, size_t n, int type, int root, void *comm, void *stream) {
  return ncclBroadcast(data, data, n, type, root, comm, stream);
}
EXPORT int ncclAllGather(const void *from, void *to, size_t n, int type, void *comm, void *stream) {
  size_t part = bytes_of(n, type);
  count_collective("all_gather", part * (size_t)ranks_of(comm), ranks_of(comm));
  for (int rank = 0; rank < ranks_of(comm); rank++) answer((char *)to + (size_t)rank * part, from, part);
  return 0;
}
EXPORT int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, void *comm, void *stream) {
  size_t part = bytes_of(n, type);
  int rank = comm ? ((Communicator *)comm)->rank : 0;
  count_collective("reduce_scatter", part * (size_t)ranks_of(comm), ranks_of(comm));
  answer(to, (const char *)from + (size_t)rank * part, part);
  return 0;
}
EXPORT int ncclSend(const void *from, size_t n, int type, int peer, void *comm, void *stream) {
  count_collective("send", bytes_of(n, type), ranks_of(comm));
  return 0;
}
EXPORT int ncclRecv(void *to, size_t n, int type, int peer, void *comm, void *stream) {
  count_collective("receive", bytes_of(n, type), ranks_of(comm));
  return 0;
}
EXPORT int ncclAlltoAll(const void *from, void *to, size_t n, int type, void *comm, void *stream) {
  count_collective("all_to_all", bytes_of(n, type), ranks_of(comm));
  return 0;
}

// ---- cuBLAS ----
static int open_handle(void **handle) {
  *handle = calloc(1, 64);
  return 0;
}
EXPORT int cublasCreate_v2(void **handle) { return open_handle(handle); }
EXPORT int cublasLtCreate(void **handle) { return open_handle(handle); }
static int zero(int *value) {
  *value = 0;
  return 0;
}
EXPORT int cublasGetMathMode(void *handle, int *mode) { return zero(mode); }
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) { return zero(mode); }
// Return one algorithm, with an empty description and without workspace.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                          void *preference, int wanted, void *results, int *found) {
  enum { RESULT_BYTES = 104 };
  memset(results, 0, RESULT_BYTES);
  *found = 1;
  return 0;
}
#define PRODUCT(function) \
  EXPORT int function(void) { \
    count(capturing() ? CAPTURED : PRODUCTS); \
    return 0; \
  }
// The layout of a matrix holds the type of its elements, because products of FP8 matrices are also counted separately.
typedef struct {
  int type;
} MatrixLayout;
EXPORT int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  open_handle(layout);
  ((MatrixLayout *)*layout)->type = type;
  return 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(void *layout) {
  free(layout);
  return 0;
}
static int is_fp8(const void *layout) {
  enum { E4M3 = 28, E5M2 = 29 };  // values of cudaDataType
  int type = layout ? ((const MatrixLayout *)layout)->type : 0;
  return type == E4M3 || type == E5M2;
}
EXPORT int cublasLtMatmul(void *handle, void *operation, const void *alpha, const void *a, void *a_layout,
                          const void *b, void *b_layout) {
  count(capturing() ? CAPTURED : PRODUCTS);
  if (is_fp8(a_layout) && is_fp8(b_layout)) count(FP8_PRODUCTS);
  return 0;
}
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)

// ---- cuDNN: every graph has one engine and one plan ----
enum {  // values from cudnn_graph.h, which is not included because build.sh gives the compiler no path to this header
  PLAN_DESCRIPTOR = 5,
  HEURISTIC_RESULTS = 202,
  CONFIGURATION_ENGINE = 300,
  CONFIGURATION_KNOBS = 302,
  PLAN_WORKSPACE = 405,
  ENGINE_KNOBS = 1302,
  ENGINE_NUMERICAL_NOTES = 1303,
  ENGINE_BEHAVIOR_NOTES = 1305,
  TYPE_DESCRIPTOR = 15
};
typedef struct {
  int type;
} Descriptor;

EXPORT int cudnnCreate(void **handle) { return open_handle(handle); }
EXPORT int cudnnGetStream(void *handle, void **stream) {
  *stream = NULL;
  return 0;
}
EXPORT int cudnnBackendCreateDescriptor(int type, void **out) {
  open_handle(out);
  ((Descriptor *)*out)->type = type;
  return 0;
}
EXPORT int cudnnBackendDestroyDescriptor(void *descriptor) {
  free(descriptor);
  return 0;
}
EXPORT int cudnnBackendFinalize(void *descriptor) {
  if (((Descriptor *)descriptor)->type == PLAN_DESCRIPTOR) count(CUDNN_PLANS);
  return 0;
}
EXPORT int cudnnBackendExecute(void *handle, void *plan, void *pointers) {
  count(capturing() ? CAPTURED : CUDNN_CALLS);
  return 0;
}
EXPORT int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *found, void *out) {
  // Size of an attribute in bytes, by its type. Attributes of types that are not in this table have 4 bytes.
  static const unsigned char size[] = {8, 4, 1, 8, 4, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4, 8, 4, 4, 4, 4, 4, 4, 4, 4, 1};
  int counted = name == HEURISTIC_RESULTS || name == CONFIGURATION_ENGINE;
  int none = name == CONFIGURATION_KNOBS || name == PLAN_WORKSPACE || name == ENGINE_KNOBS ||
             name == ENGINE_NUMERICAL_NOTES || name == ENGINE_BEHAVIOR_NOTES;
  if (found) *found = !none;
  if (counted || none || !out || wanted <= 0 || type == TYPE_DESCRIPTOR) return 0;
  memset(out, 0, type >= 0 && type < (int)sizeof size ? size[type] : 4);
  return 0;
}
