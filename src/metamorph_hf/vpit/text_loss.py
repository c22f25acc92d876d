"""The loss of text labels by TRL's fused head, which holds neither all logits nor all of their gradients at once."""

import torch
from torch import nn
from trl.kernels import ChunkedLogProbFunction

from ..modeling_metamorph import MetaMorphForConditionalGeneration


TILE_WIDTH = 4096  # entries of the vocabulary whose logits are held at once
NO_PROBABILITY = -1e4  # as a logit; finite, since the entropy multiplies it by a probability of 0


def _is_readable(weight: torch.Tensor) -> bool:
    is_whole = type(weight.data) is torch.Tensor and not hasattr(weight, "ds_id")
    return is_whole and (weight.dtype == torch.float32 or not weight.requires_grad)


def measure_text(
    model: MetaMorphForConditionalGeneration, hidden_states: torch.Tensor, labels: torch.LongTensor
) -> torch.Tensor:
    """
    Return cross-entropy, correctness and entropy (3, M), float32, of predictions of (M,) labels from (M, D) hidden
    states. The model's own `measure_text` does so for heads that must be called (adapters, quantization, a `forward`
    of their own as in stage 1), for sharded ones (ZeRO-3, tensor parallelism), and for those in half precision that
    are trained, since TRL's gradient is in float32 and would need memory beside theirs.
    """
    head = model.lm_head
    if type(head) is not nn.Linear or "forward" in vars(head) or not _is_readable(head.weight):
        return model.measure_text(hidden_states, labels)
    weight = head.weight
    bias = torch.zeros(head.out_features, dtype=weight.dtype, device=weight.device)
    bias[model.config.image_token_id] = NO_PROBABILITY
    log_probs, entropy, _, _, is_correct = ChunkedLogProbFunction.apply(
        hidden_states.to(weight.device),
        weight,
        bias if head.bias is None else bias + head.bias,
        labels.to(weight.device),
        1.0,  # temperature
        TILE_WIDTH,
        None,  # no soft cap of the logits
        1.0,  # scale of the logits
        ("entropy", "is_top1"),
    )
    return torch.stack([-log_probs, is_correct.float(), entropy.detach()])
