"""Compute log-probabilities with transformers, as expected values for tests."""

import torch


def sequence_logp(model, prompt, response, mask=None) -> torch.Tensor:
    """Return the log-probability of ``response`` given ``prompt``, from one unpadded row; the sum is in fp64.

    mask   which tokens of ``response`` to sum; None: all
    """
    row = torch.tensor([*prompt, *response])[None]
    logits = model(row).logits[0, len(prompt) - 1 : -1].double()
    tokens = logits.log_softmax(-1).gather(1, torch.tensor(response).long()[:, None])[:, 0]
    return tokens.sum() if mask is None else tokens[torch.as_tensor(mask)].sum()
