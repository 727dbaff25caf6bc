"""
diffusers' own tester classes on our models and pipelines.

They are neither in the wheel of diffusers nor in an extra, so they come from a checkout:

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    DIFFUSERS_CHECKOUT=diffusers pytest tests/test_diffusers_testers.py

What does not hold is in `DEVIATIONS`, each with its reason; a deviation that has come to hold fails.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hack_pipelines import (
    HackVARClassPipeline,
    HackVARTextPipeline,
    InfinityTransformer2DModel,
    MultiScaleBSQModel,
    MultiScaleVQModel,
    VARTransformer2DModel,
)
from hack_pipelines.models.transformer_infinity import InfinityCondition
from hack_pipelines.schedule import Schedule

from .components import SIDES, tiny_bsq, tiny_text_encoder, tiny_text_transformer, tiny_transformer, tiny_vae


CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip(
        "DIFFUSERS_CHECKOUT does not name a checkout of diffusers: "
        "git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers",
        allow_module_level=True,
    )

# Their tests are a package called `tests`, as ours are, so they are imported under another name. The packages are made
# here and not by their `__init__`, which import testers of what we do not have.
PACKAGE = "diffusers_tests"
pytest.register_assert_rewrite(PACKAGE)
for folder in ("", "models", "models/testing_utils", "pipelines", "pipelines/testing_utils"):
    package = ModuleType(".".join([PACKAGE, *Path(folder).parts]))
    package.__path__ = [str(Path(CHECKOUT, "tests", folder).resolve())]
    sys.modules[package.__name__] = package

testing_utils = importlib.import_module(f"{PACKAGE}.testing_utils")
device, require_accelerator = testing_utils.torch_device, testing_utils.require_accelerator


def theirs(path: str) -> type:
    """A class of diffusers' tests, by its path from there."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)


BaseModelTesterConfig = theirs("models.testing_utils.common.BaseModelTesterConfig")
BasePipelineTesterConfig = theirs("pipelines.testing_utils.common.BasePipelineTesterConfig")

SCHEDULE = Schedule.from_sides(SIDES)
LATER_TOKENS = SCHEDULE.total - SCHEDULE.lengths[0]
ROWS = 2


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


class ModelConfig(BaseModelTesterConfig):
    """What the testers of a model need; the configuration is that of our own tiny model."""

    def get_init_dict(self):
        return {name: value for name, value in self.tiny().config.items() if not name.startswith("_")}


class VARTransformer(ModelConfig):
    model_class = VARTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (SCHEDULE.total, 32)
    checkpointed = {"VARTransformer2DModel"}
    tiny = staticmethod(tiny_transformer)

    def get_dummy_inputs(self):
        return {
            "hidden_states": random(ROWS, LATER_TOKENS, 8),
            "class_labels": torch.arange(ROWS, device=device),
        }


class InfinityTransformer(ModelConfig):
    model_class = InfinityTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (SCHEDULE.total, 16)
    checkpointed = {"InfinityTransformer2DModel"}
    tiny = staticmethod(tiny_text_transformer)

    def get_dummy_inputs(self):
        return {
            "hidden_states": random(ROWS, LATER_TOKENS, 8),
            "condition": InfinityCondition([random(length + 3, 32) for length in range(ROWS)], guided=False),
            "schedule": SCHEDULE,
        }


class Tokenizer(ModelConfig):
    main_input_name = "images"
    output_shape = (3, 8, 8)
    checkpointed = {"Encoder", "Decoder", "UNetMidBlock2D"}

    def get_dummy_inputs(self):
        return {"images": random(ROWS, 3, 8, 8).tanh(), "schedule": SCHEDULE}


class VQTokenizer(Tokenizer):
    model_class = MultiScaleVQModel
    tiny = staticmethod(tiny_vae)


class BSQTokenizer(Tokenizer):
    model_class = MultiScaleBSQModel
    tiny = staticmethod(tiny_bsq)


class PipelineConfig(BasePipelineTesterConfig):
    """What the testers of a pipeline need."""

    optional_input_params = frozenset(["num_images_per_prompt", "generator", "output_type", "return_dict"])
    output_shape = (3, 8, 8)

    def get_pipeline(self, **components):
        """The testers save pickled weights, which our pipelines refuse to load: they are made to save safetensors."""
        pipe = super().get_pipeline(**components)
        save_pretrained = pipe.save_pretrained
        pipe.save_pretrained = lambda *args, **kwargs: save_pretrained(*args, **{**kwargs, "safe_serialization": True})
        return pipe

    def get_dummy_inputs(self):
        return {"generator": self.get_generator(), "output_type": "pt"}


class ClassPipeline(PipelineConfig):
    pipeline_class = HackVARClassPipeline
    required_input_params_in_call_signature = frozenset(["class_labels", "guidance_scale"])
    batch_input_params = frozenset(["class_labels"])

    def get_dummy_components(self):
        return {"transformer": tiny_transformer(), "vae": tiny_vae()}

    def get_dummy_inputs(self):
        return {"class_labels": 3, **super().get_dummy_inputs()}


