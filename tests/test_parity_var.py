"""Every tensor of the fixtures that the original VAR code made, tokens exactly."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hack_pipelines import HackVARPipeline
from hack_pipelines.cache.cache import FullCache
from hack_pipelines.cache.head_group import HeadGroupCache
from hack_pipelines.methods import Geometry, LayerPlan, Method, Plan, Ranking, StepView
from hack_pipelines.models.autoencoder_msvq import MultiScaleVectorQuantizer
from hack_pipelines.pipelines.sampling import draw_tokens, filter_logits
from hack_pipelines.schedule import Schedule

from .conftest import FIXTURES


FOLDER = FIXTURES / "var"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
TOLERANCES = MANIFEST["tolerances"]
MODELS = list(MANIFEST["models"])


def same_stream() -> bool:
    """Whether this machine draws the random numbers that the fixtures were made with."""
    expected = load_file(FOLDER / "vae_expected.safetensors")
    exponential = torch.empty(2, 8).exponential_(1, generator=torch.Generator().manual_seed(4242))
    return torch.equal(exponential, expected["rng_probe.exponential"])


needs_stream = pytest.mark.skipif(not same_stream(), reason="this build of torch has another random stream")


@pytest.fixture(scope="module")
def vae_expected():
    return load_file(FOLDER / "vae_expected.safetensors")


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    manifest = MANIFEST["models"][name]
    pipe = HackVARPipeline.from_original(
        FOLDER / manifest["weights"],
        FOLDER / MANIFEST["vae"]["weights"],
        config={"transformer": manifest["config"], "tokenizer": MANIFEST["vae"]["config"]},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def expected(name):
    return load_file(FOLDER / MANIFEST["models"][name]["expected"])


@pytest.fixture(scope="module")
def cases(name):
    return MANIFEST["models"][name]["cases"]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: str):
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCES[tolerance], rtol=0)


def run(pipe, case: dict, **overrides):
    """The pipeline called with the original's arguments of a case."""
    arguments = {
        "class_labels": case["labels"],
        "guidance_scale": case["cfg"] + 1,
        "top_k": case["top_k"],
        "top_p": case["top_p"] or 1.0,
        "more_smooth": case["more_smooth"],
        "generator": torch.Generator().manual_seed(case["g_seed"]),
        "output_type": "latent",
    }
    if case["labels"] is None:
        arguments["num_images_per_prompt"] = case["batch"]
    return pipe(**{**arguments, **overrides})


def joined_tokens(out) -> torch.Tensor:
    return torch.cat(out.tokens, dim=1).int()


# -- tokenizer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae():
    name = MODELS[0]
    return HackVARPipeline.from_original(FOLDER / f"{name}.safetensors", FOLDER / "vae.safetensors").vae


def test_tokenizer_encodes(vae, vae_expected):
    schedule = Schedule.from_sides(MANIFEST["vae"]["config"]["patch_nums"])
    with torch.no_grad():
        features = vae.encode(vae_expected["encode.image"])
        close(features, vae_expected["encode.features"], "encode_features")
        tokens = vae.tokenize(features, schedule)
        assert torch.equal(torch.cat(tokens, dim=1).int(), vae_expected["encode.tokens"])
        latents, inputs = torch.zeros_like(features), []
        for step, ids in enumerate(tokens):
            latents, scale_input = vae.accumulate(latents, ids, step, schedule)
            close(latents, vae_expected["encode.f_hat_per_scale"][step], "f_hat")
            inputs += [] if scale_input is None else [scale_input]
        close(torch.cat(inputs, dim=1), vae_expected["encode.var_input"], "var_input")
        close(vae.decode(latents), vae_expected["reconstruct.image"], "reconstruct")
        close(vae(vae_expected["encode.image"], schedule).sample, vae_expected["reconstruct.image"], "reconstruct")


@pytest.mark.parametrize("case", MANIFEST["vae"]["quantizer_cases"])
def test_quantizer_on_released_schedules(vae, vae_expected, case):
    schedule = Schedule.from_sides(MANIFEST["vae"]["quantizer_cases"][case]["patch_nums"])
    ids = vae_expected[f"{case}.tokens"].long()
    latents = torch.zeros(len(ids), vae.config.latent_channels, *schedule.sizes[-1])
    inputs = []
    with torch.no_grad():
        for step, tokens in enumerate(ids.split(schedule.lengths, dim=1)):
            latents, scale_input = vae.accumulate(latents, tokens, step, schedule)
            inputs += [] if scale_input is None else [scale_input]
    close(latents, vae_expected[f"{case}.f_hat"], "f_hat")
    if f"{case}.var_input" in vae_expected:
        close(torch.cat(inputs, dim=1), vae_expected[f"{case}.var_input"], "var_input")


