"""VPiT stage 2 of the emoji recipe, with many more requests for images than whole conversations have room for."""

import torch
import torch.nn.functional as F
from datasets import Dataset

from metamorph_hf import VPiTTrainer


class PartialImageTrainer(VPiTTrainer):
    """
    [`VPiTTrainer`] that adds to each step a batch of requests of whose images it predicts a few visual tokens.

    Which image a word means shows in a few of its visual tokens as well as in all 64, at a quarter of the cost. The
    model must decode images in parallel: the queries that are left out leave the positions of the others as they are.
    Every second request leaves out what its answer says before the image, so that the model can also begin with it.

    Args:
        requests ([`~datasets.Dataset`]): Conversations of a request and an image, with `messages` and `visual_tokens`,
            as many as there are steps times `num_requests`.
        num_requests (`int`): Requests in each step.
        num_tokens (`int`): Visual tokens that are predicted of each image, other ones each time.
    """

    def __init__(self, *args, requests: Dataset, num_requests: int, num_tokens: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.requests, self.num_requests, self.num_tokens = requests, num_requests, num_tokens

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """See [`~transformers.Trainer.training_step`]. What is returned and logged is the loss of `inputs` alone."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        start = self.state.global_step * self.num_requests
        requests = self.requests[start : start + self.num_requests]
        with self.accelerator.autocast():
            partial_loss = self.compute_partial_loss(requests["messages"], requests["visual_tokens"])
        self.accelerator.backward(self.visual_loss_weight * partial_loss)
        return loss

    def compute_partial_loss(
        self, messages: list[list[dict]], visual_tokens: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        """Return the mean loss of some visual tokens of each answer, given conversations and their images' (N, V)."""
        model, processor = self.metamorph, self.processing_class
        language_model, device = model.model.language_model, self.accelerator.device
        prompts = processor.apply_chat_template([turns[:1] for turns in messages], add_generation_prompt=True)
        said = ["".join(part.get("text", "") for part in turns[1]["content"]) for turns in messages]
        said[::2] = [""] * len(said[::2])  # these answers begin with the image, as with `force_image`
        texts = [prompt + text + processor.image_start_token for prompt, text in zip(prompts, said, strict=True)]
        encoded = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        targets = torch.stack([images[0] for images in visual_tokens]).to(device)
        # <image_start> predicts the first visual token, and each query the one after its own.
        chances = torch.rand(len(targets), targets.shape[1] - 1, device=device)
        queries = chances.topk(self.num_tokens - 1).indices.sort(1).values
        predicted = F.pad(queries + 1, (1, 0))
        targets = targets.gather(1, predicted[..., None].expand(-1, -1, targets.shape[2]))
        positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), mask.sum(1, keepdim=True) + queries], dim=1)
        hidden_states = language_model(
            inputs_embeds=torch.cat([model.get_input_embeddings()(ids), model.model.visual_queries(queries)], dim=1),
            attention_mask=F.pad(mask, (0, queries.shape[1]), value=1),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        predictions = model.vision_head(hidden_states[:, ids.shape[1] - 1 :])
        return model.visual_loss_function(predictions.flatten(0, 1), targets.flatten(0, 1)).mean()