class TextPipeline(PipelineConfig):
    pipeline_class = HackVARTextPipeline
    required_input_params_in_call_signature = frozenset(
        ["prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds", "negative_prompt_embeds"]
    )
    batch_input_params = frozenset(["prompt", "negative_prompt"])

    def get_dummy_components(self):
        text_encoder, tokenizer = tiny_text_encoder()
        components = {"transformer": tiny_text_transformer(), "vae": tiny_bsq()}
        return {**components, "text_encoder": text_encoder, "tokenizer": tokenizer}

    def get_dummy_inputs(self):
        schedule = [list(size) for size in SCHEDULE.sizes]
        return {"prompt": "a lighthouse in storm", "scale_schedule": schedule, **super().get_dummy_inputs()}


class TrainingTesterMixin(theirs("models.testing_utils.training.TrainingTesterMixin")):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set=self.checkpointed)


# On their own these do not say that they need a second device; the class that bundles them in diffusers does.
CPUOffloadTesterMixin = require_accelerator(theirs("models.testing_utils.memory.CPUOffloadTesterMixin"))
GroupOffloadTesterMixin = require_accelerator(theirs("models.testing_utils.memory.GroupOffloadTesterMixin"))


class PipelineTesterMixin(theirs("pipelines.testing_utils.common.PipelineTesterMixin")):
    def test_inference_batch_single_identical(self):
        # Steps are scales, which the model fixes: there is no `num_inference_steps` to hand on.
        super().test_inference_batch_single_identical(additional_params_copy_to_batched_inputs=[])


# Not among them: `AttentionBackendTesterMixin`, which casts to bfloat16 and declines models with `_keep_in_fp32_modules`
# (test_attention_backends.py stands for it), and the testers of quantization, LoRA, IP adapters, single files, context
# and tensor parallelism and step caches, none of which these models have.
COMPOSITIONS = (
    (
        (VARTransformer, InfinityTransformer, VQTokenizer, BSQTokenizer),
        (
            theirs("models.testing_utils.common.ModelTesterMixin"),
            theirs("models.testing_utils.attention.AttentionTesterMixin"),
            TrainingTesterMixin,
            theirs("models.testing_utils.compile.TorchCompileTesterMixin"),
            theirs("models.testing_utils.memory.LayerwiseCastingTesterMixin"),
            CPUOffloadTesterMixin,
            GroupOffloadTesterMixin,
        ),
    ),
    (
        (ClassPipeline, TextPipeline),
        (
            PipelineTesterMixin,
            theirs("pipelines.testing_utils.memory.LayerwiseCastingTesterMixin"),
            theirs("pipelines.testing_utils.memory.PipelineOffloadTesterMixin"),
            theirs("pipelines.testing_utils.memory.GroupOffloadTesterMixin"),
        ),
    ),
)
CLASSES = {
    f"Test{config.__name__}{tester.__name__.removesuffix('TesterMixin')}": (config, tester)
    for configs, testers in COMPOSITIONS
    for config in configs
    for tester in testers
}
globals().update({name: type(name, bases, {}) for name, bases in CLASSES.items()})

# What of the testers does not hold for a configuration: how it fails, and why.
DEVIATIONS = {
    (InfinityTransformer, "test_compile_works_with_aot"): (
        ValueError,
        "`torch.export` does not take the class of the condition",
    ),
    (Tokenizer, "test_compile_works_with_aot"): (
        ValueError,
        "`torch.export` does not take the class of the schedule",
    ),
    (Tokenizer, "test_torch_compile_repeated_blocks"): (
        ValueError,
        "a convolutional autoencoder has no repeated block",
    ),
    (PipelineConfig, "test_callback_cfg"): (
        AttributeError,
        "a call fixes a weight of guidance for each scale: there is no one weight to add to",
    ),
    (PipelineConfig, "test_loading_with_incorrect_variants_raises_error"): (
        AssertionError,
        "the `ValueError` that it wants is in our words, which name the folder and say what to do",
    ),
    (TextPipeline, "test_save_load_optional_components"): (
        ValueError,
        "gives a prompt to a pipeline without its text encoder, which takes `prompt_embeds` only",
    ),
    (TextPipeline, "test_encode_prompt_works_in_isolation"): (
        AttributeError,
        "reads the source of the class of that name inside `diffusers.pipelines`, where ours is not",
    ),
}


@pytest.fixture(autouse=True)
def deviation(request):
    """Mark what is in `DEVIATIONS` as expected to fail."""
    for (config, test), (error, reason) in DEVIATIONS.items():
        if request.cls is not None and issubclass(request.cls, config) and request.node.originalname == test:
            request.applymarker(pytest.mark.xfail(raises=error, reason=reason, strict=True))


def test_deviations_name_tests_that_are_run():
    for config, test in DEVIATIONS:
        assert any(issubclass(bases[0], config) and hasattr(bases[1], test) for bases in CLASSES.values())
