"""Finds, checks and reads the files of a diffusers pipeline: in a folder, in the hub's cache or on the hub.

Weights are read from safetensors alone, and no code from a model's folder is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"  # owner/name
STEM = "diffusion_pytorch_model"  # name of the file of weights of diffusers' models
STEMS = {"text_encoder": "model"}  # … and of transformers' models
TOKENIZER_FILES = ("*.json", "merges.txt", "spiece.model")


def locate(model: str, patterns: list[str], local_files_only: bool = False) -> Path:
    """The folder of a pipeline: `model` itself, or a hub id's snapshot.

    The hub's cache is looked up first, so that a rerun reads the same weights. An unreachable hub is given up after seconds.

    Args:
        model: A folder or a hub id.
        patterns: The files to fetch.
        local_files_only: Whether the hub is never asked.

    Raises:
        ValueError: `model` is no folder, and neither the cache nor the hub has it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    cure = "pass --env.model PATH to a folder that holds model_index.json"
    if not re.fullmatch(HUB_ID, model):
        raise ValueError(f"no weights: there is no folder {folder.absolute()}; {cure}, or a hub id such as owner/name")
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    cause: Exception | None = None
    if local_files_only or constants.HF_HUB_OFFLINE:
        hub = "the hub was not asked (" + ("local_files_only" if local_files_only else "HF_HUB_OFFLINE is set") + ")"
    else:
        try:
            model_info(model, timeout=3)  # one quick request first: the download itself would retry for minutes
            return Path(snapshot_download(model, allow_patterns=patterns))
        except Exception as error:  # the errors of requests, httpx or httpx2, depending on the hub client's version
            cause, hub = error, f"the hub {constants.ENDPOINT} did not give it ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    raise ValueError(
        f"no weights: {model!r} is neither a folder ({folder.absolute()}) nor in the hub's cache "
        f"({constants.HF_HUB_CACHE}), and {hub}; {cure}, or run `hf download {model}` on a machine with a network"
    ) from cause


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        ValueError: the file is absent or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); a pipeline's folder is what diffusers' save_pretrained writes") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch it again")
    return value


