"""The loss of text labels by TRL's fused head, which holds neither all logits nor all of their gradients at once."""

import torch
from torch import nn
from trl.kernels import ChunkedLogProbFunction

from ..modeling_metamorph import MetaMorphForConditionalGeneration


TILE_WIDTH = 4096  # entries of the vocabulary whose logits are held at once
NO_PROBABILITY = -1e4  # as a logit; finite, since the entropy multiplies it by a probability of 0


def measure_text(
    model: MetaMorphForConditionalGeneration, hidden_states: torch.Tensor, labels: torch.LongTensor
) -> torch.Tensor:
    """
    Return cross-entropy, correctness and entropy (3, M), float32, of predictions of (M,) labels from (M, D) hidden
    states. `lm_head` computes its logits itself if it is more than a matrix (adapters, quantization, a `forward` of
    its own, which stage 1 gives to a tied one), or less (sharded by ZeRO-3 or tensor parallelism).
    """
    head, weight = model.lm_head, model.lm_head.weight
    is_plain = type(head) is nn.Linear and "forward" not in vars(head)
    if not is_plain or type(weight.data) is not torch.Tensor or hasattr(weight, "ds_id"):
        return model.measure_text(hidden_states, labels)
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
    return torch.stack([-log_probs, is_correct.float(), entropy])
