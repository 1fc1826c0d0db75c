# shellcheck shell=bash
# Source this file. It defines which of the job's environment variables are passed to a container: launch/task.sh passes
# them to podman, docker and apptainer, and launch/job.sh to pyxis. They override variables that the image sets.

# The variables that can affect training. They concern the job, devices, networks, caches, experiment trackers, access
# to the internet, or libraries for computation or communication. All variables that the engine compares between ranks
# are included.
passed_variables='^(SLURM|MASTER|DPO|CUDA|CUDNN|CUBLAS|CUBLASLT|NVIDIA|NVTE|NCCL|UB|GLOO|UCX|UCC|FI|EFA|RDMAV|IBV|SHARP|'
passed_variables+='PYTORCH|TORCH[A-Z]*|TRITON|ATEN|MKL|DNNL|ONEDNN|OPENBLAS|OMP|KMP|GOMP|NVSHMEM|RAYON|'
passed_variables+='HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|TOKENIZERS|DATASETS|WANDB|MLFLOW|TRACKIO|SWANLAB)_|'
passed_variables+='^(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|XDG_CACHE_HOME|TZ)$|'
passed_variables+='^PYTHON(PATH|HASHSEED|UNBUFFERED|FAULTHANDLER|WARNINGS|UTF8|NOUSERSITE|PYCACHEPREFIX|DONTWRITEBYTECODE)$|'
passed_variables+='^(SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE)$|'
passed_variables+='^(http|https|ftp|all|no)_proxy$|^(HTTP|HTTPS|FTP|ALL|NO)_PROXY$'

# Exceptions, which are not passed: paths and versions of the host's libraries, and variables that NVIDIA's container
# runtime reads.
kept_variables='^(CUDA|CUDNN|NCCL|UCX|UCC|FI|EFA|MKL|NVIDIA|PYTORCH)_(HOME|PATH|DIR|ROOT|ROOT_DIR|VERSION)$|'
kept_variables+='^CUDA_(TOOLKIT|INC|LIB|BIN)|^NVIDIA_(VISIBLE_DEVICES|DRIVER_CAPABILITIES|REQUIRE_)'

# Print the names of the variables to pass, one per line. CONTAINER_ENV can add names, separated by spaces or commas.
container_variables() {
  local name more=${CONTAINER_ENV:-}
  more=" ${more//,/ } "
  while read -r name; do
    if [[ ($name =~ $passed_variables && ! $name =~ $kept_variables) || $more == *" $name "* ]]; then
      echo "$name"
    fi
  done < <(compgen -e)
}
