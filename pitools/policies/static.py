"""A head's outputs as parameters of their own: a policy without a network, for one batch of noises (paper, C.1).

    G(x_src, t_src, c) = (A, μ, s),    optimised themselves by π-ID

What even such a policy cannot be fitted to is the policy's own bias, and no network's.
"""

from __future__ import annotations

from torch import Tensor, nn

from pitools.policies.head import Outputs
from pitools.types import Conditions


class StaticNetwork(nn.Module):
    """A `PolicyNetwork` that answers the same to whatever it is asked: to be fitted to the noises that it is for.

    start: the outputs that it starts with, of as many samples as it is asked about: velocities `[B, L, V, C]`, factor
    `[B, L, E]`, sample `[B, P]`. `ValueError` for other dimensions.
    """

    def __init__(self, start: Outputs) -> None:
        super().__init__()
        for name, value, ndim in zip(Outputs._fields, start, (4, 3, 2), strict=True):
            if value.ndim != ndim:
                raise ValueError(f"{name} must have {ndim} dimensions, got {tuple(value.shape)}; see `Outputs`")
        self.velocities, self.factor, self.sample = (nn.Parameter(value.detach().clone()) for value in start)

    def forward(self, x_src: Tensor, t_src: Tensor, conditions: Conditions | None = None) -> Outputs:
        """The parameters themselves."""
        return Outputs(self.velocities, self.factor, self.sample)
