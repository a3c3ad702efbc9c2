"""Checks and reads the files of a diffusers pipeline.

Weights are read from safetensors alone, and no code from a model's folder is run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from safetensors import SafetensorError, safe_open

from ddil_env.pipelines.find import ADAPTER_KEYS, INDEX, how_to_convert, locate, read_json
from ddil_env.pipelines.supported_config import check_class, check_index, check_supported

STEM = "diffusion_pytorch_model"  # name of the file of weights of diffusers' models
STEMS = {"text_encoder": "model"}  # … and of transformers' models
TOKENIZER_FILES = ("*.json", "merges.txt", "spiece.model")


class PipelineFolder:
    """A folder as diffusers' `save_pretrained` writes it, checked before anything is loaded.

    Args:
        path: The folder.
        pipeline: The class of pipeline that it must hold.
        models: Components that have weights, name → class; the first is the denoiser.
        tokenizers: Tokenizers, name → class.
        optional: Components that model_index.json may leave out.
        without: Components that are not read even if the folder has them.
        follows: Entries of components' configurations that the caller follows, beside those that their classes are built from.
        variant: Which weights to read of the components that have several, such as fp16; the plain ones of the others.

    Attributes:
        models, tokenizers: The components that are read.
        absent: Names of the components that are not read.
        index: The content of model_index.json.

    Raises:
        ValueError: model_index.json is missing or of another pipeline; a component is missing or of another class, says something that is
            not supported (supported_config.py), or its weights are missing, pickled or cut short; or no component has that variant.
    """

    def __init__(
        self,
        path: Path,
        pipeline: Any,
        models: Mapping[str, Any],
        tokenizers: Mapping[str, Any] | None = None,
        optional: Collection[str] = (),
        without: Collection[str] = (),
        follows: Mapping[str, Collection[str]] | None = None,
        variant: str | None = None,
    ) -> None:
        self.path = path
        self.pipeline = pipeline
        self.follows = dict(follows or {})
        self.variant = variant
        if not (path / INDEX).is_file():
            if not any((path / sub).is_dir() for sub in models) and any(path.glob("*.safetensors")):
                raise ValueError(how_to_convert(path, pipeline.__name__))
            raise ValueError(f"no {INDEX} in {path.absolute()}: pass the pipeline's own folder, as diffusers' save_pretrained writes it")
        self.index = read_json(path / INDEX)
        if (found := self.index.get("_class_name")) != pipeline.__name__:
            raise ValueError(f"{path} holds a {found}; this expert reads a {pipeline.__name__}; pass the folder of one")
        check_index(path / INDEX, self.index, pipeline)
        components = {**models, **(tokenizers or {})}
        self.absent = [name for name in components if name in without or self.index.get(name) == [None, None]]
        if missing := [name for name in self.absent if name not in (*optional, *without)]:
            raise ValueError(f"{path / INDEX} leaves out {', '.join(missing)}, which this expert reads; pass a whole pipeline")
        self.models = {name: cls for name, cls in models.items() if name not in self.absent}
        self.tokenizers = {name: cls for name, cls in (tokenizers or {}).items() if name not in self.absent}
        for name, cls in self.models.items():
            check_class(path / INDEX, name, self.index.get(name), cls)
            check_supported(self.part(name) / "config.json", self.config(name), cls, self.follows.get(name, ()))
            self._check_weights(name)
        if variant is not None and not any(self.weights(name)[1] for name in self.models):
            raise ValueError(f"variant={variant!r}: no component of {path} has weights of that name; leave variant out")

    @classmethod
    def find(
        cls,
        model: str,
        pipeline: Any,
        models: Mapping[str, Any],
        tokenizers: Mapping[str, Any] | None = None,
        optional: Collection[str] = (),
        without: Collection[str] = (),
        follows: Mapping[str, Collection[str]] | None = None,
        variant: str | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Finds the folder of a path or a hub id; of a hub id only the files that are read are fetched.

        Args:
            model: A folder or a hub id.
            pipeline, models, tokenizers, optional, without, follows, variant: As in the constructor.
            local_files_only: Whether the hub is never asked.

        Raises:
            ValueError: as in the constructor and in `locate`.
        """
        read = [name for name in models if name not in without]
        texts = [name for name in tokenizers or () if name not in without]
        patterns = [INDEX, "README.md", "config.json", "scheduler_config.json", "scheduler/scheduler_config.json"]
        patterns += [f"{name}/config.json" for name in models]
        patterns += [f"{name}/{pattern}" for name in read for pattern in _weight_patterns(_stem(name), variant)]
        patterns += _weight_patterns(STEM, variant)  # a pipeline of one model may have its files at the top of the folder
        patterns += [f"{name}/{kind}" for name in texts for kind in TOKENIZER_FILES]

        def lacking(path: Path) -> list[str]:
            if not (path / INDEX).is_file():
                return [INDEX]
            index = read_json(path / INDEX)
            parts = [name for name in read if index.get(name) != [None, None]]
            tables = [f"{name}/" for name in texts if index.get(name) != [None, None] and not any((path / name).glob("*"))]
            return [file for name in parts for file in _lacking_weights(path, name, variant)] + tables

        folder = locate(model, pipeline.__name__, patterns, lacking, local_files_only)
        return cls(folder, pipeline, models, tokenizers, optional, without, follows, variant)

    def part(self, name: str, config: str = "config.json") -> Path:
        """The folder of a component: a subfolder, or the pipeline's own folder if the component's files lie there."""
        return _part(self.path, name, config)

    def config(self, name: str) -> dict[str, Any]:
        """Reads a component's config.json.

        Raises:
            ValueError: the file cannot be read.
        """
        return read_json(self.part(name) / "config.json")

    def text_config(self, name: str) -> Any:
        """The configuration of a text encoder, with the defaults of its class.

        Raises:
            ValueError: the file cannot be read as one.
        """
        try:
            return self.models[name].config_class.from_pretrained(self.part(name), local_files_only=True)
        except Exception as error:  # transformers' configurations raise errors of many kinds
            raise ValueError(f"cannot read {self.part(name) / 'config.json'} as a text encoder's ({error}); fetch it again") from error

    def weights(self, name: str) -> tuple[list[Path], str | None]:
        """A component's files of weights, and the variant that they are of: the folder's own, or None for the plain ones."""
        return _find_weights(self.part(name), _stem(name), self.variant)

    def sha256(self, names: Collection[str]) -> str:
        """The SHA-256 of the components' configurations, weights and tokenizer files, by name and content."""
        files = []
        for name in names:
            if name in self.models:
                paths = [self.part(name) / "config.json", *self.weights(name)[0]]
            else:
                paths = [path for pattern in TOKENIZER_FILES for path in sorted((self.path / name).glob(pattern))]
            files += [(name, path) for path in paths]
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            digests = list(pool.map(_sha256, (path for _, path in files)))
        listing = [(name, path.name, digest) for (name, path), digest in zip(files, digests, strict=True)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def require(self, name: str, what: str, **expected: Any) -> None:
        """Checks a component's configuration.

        Args:
            name: The component.
            what: What the error says the component should be.
            expected: Entries and their values.

        Raises:
            ValueError: an entry has another value.
        """
        config, parameters = self.config(name), inspect.signature(self.models[name]).parameters
        for key, value in expected.items():
            if (found := config.get(key, parameters[key].default)) != value:
                raise ValueError(f"{self.part(name)} has {key}={found}, but {what} has {value}; pass a model of that kind")

    def _check_weights(self, name: str) -> None:
        """Refuses weights that are absent, pickled or cut short, from the safetensors headers alone."""
        folder, stem, (paths, variant) = self.part(name), _stem(name), self.weights(name)
        if not paths:
            found = {match[1] for path in folder.iterdir() if (match := re.match(rf"{stem}\.(\w+)(-\d+-of-\d+)?\.safetensors$", path.name))}
            if found:
                raise ValueError(
                    f"no {stem}.safetensors in {folder}, but weights of the variant {' and '.join(sorted(found))}; "
                    f"pass --env.variant {min(found)}"
                )
            others = ", ".join(sorted(p.name for p in folder.iterdir() if p.name != "config.json")) or "nothing"
            raise ValueError(
                f"no {stem}.safetensors in {folder} (there: {others}); only safetensors is read, since a pickle can run any code: "
                "fetch it again, or convert a pickle that you trust with diffusers' save_pretrained(safe_serialization=True)"
            )
        if missing := _lacking_weights(self.path, name, variant):
            raise ValueError(f"{folder} lacks {', '.join(missing)}; fetch it again")
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    adapted = next((key for key in sorted(file.keys()) if any(part in key for part in ADAPTER_KEYS)), None)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error
            if adapted is not None:
                raise ValueError(
                    f"{path} holds adapters that are not fused, such as {adapted!r}; save the model again where it was made, after "
                    "pipe.fuse_lora() and pipe.unload_lora_weights()"
                )

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """Loads a model onto the CPU, in evaluation mode and without gradient.

        Args:
            name: The component.
            dtype: Precision of the model, whatever the folder's own.

        Raises:
            ValueError: the weights do not fit the configuration, or hold NaN or infinite values.
        """
        component, folder, variant = self.models[name], self.part(name), self.weights(name)[1]
        try:
            model, info = component.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, torch_dtype=dtype, variant=variant
            )
        except Exception as error:  # a configuration's wrong values lead to errors of many kinds
            raise ValueError(f"cannot load {folder} as {component.__name__} ({error}); fetch it again") from error
        if info["missing_keys"]:  # diffusers initialises them at random without an error
            missing = sorted(info["missing_keys"])
            count = f"{len(missing)} of {component.__name__}'s tensors"
            raise ValueError(f"{folder} lacks {count}, the first is {missing[0]!r}; fetch it again")
        if _stem(name) == STEM and (unused := sorted(info["unexpected_keys"])):
            raise ValueError(
                f"{folder} holds {len(unused)} tensors that a {component.__name__} of this configuration has no place for, the first is "
                f"{unused[0]!r}; pass a model without them"
            )
        for tensor_name, tensor in model.named_parameters():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{folder} holds non-finite values in {tensor_name!r}; fetch it again")
        return model.eval().requires_grad_(False)

    def tokenizer(self, name: str) -> Any:
        """Loads a tokenizer.

        Raises:
            ValueError: its files are absent or damaged.
        """
        cls = self.tokenizers[name]
        if not (self.path / name).is_dir():
            raise ValueError(f"{self.path} lacks the folder {name}, of its {cls.__name__}; fetch it again")
        try:
            return cls.from_pretrained(self.path / name, local_files_only=True)
        except Exception as error:  # transformers' tokenizers raise errors of many kinds
            raise ValueError(f"cannot load {self.path / name} as {cls.__name__} ({error}); fetch it again") from error

    def licence(self) -> dict[str, str]:
        """The entries license, license_name and license_link of the folder's model card, as far as it has them."""
        try:
            text = (self.path / "README.md").read_text(encoding="utf-8")
            head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
            return {}
        lines = head if isinstance(head, dict) else {}
        return {key: str(lines[key]) for key in ("license", "license_name", "license_link") if lines.get(key)}


