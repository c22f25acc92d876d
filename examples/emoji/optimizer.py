"""The optimizer of VPiT stage 2: Muon for hidden layers, AdamW for the rest."""

from collections.abc import Callable

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import TrainingArguments


class MuonAdamW(Optimizer):
    """[`Muon`] for the linear layers of a model's decoder layers, and [`AdamW`] for its other parameters.

    `Trainer` takes one optimizer, so this one steps both. Parameters that need no gradient are left out.

    Args:
        model (`nn.Module`): The model to train.
        lr (`float`): Learning rate. Muon scales it to match the size of AdamW's updates (arXiv 2502.16982).
        weight_decay (`float`): Weight decay of all parameters with more than one dimension.
        betas (`tuple[float, float]`): AdamW's.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]):
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        hidden = {id(module.weight) for name, module in linear.items() if ".layers." in name}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        others = [parameter for parameter in trained if id(parameter) not in hidden]
        groups = [
            {"params": [parameter for parameter in others if parameter.ndim > 1]},
            {"params": [parameter for parameter in others if parameter.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers = [
            Muon(
                [parameter for parameter in trained if id(parameter) in hidden],
                lr=lr,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            AdamW(groups, lr=lr, weight_decay=weight_decay, betas=betas, fused=True),
        ]
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step with both optimizers. A `closure` computes the gradients first; its loss is returned."""
        muon, adamw = self.optimizers
        loss = muon.step(closure)
        adamw.step()
        return loss

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # A learning rate schedule changes these groups, which must be those of the optimizers.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def choose_muon(args: TrainingArguments) -> tuple[Callable[[], type[Optimizer]], dict]:
    """Return `Trainer`'s `optimizer_cls_and_kwargs` for [`MuonAdamW`] with the settings of `args`."""
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "betas": betas}
    return lambda: MuonAdamW, options  # `Trainer` calls the first for the class
