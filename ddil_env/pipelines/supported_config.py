"""The entries of a pipeline's configuration that are supported here.

A component's class builds itself from most entries of its config.json; a pipeline reads the others when it calls the component or uses what
it returns. The lists below hold the entries of the first kind, for each class; a family names those of the second kind that it supports.
Every other entry must be at its default, or an error names the entry: no entry is ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from reprlib import repr as short
from typing import Any

import diffusers

_UNET = (
    "sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types mid_block_type up_block_types "
    "block_out_channels layers_per_block downsample_padding mid_block_scale_factor dropout act_fn norm_num_groups norm_eps "
    "attention_head_dim resnet_time_scale_shift time_embedding_type time_embedding_dim "
)
ARCHITECTURE: dict[str, set[str]] = {
    name: set(entries.split())
    for name, entries in {
        "UNet2DConditionModel": _UNET
        + "only_cross_attention cross_attention_dim transformer_layers_per_block reverse_transformer_layers_per_block num_attention_heads "
        "dual_cross_attention use_linear_projection upcast_attention resnet_skip_time_act resnet_out_scale_factor time_embedding_act_fn "
        "timestep_post_act conv_in_kernel conv_out_kernel mid_block_only_cross_attention cross_attention_norm "
        "addition_embed_type_num_heads",
        "UNet2DModel": _UNET + "downsample_type upsample_type attn_norm_num_groups add_attention",
        "SD3Transformer2DModel": "sample_size patch_size in_channels num_layers attention_head_dim num_attention_heads joint_attention_dim "
        "caption_projection_dim pooled_projection_dim out_channels pos_embed_max_size dual_attention_layers qk_norm",
        "DiTTransformer2DModel": "num_attention_heads attention_head_dim in_channels out_channels num_layers dropout norm_num_groups "
        "attention_bias sample_size patch_size activation_fn num_embeds_ada_norm upcast_attention norm_type norm_elementwise_affine "
        "norm_eps",
        "AutoencoderKL": "down_block_types up_block_types block_out_channels layers_per_block act_fn latent_channels norm_num_groups "
        "sample_size scaling_factor force_upcast use_quant_conv use_post_quant_conv mid_block_add_attention",
    }.items()
}
FORMER_NAMES = {"Transformer2DModel": "DiTTransformer2DModel"}  # names that configurations of older diffusers give a class
PIPELINE = {"force_zeros_for_empty_prompt", "requires_safety_checker", "id2label"}  # entries of model_index.json that are read

_SAMPLER = """
    timestep_spacing steps_offset set_alpha_to_one skip_prk_steps clip_sample clip_sample_range sample_max_value thresholding
    dynamic_thresholding_ratio variance_type interpolation_type use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_lu_lambdas
    solver_order solver_type solver_p algorithm_type lower_order_final euler_at_final final_sigmas_type lambda_min_clipped predict_x0
    disable_corrector original_inference_steps timestep_scaling s_noise s_churn stochastic_sampling time_shift_type predictor_order
    corrector_order tau_func noise_sampler_seed tensor_format
"""
# Entries of a scheduler that concern its steps alone: the library steps by its own sampler, and reads of a scheduler only the noise.
SAMPLER = set(_SAMPLER.split())


def check_supported(path: Path, config: dict[str, Any], cls: Any, supported: Collection[str]) -> None:
    """Checks that every entry of a component's configuration is supported.

    Args:
        path: The configuration's file, for the message.
        config: Its content.
        cls: The component's class. What a class of transformers is built from is its own; nothing of it is checked but attention masks.
        supported: Entries beside the class's own ones that the caller supports.

    Raises:
        ValueError: it is of another class, or an entry that is neither the class's nor in `supported` is not at its default.
    """
    if not issubclass(cls, diffusers.ModelMixin):
        if config.get("use_attention_mask"):  # the one entry of a text encoder that pipelines read
            raise ValueError(
                f"{path} has use_attention_mask=True, which is not supported: texts are read without a mask; pass another model"
            )
        return
    named = config.get("_class_name", cls.__name__)
    if FORMER_NAMES.get(named, named) != cls.__name__:
        raise ValueError(f"{path} is of a {named}; this expert reads a {cls.__name__} there; pass a pipeline that has one")
    known = inspect.signature(getattr(diffusers, named)).parameters
    for key, value in config.items():
        if key.startswith("_") or key in ARCHITECTURE[cls.__name__] or key in supported:
            continue
        if key not in known:
            if value in (None, False):
                continue
            raise ValueError(
                f"{path} has {key}={short(value)}, which the {named} of diffusers {diffusers.__version__} does not know; update diffusers, "
                "or remove the entry if it means nothing"
            )
        default = known[key].default
        if value != (list(default) if isinstance(default, tuple) else default):
            raise ValueError(
                f"{path} has {key}={short(value)}, which this expert does not support: its pictures would not be the pipeline's; "
                f"need {short(default)}: pass another model"
            )


def check_class(path: Path, name: str, entry: Any, cls: Any) -> None:
    """Checks the class that a model_index.json gives a component, [library, class], which diffusers goes by; None is no entry.

    Raises:
        ValueError: another class.
    """
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else cls.__name__
    if FORMER_NAMES.get(named, named) != cls.__name__:
        raise ValueError(f"{path} has a {named} as {name}; this expert reads a {cls.__name__} there; pass a pipeline that has one")


def check_index(path: Path, index: dict[str, Any], pipeline: Any) -> None:
    """Checks the entries of a model_index.json that are no components.

    Raises:
        ValueError: one is neither read nor at its default.
    """
    known = inspect.signature(pipeline).parameters
    for key, value in index.items():
        if key.startswith("_") or key in PIPELINE or (isinstance(value, list) and len(value) == 2) or value is None:
            continue
        if key not in known or value != known[key].default:
            raise ValueError(f"{path} has {key}={short(value)}, which this expert does not support; pass another model")


def check_scheduler(path: Path, class_name: str, config: dict[str, Any], noise: dict[str, tuple[Any, ...] | None]) -> dict[str, Any]:
    """Checks that every entry of a scheduler that concerns the noise is supported.

    Args:
        path: The scheduler's file, for the message.
        class_name: A scheduler of diffusers.
        config: The content of the file.
        noise: The entries that the caller reads, and the values that each may have; None for any.

    Returns:
        The entries that are read, with the class's defaults for those that the file leaves out; None for one that the class does not have.

    Raises:
        ValueError: an entry has another value; or one that is neither read nor the sampler's own is not at the class's default.
    """
    known = inspect.signature(getattr(diffusers, class_name)).parameters
    found = {key: config.get(key, known[key].default if key in known else None) for key in noise}
    for key, values in noise.items():
        if values is not None and found[key] not in values:
            supported = ", ".join(map(str, values))
            raise ValueError(f"{path}: {class_name} with {key}={short(found[key])} is not supported; supported: {supported}")
        if key in config and key not in known and values is not None and found[key] != values[0]:
            raise ValueError(
                f"{path}: {class_name} with {key}={short(found[key])} is not supported; supported: {values[0]}, since that scheduler does "
                "not read it; name one that does, such as DDIMScheduler"
            )
    for key, value in config.items():
        default = known[key].default if key in known else None
        if not key.startswith("_") and key not in noise and key not in SAMPLER and value not in (None, default):
            raise ValueError(f"{path}: {class_name} with {key}={short(value)} is not supported; supported: {short(default)}")
    return found
