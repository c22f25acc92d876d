"""VPiT stage 2 of the emoji recipe, with many more requests for images than whole conversations have room for."""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.utils.data import DataLoader

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

    @cached_property
    def request_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of requests from the next step on, prepared by as many workers as the conversations have."""
        left = self.requests.select(range(self.state.global_step * self.num_requests, len(self.requests)))
        workers = self.args.dataloader_num_workers
        return iter(DataLoader(left, self.num_requests, collate_fn=self.collate_requests, num_workers=workers))

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """See [`~transformers.Trainer.training_step`]. What is returned and logged is the loss of `inputs` alone."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        with self.accelerator.autocast():
            partial_loss = self.compute_partial_loss(**next(self.request_batches))
        self.accelerator.backward(self.visual_loss_weight * partial_loss)
        return loss

    def collate_requests(self, records: list[dict]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `attention_mask` (B, L) up to `<image_start>`, and `visual_tokens` (B, N, V)."""
        processor, messages = self.processing_class, [record["messages"] for record in records]
        prompts = processor.apply_chat_template([turns[:1] for turns in messages], add_generation_prompt=True)
        said = ["".join(part.get("text", "") for part in turns[1]["content"]) for turns in messages]
        said[::2] = [""] * len(said[::2])  # these answers begin with the image, as with `force_image`
        texts = [prompt + text + processor.image_start_token for prompt, text in zip(prompts, said, strict=True)]
        encoded = processor.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        return {**encoded, "visual_tokens": torch.stack([record["visual_tokens"][0] for record in records])}

    def compute_partial_loss(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, visual_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss of some visual tokens of each answer, given what `collate_requests` returns."""
        model, device = self.metamorph, self.accelerator.device
        ids, mask, targets = input_ids.to(device), attention_mask.to(device), visual_tokens.to(device).float()
        # <image_start> predicts the first visual token, and each query the one after its own.
        chances = torch.rand(len(targets), targets.shape[1] - 1, device=device)
        queries = chances.topk(self.num_tokens - 1).indices.sort(1).values
        predicted = F.pad(queries + 1, (1, 0))
        targets = targets.gather(1, predicted[..., None].expand(-1, -1, targets.shape[2]))
        positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), mask.sum(1, keepdim=True) + queries], dim=1)
        hidden_states = model.model.language_model(
            inputs_embeds=torch.cat([model.get_input_embeddings()(ids), model.model.visual_queries(queries)], dim=1),
            attention_mask=F.pad(mask, (0, queries.shape[1]), value=1),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        predictions = model.vision_head(hidden_states[:, ids.shape[1] - 1 :])
        return model.visual_loss_function(predictions.flatten(0, 1), targets.flatten(0, 1)).mean()
