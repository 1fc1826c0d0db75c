"""Facts about mixtures of experts and about latent attention, which only some architectures have. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: in some layers, the MLP is replaced by experts, of which each token uses a few.

    layers           indices of the layers that have experts
    count            number of experts in each of these layers
    chosen           number of experts that a token uses
    ffn_hidden_size  width of one expert
    score            function from logits to scores: ``softmax`` over all experts, or ``sigmoid`` for each expert
    normalized       whether the scores of the chosen experts are divided by their sum
    scale            factor of the chosen experts' scores
    bias             whether experts are chosen by score plus a bias of each expert; the biases are not trained
    groups           number of groups of experts; 1: there are no groups
    chosen_groups    number of groups from which a token's experts are chosen
    group_best       how many of a group's highest scores are summed; the groups with the largest sums are chosen
    shared_size      width of an MLP that every token uses in addition to its experts; None: there is no such MLP
    shared_gate      whether the output of this shared MLP is multiplied by the sigmoid of a linear function of the
                     MLP's input

    The following fields are not part of the architecture's digest if they have their defaults.

    router_bias      whether the router's logits have a bias, which is trained like the router's weight
    biases           whether the matrices of experts have biases
    clamp            None: experts compute ``silu(gate) * up``. Otherwise, they limit ``gate`` to at most ``clamp``,
                     limit ``up`` to between ``-clamp`` and ``clamp``, and then compute ``gate * sigmoid(slope * gate) *
                     (1 + up)``
    slope            factor of the gate in the sigmoid, if there is a ``clamp``
    """

    layers: tuple[int, ...]
    count: int
    chosen: int
    ffn_hidden_size: int
    score: str = "softmax"
    normalized: bool = True
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    chosen_groups: int = 1
    group_best: int = 1
    shared_size: int | None = None
    shared_gate: bool = False
    router_bias: bool = False
    biases: bool = False
    clamp: float | None = None
    slope: float = 1.0

    @property
    def special(self) -> bool:
        """Whether an expert computes something other than a SiLU-gated MLP without biases."""
        return self.biases or self.clamp is not None

    @property
    def shared(self) -> bool:
        """Whether there is an MLP that every token uses."""
        return self.shared_size is not None


@dataclass(frozen=True)
class Latent:
    """Latent attention: keys and values, and possibly queries, are linear functions of smaller vectors.

    query_rank  size of the vector from which queries are computed; None: they are computed from the hidden states
    rank        size of the vector from which keys and values are computed
    plain       number of dimensions without rotary positions in a head's query and key
    rotary      number of dimensions with rotary positions; all heads share these dimensions of the key
    value       number of dimensions of a head's value

    *Source*: DeepSeek-V2 (arXiv 2405.04434) section 2.1.
    """

    query_rank: int | None
    rank: int
    plain: int
    rotary: int
    value: int

    @property
    def has_query_rank(self) -> bool:
        """Whether queries are computed from a smaller vector."""
        return self.query_rank is not None

    @property
    def has_no_query_rank(self) -> bool:
        """Whether queries are computed from the hidden states."""
        return self.query_rank is None

    @property
    def down_size(self) -> int:
        """Size of the vector from which keys and values are computed, plus the size of the key's rotary part."""
        return self.rank + self.rotary
