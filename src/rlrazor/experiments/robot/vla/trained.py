"""What of a large model is trained: all of it, or an adapter, as a module of its own."""

from torch import nn


class Trained(nn.Module):
    """The parameters of a model that have a gradient, tied ones once: the very same, under the model's names.

    A dot in a name, which a parameter must not have, is a slash here. What is stored of a run, how far its weights
    moved, and what its optimiser holds is of these alone: of an adapter a hundredth of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)
