"""Modules put in the place of others, and put back where something fails."""

from __future__ import annotations

from torch import nn


class Places:
    """What has been changed in a model, so that it can be undone."""

    def __init__(self, model: nn.Module, keep_weights: bool = False) -> None:
        """keep_weights: copy the weights too, for changes that are made inside the tensors."""
        self.model = model
        self.weights = {k: v.clone() for k, v in model.state_dict().items()} if keep_weights else None
        self.changed: list[tuple[nn.Module, str, nn.Module]] = []

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """Hang ``new`` wherever the model holds ``old``."""
        for parent in list(self.model.modules()):
            for name in [name for name, child in parent._modules.items() if child is old]:
                self.changed.append((parent, name, old))
                setattr(parent, name, new)

    def restore(self) -> None:
        """Undo every change, the last first."""
        for parent, name, old in reversed(self.changed):
            setattr(parent, name, old)
        if self.weights is not None:
            self.model.load_state_dict(self.weights)
