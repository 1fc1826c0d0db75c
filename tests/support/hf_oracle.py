"""Log-probabilities computed by transformers, as an independent reference."""

import torch


def sequence_logp(model, prompt, response) -> torch.Tensor:
    """Sum the log-probabilities of ``response`` after ``prompt``: one unpadded row, log_softmax in fp64."""
    row = torch.tensor([*prompt, *response])[None]
    logits = model(row).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(response).long()[:, None]).sum()
