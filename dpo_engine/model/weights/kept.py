"""Tensors of layers for multi-token prediction. In some checkpoints, these layers follow the model's own layers.

The checkpoints of DeepSeek-V3 and GLM-4.5 contain such layers, for speculative decoding. Transformers does not load
these layers. The engine does not load them either, because training does not use them. The engine exports these layers
unchanged.
"""

from dpo_engine.model.architecture import Architecture
from dpo_engine.model.weights.files import CheckpointFiles, kept_layers, layer_of
from dpo_engine.model.weights.shard_files import ShardWriter, Share


def kept_tensors(files: CheckpointFiles, arch: Architecture) -> list[str]:
    """Return the sorted names of a checkpoint's tensors in layers for multi-token prediction."""
    layers = range(arch.num_layers, arch.num_layers + kept_layers(files.directory))
    return sorted(name for name in files.file_of if layer_of(name) in layers)


def copy_kept(files: CheckpointFiles, names: list[str], shards: ShardWriter) -> Share:
    """Copy tensors to shard files, bit for bit, with one file in memory at a time. Return what was written."""
    for name in names:
        (part,) = files.slices([name])
        shards.add(name, part[:].clone())
        shards.flush()
    return shards.finish()
