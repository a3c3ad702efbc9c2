"""The README.md of a saved student: how its pipeline is called, what it learned from, and its teacher's licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ddil_env.adapters import LORA_FILE, adapter_layers
from ddil_env.denoiser import NetworkDenoiser
from ddil_env.guidance import GuidanceConditioning
from ddil_env.pipelines.find import HUB_ID

if TYPE_CHECKING:
    from ddil_env.pipelines.expert import PipelineExpert


def model_card(
    expert: PipelineExpert,
    student: NetworkDenoiser,
    num_steps: int,
    call: dict[str, Any],
    kernel: str,
    guidance: GuidanceConditioning | None,
) -> str:
    """The text of the card, with the metadata that the hub reads at its top.

    Args:
        expert: The teacher.
        student: Whose folder the card is for.
        num_steps, kernel: How it samples.
        call: The arguments of the pipeline's call, beside its subject.
        guidance: The guidance of a student with a guidance embedding, if it is known.
    """
    pipeline = expert.files.pipeline
    licence = expert.files.licence()
    head: dict[str, Any] = {"library_name": "diffusers", "license": "unknown", **licence, "tags": ["ddil", "distillation", "few-step"]}
    if expert.task is not None:
        head["pipeline_tag"] = expert.task
    if re.fullmatch(HUB_ID, expert.model) and not Path(expert.model).is_dir():
        head["base_model"] = expert.model
    scales = "any of the range that it was trained on"
    if guidance is not None:
        scales += f", {guidance.low:g} to {guidance.high:g}"
    about_guidance = GUIDANCE_IS_AN_INPUT.format(scales) if student.guidance_embedding else GUIDANCE_IS_LEARNED
    return CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        num_steps=num_steps,
        pipeline=pipeline.__name__,
        absent="".join(f", {name}=None" for name in expert.files.absent),  # diffusers learns of absent components from the call alone
        call=", ".join([expert.example, *(f"{name}={value}" for name, value in call.items())]),
        guidance=about_guidance if "guidance_scale" in call else "",
        noise=FRESH_NOISE if kernel == "renoise" and num_steps > 1 else "",
        adapters=_describe_adapters(student, pipeline),
        data=expert.describe_data(),
        licence=LICENCE.format(licence.get("license_name", licence["license"])) if "license" in licence else NO_LICENCE,
    )


def _describe_adapters(student: NetworkDenoiser, pipeline: Any) -> str:
    """The paragraph on the file of adapters; empty where the student has none."""
    if not adapter_layers(student.network):
        return ""
    if student.guidance_embedding:
        use = "holds the guidance embedding too, which\n`load_lora_weights` refuses: the student is this folder."
    elif not hasattr(pipeline, "load_lora_weights"):
        use = f"holds them alone,\nand a {pipeline.__name__} reads no such file: the student is this folder."
    else:
        use = LOAD_OVER_TEACHER
    return ADAPTERS.format(file=LORA_FILE, use=use)


CARD = """---
{head}---
A {num_steps}-step student of a diffusion model, trained by imitation of its teacher with ddil_agents.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("student", use_safetensors=True{absent})  # a {pipeline}
output = pipe({call})
output.images[0].save("sample.png")
```

{guidance}{noise}{adapters}
Its data: {data}.

Licence of the teacher, which holds for its students too: {licence}.
"""

LICENCE = "`{}`, as its model card states"

NO_LICENCE = "unknown: its folder states none; look it up before you pass the student on, and enter it above"

GUIDANCE_IS_LEARNED = """`guidance_scale=1.0` runs the network once a step. It is right for a student of a guided teacher, which has
learned the guidance. A student of an unguided teacher can be guided like any pipeline.
"""

GUIDANCE_IS_AN_INPUT = """The network reads `guidance_scale` as an input: {}; 1.0 is no guidance.
It runs once a step whatever the scale.
"""

FRESH_NOISE = """
Every step but the last draws fresh noise; for the same picture again, call `torch.manual_seed(0)` before, and pass no generator.
Where `timesteps` are given, the scheduler may warn that they are not its own: they are the student's.
"""

ADAPTERS = """
The network is its teacher's with LoRA adapters added to the weights. `{file}` {use}
"""

LOAD_OVER_TEACHER = """holds them alone: over the
teacher's own pipeline, `teacher`, they make the same student.

```python
teacher.load_lora_weights("student")
teacher.scheduler = pipe.scheduler
```"""
