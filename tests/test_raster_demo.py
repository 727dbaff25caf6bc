"""The raster demo model: its loops agree with one masked pass, and the shipped weights are what their card says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hack_pipelines.hub.sources import DEMO_FOLDER
from hack_pipelines.integrations.next_token import class_tokens, decode_codes

from .components import seeds


ROOT = Path(__file__).parents[1]
FOLDER = DEMO_FOLDER / "raster"
CODES = 1024


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "train_demo" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


raster = load_script("raster")


def masked_nll(model, tokens, classes):
    inputs = torch.cat([class_tokens(model, classes)[:, None], tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=inputs, use_cache=False).logits[:, :, :CODES]
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


@pytest.fixture(scope="module")
def tiny():
    """Random weights, sharp enough that context decides which code comes next."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=CODES + 4,
        num_codes=CODES,
        id2label={0: "cat", 1: "dog", 2: "car"},
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(12)
    return model


@pytest.fixture(scope="module")
def shipped():
    return raster.load_raster(FOLDER)


@pytest.fixture(scope="module")
def held_out():
    arrays = load_file(ROOT / "benchmarks" / "data" / "demo_raster_heldout.safetensors")
    order = torch.randperm(len(arrays["labels"]), generator=torch.Generator().manual_seed(0))[:32]
    return arrays["tokens"][order].long(), arrays["labels"][order]


def test_nll_through_a_cache_is_that_of_one_masked_pass(tiny):
    classes = torch.tensor([0, 1, 2])
    tokens = torch.randint(CODES, (3, 256), generator=torch.Generator().manual_seed(1))
    through_cache = raster.raster_nll(tiny, tokens, classes, batch_size=2)
    assert through_cache.std() > 1
    torch.testing.assert_close(through_cache, masked_nll(tiny, tokens, classes), atol=1e-5, rtol=1e-5)


def test_each_batch_of_the_nll_gets_a_cache_of_its_own(tiny):
    made = []

    def factory():
        made.append(DynamicCache())
        return made[-1]

    raster.raster_nll(tiny, torch.zeros(3, 256, dtype=torch.int16), torch.tensor([0, 1, 2]), factory, batch_size=2)
    assert [cache.layers[0].keys.shape[:3] for cache in made] == [(2, 2, 256), (1, 2, 256)]


def test_without_choice_or_guidance_the_likeliest_code_is_drawn(tiny):
    classes = torch.tensor([1, 2])
    tokens = raster.sample_raster(tiny, classes, guidance_scale=1, top_k=1)
    inputs = torch.cat([class_tokens(tiny, classes)[:, None], tokens[:, :-1]], dim=1)
    with torch.no_grad():
        logits = tiny(input_ids=inputs, use_cache=False).logits[:, :, :CODES]
    assert torch.equal(tokens, logits.argmax(-1))


def test_guidance_takes_two_rows_a_picture_those_with_a_class_first(tiny):
    classes, cache, first = torch.tensor([2, 0]), DynamicCache(), DynamicCache()
    tokens = raster.sample_raster(tiny, classes, guidance_scale=4, past_key_values=cache)
    assert tokens.shape == (2, 256) and tokens.max() < CODES
    with torch.no_grad():
        tiny(input_ids=torch.tensor([[CODES + 2], [CODES], [CODES + 3], [CODES + 3]]), past_key_values=first)
    assert cache.get_seq_length() == 256
    torch.testing.assert_close(cache.layers[1].keys[:, :, :1], first.layers[1].keys)


def test_a_picture_with_its_own_generator_does_not_depend_on_its_batch(tiny):
    classes = torch.tensor([0, 1, 2])
    together = raster.sample_raster(tiny, classes, generator=seeds(0, 1, 2))
    alone = raster.sample_raster(tiny, classes[1:2], generator=seeds(1))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: raster.sample_raster(model, torch.tensor([0, 4])), "from 0 to 3"),
        (lambda model: raster.sample_raster(model, torch.tensor([0]), temperature=0), "temperature"),
        (lambda model: raster.raster_nll(model, torch.zeros(2, 255), torch.tensor([0, 1])), r"\(2, 255\)"),
        (lambda model: raster.raster_nll(model, torch.zeros(2, 256), torch.tensor([0])), "with 1 classes"),
        (lambda model: raster.raster_nll(model, torch.full((1, 256), CODES), torch.tensor([0])), "from 0 to 1023"),
    ],
    ids=["class", "temperature", "length", "classes", "code"],
)
def test_wrong_inputs_are_named(tiny, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny)


def test_a_used_cache_is_refused(tiny):
    cache = DynamicCache()
    with torch.no_grad():
        tiny(input_ids=torch.tensor([[5]]), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 1 tokens"):
        raster.sample_raster(tiny, torch.tensor([0]), past_key_values=cache)


def test_shipped_folder_is_small_and_complete():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {str(path.relative_to(FOLDER)) for path in files} == {
        "NOTICE.md",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "samples.png",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    for path in FOLDER.rglob("*.json"):
        assert not re.search(r'"/\w+/', path.read_text()), path


def test_shipped_model_knows_held_out_pictures_and_their_classes(shipped, held_out):
    """Knowing only how often each code occurs is 5.57 nats a token."""
    model, _ = shipped
    tokens, classes = held_out
    nll = masked_nll(model, tokens, classes)
    torch.testing.assert_close(raster.raster_nll(model, tokens[:4], classes[:4]), nll[:4], atol=1e-5, rtol=1e-5)
    assert nll.mean() < 1.6
    wrong = masked_nll(model, tokens, classes.roll(7)).mean(1) - nll.mean(1)
    assert wrong.mean() > 3 * wrong.std() / len(wrong) ** 0.5


def test_shipped_model_draws_pictures(shipped):
    model, vae = shipped
    tokens = raster.sample_raster(model, torch.tensor([22, 35]), generator=seeds(0, 1))
    images = decode_codes(vae, tokens)
    assert [(image.size, image.mode) for image in images] == [((64, 64), "RGB")] * 2
    # Pictures are on white, and not nothing but white.
    for image in images:
        assert min(image.getpixel((0, 0))) > 200 > min(low for low, _ in image.getextrema())
