"""Log-probabilities by transformers, as an oracle."""

import torch


def sequence_logp(model, prompt, response) -> torch.Tensor:
    """Summed log-probability of ``response`` after ``prompt``: one unpadded row, plain log_softmax in fp64."""
    row = torch.tensor([*prompt, *response])[None]
    logits = model(row).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(response).long()[:, None]).sum()