class PipelineFolder:
    """A folder as diffusers' `save_pretrained` writes it, checked before anything is loaded.

    Args:
        path: The folder.
        pipeline: The class of pipeline that it must hold.
        models: Components that have weights, name → class; the first is the denoiser.
        tokenizers: Tokenizers, name → class.
        optional: Components that model_index.json may leave out.
        without: Components that are not read even if the folder has them.

    Attributes:
        models, tokenizers: The components that are read.
        absent: Names of the components that are not read.
        index: The content of model_index.json.

    Raises:
        ValueError: model_index.json is missing or of another pipeline; or a component is missing, or its weights are missing, pickled
            or cut short.
    """

    def __init__(
        self,
        path: Path,
        pipeline: Any,
        models: Mapping[str, Any],
        tokenizers: Mapping[str, Any] | None = None,
        optional: Collection[str] = (),
        without: Collection[str] = (),
    ) -> None:
        self.path = path
        self.pipeline = pipeline
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"no model_index.json in {path.absolute()}: pass the pipeline's own folder, as diffusers' save_pretrained writes it"
            )
        self.index = read_json(path / "model_index.json")
        if (found := self.index.get("_class_name")) != pipeline.__name__:
            raise ValueError(f"{path} holds a {found}; this expert reads a {pipeline.__name__}; pass the folder of one")
        components = {**models, **(tokenizers or {})}
        self.absent = [name for name in components if name in without or self.index.get(name) == [None, None]]
        if missing := [name for name in self.absent if name not in (*optional, *without)]:
            raise ValueError(f"{path / 'model_index.json'} leaves out {', '.join(missing)}, which this expert reads; pass a whole pipeline")
        self.models = {name: cls for name, cls in models.items() if name not in self.absent}
        self.tokenizers = {name: cls for name, cls in (tokenizers or {}).items() if name not in self.absent}
        for name in self.models:
            self._check_weights(name)

    @classmethod
    def find(
        cls,
        model: str,
        pipeline: Any,
        models: Mapping[str, Any],
        tokenizers: Mapping[str, Any] | None = None,
        optional: Collection[str] = (),
        without: Collection[str] = (),
        local_files_only: bool = False,
    ) -> Self:
        """Finds the folder of a path or a hub id; of a hub id only the files that are read are fetched.

        Args:
            model: A folder or a hub id.
            pipeline, models, tokenizers, optional, without: As in the constructor.
            local_files_only: Whether the hub is never asked.

        Raises:
            ValueError: as in the constructor and in `locate`.
        """
        weights = [f"{name}/{_stem(name)}" for name in models if name not in without]
        weights += [STEM]  # a pipeline of one model may have its files at the top of the folder
        patterns = ["model_index.json", "README.md", "config.json", "scheduler_config.json", "scheduler/scheduler_config.json"]
        patterns += [f"{name}/config.json" for name in models]
        patterns += [f"{stem}{end}" for stem in weights for end in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")]
        texts = [name for name in tokenizers or () if name not in without]
        patterns += [f"{name}/{kind}" for name in texts for kind in TOKENIZER_FILES]
        return cls(locate(model, patterns, local_files_only), pipeline, models, tokenizers, optional, without)

    def part(self, name: str, config: str = "config.json") -> Path:
        """The folder of a component: a subfolder, or the pipeline's own folder if the component's files lie there."""
        path = self.path / name
        return self.path if not path.is_dir() and (self.path / config).is_file() else path

    def config(self, name: str) -> dict[str, Any]:
        """Reads a component's config.json.

        Raises:
            ValueError: the file cannot be read.
        """
        return read_json(self.part(name) / "config.json")

    def sha256(self, names: Collection[str]) -> str:
        """The SHA-256 of the components' configurations, weights and tokenizer files, by name and content."""
        files = []
        for name in names:
            stem = _stem(name)
            weights = ("config.json", f"{stem}.safetensors", f"{stem}-*-of-*.safetensors")
            folder, patterns = (self.part(name), weights) if name in self.models else (self.path / name, TOKENIZER_FILES)
            files += [(name, path) for pattern in patterns for path in sorted(folder.glob(pattern))]
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            digests = list(pool.map(_sha256, (path for _, path in files)))
        listing = [(name, path.name, digest) for (name, path), digest in zip(files, digests, strict=True)]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def require(self, name: str, what: str, **expected: Any) -> None:
        """Checks a component's configuration; an entry that the configuration leaves out counts as equal.

        Args:
            name: The component.
            what: What the error says the component should be.
            expected: Entries and their values.

        Raises:
            ValueError: an entry has another value.
        """
        config = self.config(name)
        for key, value in expected.items():
            if (found := config.get(key, value)) != value:
                raise ValueError(f"{self.part(name)} has {key}={found}, but {what} has {value}; pass a model of that kind")

    def _check_weights(self, name: str) -> None:
        """Refuses weights that are absent, pickled or cut short, from the safetensors headers alone."""
        self.config(name)
        folder, stem = self.part(name), _stem(name)
        paths = [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")]
        if not paths:
            others = ", ".join(sorted(p.name for p in folder.iterdir() if p.name != "config.json")) or "nothing"
            raise ValueError(
                f"no {stem}.safetensors in {folder} (there: {others}); only safetensors is read, since a pickle can run any code: "
                "fetch it again, or convert a pickle that you trust with diffusers' save_pretrained(safe_serialization=True)"
            )
        for path in paths:
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """Loads a model onto the CPU, in evaluation mode and without gradient.

        Args:
            name: The component.
            dtype: Precision of the model, whatever the folder's own.

        Raises:
            ValueError: the weights do not fit the configuration, or hold NaN or infinite values.
        """
        component, folder = self.models[name], self.part(name)
        try:
            model, info = component.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, torch_dtype=dtype
            )
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(f"cannot load {folder} as {component.__name__} ({error}); fetch it again") from error
        if info["missing_keys"]:  # diffusers initialises them at random without an error
            missing = sorted(info["missing_keys"])
            count = f"{len(missing)} of {component.__name__}'s tensors"
            raise ValueError(f"{folder} lacks {count}, the first is {missing[0]!r}; fetch it again")
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


def _stem(name: str) -> str:
    """Name of a component's file of weights, without its ending."""
    return STEMS.get(name.rstrip("_0123456789"), STEM)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
