"""Exponential moving average of the weights: what a run keeps can be steadier than its last iteration.

    average = WeightAverage(model, decay=0.999)
    average.update(iterations_done=1)  # after each iteration
    average.copy_to_model()

After t iterations the average is ``sum((1 - d) * d ** (t - i) * w_i) / (1 - d ** t)``: corrected for its start, so that
the initial weights have no part in it and a short training is averaged over what there was. Only what is trained is
averaged; BatchNorm's statistics are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of the parameters that have gradients.

    Args:
        model: on its device already; the averages are kept there, too.
        decay: share of the average that stays in each iteration, 0 <= decay < 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        self._weights = list(trained.values())
        self._averages = {name: value.clone() for name, value in trained.items()}

    def update(self, iterations_done: int) -> None:
        """Take the weights after an iteration in.

        Args:
            iterations_done: from 1, one more each time.
        """
        share = (1 - self._decay) / (1 - self._decay**iterations_done)
        torch._foreach_lerp_(list(self._averages.values()), self._weights, share)

    def copy_to_model(self) -> None:
        """Replace the model's weights by their averages."""
        torch._foreach_copy_(self._weights, list(self._averages.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter."""
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved averages.

        Raises:
            KeyError, RuntimeError: not those of this model.
        """
        if state.keys() != self._averages.keys():
            raise KeyError(f"averages of {sorted(state.keys() ^ self._averages.keys())[0]}")
        for name, average in self._averages.items():
            average.copy_(state[name])
