"""MetaMorph as a model of VLMEvalKit, which has no plugins: it reads its models from `vlmeval/config.py`.

In a checkout of open-compass/VLMEvalKit, add these lines to the end of `vlmeval/config.py`:

    from vlmevalkit_adapter import MetaMorph
    supported_VLM["MetaMorph"] = partial(MetaMorph, pretrained="my-metamorph")

and run it with this folder on the path:

    PYTHONPATH=metamorph-hf/examples python run.py --data MMBench_DEV_EN MMVP CV-Bench-2D --model MetaMorph

Its branch `lite` also evaluates generated images. There, add
`supported_VLM["MetaMorph"] = partial(MetaMorphImages, pipeline="my-pipeline")` to `vlmeval/config/__init__.py`.
"""

import torch
from common import load_pipeline, resolve_model
from PIL import Image
from vlmeval.vlm.base import BaseModel

from metamorph_hf import MetaMorphForConditionalGeneration, MetaMorphProcessor


try:
    from vlmeval.ulm.base import BaseGenModel
except ModuleNotFoundError:  # the branch main, whose other base class has all that `MetaMorphImages` needs
    BaseGenModel = BaseModel


class MetaMorph(BaseModel):
    """Answers with text, by greedy search unless `generation_kwargs`, arguments of `generate`, say otherwise.

    A message is a list of {"type": "text" or "image", "value": text or path}, in order. `pretrained` is a model with
    its processor, or a pipeline folder.
    """

    INTERLEAVE = True
    VIDEO_LLM = False  # VLMEvalKit gives the frames of a video as images then
    allowed_types = ["text", "image"]

    def __init__(self, pretrained: str, max_new_tokens: int = 512, **generation_kwargs):
        super().__init__()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = resolve_model(pretrained)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.model = MetaMorphForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device)
        self.processor = MetaMorphProcessor.from_pretrained(processor)
        self.options = {"max_new_tokens": max_new_tokens, "do_sample": False, "max_images": 0, **generation_kwargs}

    @torch.no_grad()
    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        inputs = self.processor.prepare_prompts([{"role": "user", "content": content}])
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        ids = self.model.generate(**inputs, **self.options)
        return self.processor.decode_generated(ids[:, inputs["input_ids"].shape[1] :])[0]


class MetaMorphImages(BaseGenModel):
    """Answers captions and edits with an image. `options` are arguments of the pipeline, as `num_inference_steps`."""

    INTERLEAVE = True
    EXPERTISE = ["T2I", "TI2I"]
    allowed_types = ["text", "image"]

    def __init__(self, pipeline: str, **options):
        super().__init__()
        self.pipe, self.options = load_pipeline(pipeline), options
        self.pipe.set_progress_bar_config(disable=True)

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> Image.Image:
        return self.batch_generate_inner(message, dataset, 1)[0]

    def batch_generate_inner(self, message: list[dict], dataset: str | None, num_generations: int) -> list:
        """Return `num_generations` images. All answers begin with an image, since VLMEvalKit saves each of them."""
        prompt = "\n".join(part["value"] for part in message if part["type"] == "text")
        images = [part["value"] for part in message if part["type"] == "image"]
        forced = {"generation_kwargs": {"force_image": True, "max_images": 1, "do_sample": False}}
        prompts, shown = [prompt] * num_generations, [images] * num_generations
        return self.pipe(prompts, image=shown, **{**forced, **self.options}).images
