"""Compute expected values for tests: log-probabilities and training in fp64, with transformers and torch's autograd."""

import re

import torch
import torch.nn.functional as F

from dpo_engine.testing.pairs import RandomPairs, global_batches
from dpo_engine.testing.trajectory import VOCAB


def sequence_logp(model, prompt, response, mask=None) -> torch.Tensor:
    """Return the log-probability of ``response`` given ``prompt``, from one unpadded row; the sum is in fp64.

    mask   whether to include each token of ``response`` in the sum; None: all tokens
    """
    row = torch.tensor([*prompt, *response])[None]
    logits = model(row).logits[0, len(prompt) - 1 : -1].double()
    tokens = logits.log_softmax(-1).gather(1, torch.tensor(response).long()[:, None])[:, 0]
    return tokens.sum() if mask is None else tokens[torch.as_tensor(mask)].sum()


class Norm64(torch.nn.Module):
    """RMS norm in fp64. The RMS norm of transformers computes in fp32."""

    def __init__(self, weight, eps):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden):
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def in_fp64(directory):
    """Load a model with transformers in fp64, and make its RMS norms compute in fp64 too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="sdpa")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(module, name, Norm64(child.weight, child.variance_epsilon))
    return model


def train_with_transformers(
    directory, sizes, *, load=in_fp64, patterns=(), optimizer=torch.optim.AdamW, decay, clip, **options
):
    """Run DPO in one process in fp64, with transformers and a torch optimizer, without the engine.

    sizes      number of pairs in each step
    load       function that loads the model in ``directory``; parameters that need no gradient are not trained
    patterns   regular expressions; weights whose whole name matches any of them are not trained
    decay      weight decay of the matrices
    clip       maximum gradient norm
    options    other arguments of the optimizer

    Returns the gradient norm of each step, and the final weights.
    """
    model, reference = load(directory), load(directory)
    for name, parameter in model.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    # transformers stores the biases of all experts of a layer as one matrix, so find biases by their names, too
    vectors = {id(p) for name, p in model.named_parameters() if p.dim() == 1 or name.endswith("bias")}
    groups = [
        {"params": [p for p in trained if id(p) not in vectors], "weight_decay": decay},
        {"params": [p for p in trained if id(p) in vectors], "weight_decay": 0.0},
    ]
    updates = optimizer([group for group in groups if group["params"]], **options)
    pairs, norms = RandomPairs(sum(sizes), VOCAB), []
    for indices in global_batches(sizes):
        loss = 0.0
        for pair in (pairs[i] for i in indices):
            chosen, rejected = (sequence_logp(model, pair.prompt, r) for r in (pair.chosen, pair.rejected))
            with torch.no_grad():
                before = [sequence_logp(reference, pair.prompt, r) for r in (pair.chosen, pair.rejected)]
            margin = 0.1 * ((chosen - before[0]) - (rejected - before[1]))
            loss = loss - pair.weight * F.logsigmoid(margin) / sum(pairs[i].weight for i in indices)
        updates.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, clip).item())
        updates.step()
    return norms, {name: value.detach() for name, value in model.named_parameters()}
