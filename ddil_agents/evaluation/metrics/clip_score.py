"""CLIP score: how well a picture fits its caption, by OpenCLIP.

It is the raw cosine, about .30, as papers on distillation print it. Other tools multiply it by 100 or 2.5 and clamp it at 0.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddil_agents.evaluation.metrics.pictures import check_pictures, digest_weights, find_weights, import_optional


class ClipScore:
    """Cosine between a picture's and its caption's embeddings.

        s = ⟨f(x), g(y)⟩ / (‖f(x)‖ ‖g(y)‖)

    Args:
        weights_dir: The weights, or a folder that holds them as `MODEL-PRETRAINED.safetensors`, `.pt` or `.bin` (the hub's
            `open_clip_model.safetensors`, renamed); None lets open_clip download them.
        model: OpenCLIP's name of the network; DDIL's is ViT-g/14.
        pretrained: OpenCLIP's name of its weights.
        prefix: Text before each caption; DMD2's evaluation uses `A photo depicts `.
        resize_mode: OpenCLIP's: `shortest` crops, `longest` pads, `squash` distorts; default: the one published with the weights.
        device: Where the network runs.
        batch_size: Pairs of picture and caption in one forward.

    Attributes:
        name: Its name in results.
        weights: A digest of its weights.

    Raises:
        ImportError: without the `eval` extra.
        ValueError: the model or its weights are unknown; the weights are absent, unsafe, of another network, or cannot be downloaded.
    """

    def __init__(
        self,
        weights_dir: Path | None = None,
        model: str = "ViT-g-14",
        pretrained: str = "laion2b_s34b_b88k",
        *,
        prefix: str = "",
        resize_mode: str | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> None:
        open_clip = import_optional("open_clip")
        if model not in open_clip.list_models():
            raise ValueError(f"unknown model {model!r}; open_clip.list_models() has: {', '.join(open_clip.list_models())}")
        published = open_clip.get_pretrained_cfg(model, pretrained)
        source, cure = pretrained, f"put the hub's open_clip_model.safetensors of {published.get('hf_hub') or model} there, renamed"
        if weights_dir is not None:
            names = (f"{model}-{pretrained}{suffix}" for suffix in (".safetensors", ".pt", ".bin"))
            source = str(find_weights(weights_dir, *names, cure=cure))
        elif not published:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none, so pass weights_dir"
            raise ValueError(f"unknown weights {pretrained!r} of {model}; choose one of: {tags}")
        try:
            self.network, _, self.preprocess = open_clip.create_model_and_transforms(
                model,
                source,
                device=device,
                weights_only=True,
                image_mean=published.get("mean"),
                image_std=published.get("std"),
                image_interpolation=published.get("interpolation"),
                image_resize_mode=resize_mode or published.get("resize_mode"),
            )
        except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
            doing = "without a network pass a weights_dir: " if weights_dir is None else ""
            raise ValueError(f"cannot load {source} into {model} ({error}); {doing}{cure}") from error
        self.network.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.weights = digest_weights(self.network)
        self.name = f"clip_score_{model}_{pretrained}"
        self.prefix, self.device, self.batch_size = prefix, device, batch_size

    @torch.no_grad()
    def score(self, pictures: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines of uint8 pictures (n, height, width, 3) and their n captions, (n,) float32 on the CPU.

        Raises:
            ValueError: not pictures, or another number of captions.
        """
        check_pictures(pictures)
        if isinstance(captions, str) or len(captions) != len(pictures):
            got = "one string" if isinstance(captions, str) else f"{len(captions)} captions"
            raise ValueError(f"{len(pictures)} pictures and {got}: need one caption for each picture")
        scores = []
        for start in range(0, len(pictures), self.batch_size):
            part = slice(start, start + self.batch_size)
            images = torch.stack([self.preprocess(Image.fromarray(picture.numpy())) for picture in pictures[part].cpu()])
            tokens = self.tokenizer([self.prefix + caption for caption in captions[part]])  # cut at the model's context length
            image = self.network.encode_image(images.to(self.device), normalize=True)  # (b, width)
            text = self.network.encode_text(tokens.to(self.device), normalize=True)
            scores.append((image * text).sum(-1).float().cpu())
        return torch.cat(scores)