def test_residual_convolution_of_every_scale():
    quantizer = MultiScaleVectorQuantizer(4, 2, 0.5, 4)
    convolutions = list(quantizer.residual_convs)
    for count, indices in MANIFEST["phi_index_by_num_scales"].items():
        steps = range(int(count))
        assert [convolutions.index(quantizer.residual_conv(step, int(count))) for step in steps] == indices


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MANIFEST["vae"]["filter_cases"])
def test_filter(vae_expected, case):
    arguments = MANIFEST["vae"]["filter_cases"][case]
    filtered = filter_logits(vae_expected["filter.logits"].clone(), arguments["top_k"], arguments["top_p"] or 1.0)
    kept = filtered.isfinite()
    wanted = vae_expected[f"filter.{case}.keep"].bool()
    for row in arguments["tie_order_dependent_rows"]:
        assert kept[tuple(row)].sum() == wanted[tuple(row)].sum()
        kept[tuple(row)] = wanted[tuple(row)]
    assert torch.equal(kept, wanted)
    if same_stream():
        generator = torch.Generator().manual_seed(arguments["generator_seed"])
        drawn = draw_tokens(filtered, generator)
        assert torch.equal(drawn.int(), vae_expected[f"filter.{case}.sample"].view_as(drawn).int())


@needs_stream
def test_random_stream(vae_expected):
    generator = torch.Generator().manual_seed(4242)
    probabilities = vae_expected["rng_probe.probs"]
    drawn = draw_tokens(probabilities.log().unsqueeze(0), generator)[0]
    assert torch.equal(drawn.int(), vae_expected["rng_probe.multinomial"].view_as(drawn).int())
    assert torch.equal(torch.rand(2, generator=generator), vae_expected["rng_probe.next_rand"])


# -- transformer -------------------------------------------------------------------------------------------------------


def test_teacher_forcing(pipe, expected, cases):
    hidden, hooks = [], []
    for block in pipe.transformer.transformer_blocks:
        hooks.append(block.register_forward_hook(lambda module, args, output: hidden.append(output)))
    with torch.no_grad():
        labels = torch.tensor(cases["teacher"]["labels"])
        logits = pipe.transformer(expected["teacher.var_input"], labels).logits
    for hook in hooks:
        hook.remove()
    close(logits, expected["teacher.logits"], "teacher_logits")
    for index, states in enumerate(hidden):
        if f"teacher.hidden.{index}" in expected:
            close(states, expected[f"teacher.hidden.{index}"], "hidden")


def test_teacher_input_from_tokens(pipe, expected):
    schedule = pipe.transformer.schedule
    ids = expected["teacher.tokens"].long()
    latents = torch.zeros(len(ids), pipe.vae.config.latent_channels, *schedule.sizes[-1])
    inputs = []
    with torch.no_grad():
        for step, tokens in enumerate(ids.split(schedule.lengths, dim=1)):
            latents, scale_input = pipe.vae.accumulate(latents, tokens, step, schedule)
            inputs += [] if scale_input is None else [scale_input]
    close(torch.cat(inputs, dim=1), expected["teacher.var_input"], "var_input")


class KeepingCache(FullCache):
    """Keeps the last scale too, as the original does, to compare the whole cache."""

    def update(self, key, value, layer_idx, last=False):
        return super().update(key, value, layer_idx, last=False)


def test_greedy(pipe, expected, cases):
    out = run(pipe, cases["greedy"])
    assert torch.equal(joined_tokens(out), expected["greedy.tokens"])
    close(out.images, expected["greedy.f_hat"], "f_hat")
    images = run(pipe, cases["greedy"], output_type="pt").images
    close(images[: len(expected["greedy.image"])], expected["greedy.image"], "image")


def test_greedy_logits_and_cache(pipe, expected, cases):
    if "greedy.raw_logits" not in expected:
        assert "greedy.cache_k.0" not in expected
        return
    case = cases["greedy"]
    labels = torch.tensor(case["labels"])
    labels = torch.cat((labels, torch.full_like(labels, pipe.transformer.config.num_classes)))
    cache = KeepingCache(pipe.transformer.schedule, pipe.transformer.config.num_layers, guided=True)
    logits = []
    predict = pipe.predict

    def watched(*args):
        logits.append(predict(*args))
        return logits[-1]

    pipe.predict = watched
    try:
        with torch.no_grad():
            pipe.draw_scales(labels, cache, pipe.prepare_settings(case["cfg"] + 1, top_k=1, top_p=1.0))
    finally:
        del pipe.predict
    close(torch.cat(logits, dim=1), expected["greedy.raw_logits"], "raw_logits")
    for index in range(pipe.transformer.config.num_layers):
        if f"greedy.cache_k.{index}" in expected:
            close(cache.keys[index], expected[f"greedy.cache_k.{index}"], "cache")
            close(cache.values[index], expected[f"greedy.cache_v.{index}"], "cache")