def _part(path: Path, name: str, config: str = "config.json") -> Path:
    folder = path / name
    return path if not folder.is_dir() and (path / config).is_file() else folder


def _weight_patterns(stem: str, variant: str | None) -> list[str]:
    """The names of the files of weights, plain and of a variant, with their indices."""
    names = [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"{stem}.safetensors.index.json"]
    if variant is not None:
        names += [f"{stem}.{variant}.safetensors", f"{stem}.{variant}-*-of-*.safetensors", f"{stem}.safetensors.index.{variant}.json"]
    return names


def _find_weights(folder: Path, stem: str, variant: str | None) -> tuple[list[Path], str | None]:
    for found in dict.fromkeys((variant, None)):
        name = stem if found is None else f"{stem}.{found}"
        if paths := [*folder.glob(f"{name}.safetensors"), *sorted(folder.glob(f"{name}-*-of-*.safetensors"))]:
            return paths, found
    return [], None


def _lacking_weights(path: Path, name: str, variant: str | None) -> list[str]:
    """The files of a component, relative to the pipeline's folder, that are not there, though its index of weights names them."""
    folder, stem = _part(path, name), _stem(name)
    lacking = [] if (folder / "config.json").is_file() else [f"{name}/config.json"]
    paths, found = _find_weights(folder, stem, variant)
    index = folder / (f"{stem}.safetensors.index.json" if found is None else f"{stem}.safetensors.index.{found}.json")
    if index.is_file() and not (folder / f"{stem}.safetensors").is_file():
        named = set(read_json(index).get("weight_map", {}).values())
        return lacking + [f"{name}/{file}" for file in sorted(named - {path.name for path in paths})]
    return lacking if paths else [*lacking, f"{name}/{stem}.safetensors"]


def _stem(name: str) -> str:
    """Name of a component's file of weights, without its ending."""
    return STEMS.get(name.rstrip("_0123456789"), STEM)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