@needs_stream
@pytest.mark.parametrize("case", ["sampled", "sampled_topk", "sampled_topp", "sampled_plain", "random_label"])
def test_sampled(pipe, expected, cases, case):
    out = run(pipe, cases[case])
    assert torch.equal(joined_tokens(out), expected[f"{case}.tokens"])
    if f"{case}.f_hat" in expected:
        close(out.images, expected[f"{case}.f_hat"], "f_hat")
    if f"{case}.image" in expected:
        images = run(pipe, cases[case], output_type="pt").images
        close(images[: len(expected[f"{case}.image"])], expected[f"{case}.image"], "image")


@needs_stream
def test_random_labels(pipe, expected, cases):
    generator = torch.Generator().manual_seed(cases["random_label"]["g_seed"])
    labels = pipe.encode_class_labels(None, cases["random_label"]["batch"], generator)
    assert torch.equal(labels.int(), expected["random_label.labels"].int())


def test_null_label(pipe, expected, cases):
    assert torch.equal(joined_tokens(run(pipe, cases["null_label"])), expected["null_label.tokens"])


@needs_stream
def test_more_smooth(pipe, expected, cases):
    out = run(pipe, cases["smooth"])
    assert torch.equal(joined_tokens(out), expected["smooth.tokens"])
    close(out.images, expected["smooth.f_hat"], "smooth_f_hat")


# -- cache -------------------------------------------------------------------------------------------------------------


@dataclass
class DropScale(Method):
    """Deletes the keys and values of one scale right after it was drawn, everywhere or in one head of one layer."""

    name: ClassVar[str] = "drop_scale"
    source: ClassVar[str] = "the fixtures"
    protocol: ClassVar[str] = "post"

    scale: int = 0
    layer: int | None = None
    head: int | None = None

    def min_budget(self, geometry, profile):
        return 1

    def plan(self, geometry: Geometry, budget: int, profile, attention_budget=None) -> Plan:
        every = tuple(range(geometry.num_heads))
        layers = []
        for index in range(geometry.num_layers):
            if self.layer is None:
                groups: tuple = (every,)
                drops = (True,)
            elif self.layer == index:
                rest = tuple(head for head in every if head != self.head)
                groups, drops = ((self.head,), rest), (True, False)
            else:
                groups, drops = (every,), (False,)
            layers.append(self._layer(geometry.schedule, groups, drops))
        return Plan(geometry.schedule, geometry.schedule.total, tuple(layers))

    def _layer(self, schedule: Schedule, groups: tuple, drops: tuple) -> LayerPlan:
        attend, store, stored = [], [], (0,) * len(groups)
        for step, length in enumerate(schedule.lengths):
            attend.append(tuple(count + length for count in stored))
            kept = tuple(
                count if drop and step == self.scale else count + length for count, drop in zip(stored, drops)
            )
            stored = kept if step < len(schedule) - 1 else (0,) * len(groups)
            store.append(stored)
        return LayerPlan(groups, ("",) * len(groups), tuple(attend), tuple(store))

    def rank(self, view: StepView):
        scores = torch.zeros(*view.query.shape[:2], view.num_present)
        scores[..., : view.num_stored] = 1
        return Ranking(scores)


def test_eviction_of_a_scale(pipe, expected, cases):
    for scale, tokens in enumerate(expected["evict.tokens"]):
        out = run(pipe, cases["greedy"], kv_budget=1.0, method=DropScale(scale=scale))
        assert torch.equal(joined_tokens(out), tokens), f"scale {scale}"


def test_eviction_of_a_scale_in_one_head(pipe, expected, cases):
    entries = cases["evict_head"]["entries_block_head_scale"]
    for (block, head, scale), tokens in zip(entries, expected["evict_head.tokens"], strict=True):
        out = run(pipe, cases["greedy"], kv_budget=1.0, method=DropScale(scale, block, head))
        assert torch.equal(joined_tokens(out), tokens), f"block {block}, head {head}, scale {scale}"


def test_guidance_of_one_needs_no_unconditional_rows(pipe, cases):
    plain = run(pipe, {**cases["greedy"], "cfg": 0})
    both = run(pipe, {**cases["greedy"], "cfg": 0}, guidance_scale=[1.0 + 1e-30] * len(pipe.transformer.schedule))
    assert torch.equal(joined_tokens(plain), joined_tokens(both))
    assert plain.cache_report.bytes_allocated_peak * 2 == pytest.approx(
        run(pipe, cases["greedy"]).cache_report.bytes_allocated_peak
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**16))
def test_cache_that_keeps_everything_is_exact(heads, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(((1, 1), (1, tokens), (2, tokens)))
    plan = Plan(
        schedule,
        schedule.total,
        (
            LayerPlan.from_limits(
                schedule, (tuple(range(heads)),), ("all",), [(schedule.total,)] * len(schedule), "pre"
            ),
        ),
    )
    grouped, full = HeadGroupCache(plan, DropScale()), FullCache(schedule, 1)
    for length in schedule.lengths:
        parts = [torch.randn(2, heads, length, 8, generator=generator) for _ in range(3)]
        assert torch.equal(grouped.attend(0, *parts), full.attend(0, *parts))
