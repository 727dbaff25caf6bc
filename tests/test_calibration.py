"""Recording attention statistics, and the profiles made from them."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hack_pipelines import FullCache, HackVARClassPipeline, HeadProfile, MultiScaleVQModel, VARTransformer2DModel
from hack_pipelines.cache import recording
from hack_pipelines.cache.recording import RecordingCache
from hack_pipelines.calibration import calibrate, split_half_correlation
from hack_pipelines.profiles.statistics import statistic_shapes
from hack_pipelines.schedule import Schedule


SQUARE = Schedule.from_sides((1, 2, 3, 6))
# From 6 to 9 rows some tokens lie exactly at the edge of what is local.
OBLONG = Schedule(((1, 1), (2, 1), (4, 2), (6, 5), (9, 5)))
LAYERS, HEADS, DIM = 2, 3, 8


def random_steps(schedule, rows, dtype=torch.float32, seed=0, sharpness=3.0):
    """Queries, keys and values by step and layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            tuple(
                (torch.randn(rows, HEADS, length, DIM, generator=generator) * factor).to(dtype)
                for factor in (sharpness, 1.0, 1.0)
            )
            for _ in range(LAYERS)
        ]
        for length in schedule.lengths
    ]


def run(cache, steps, scale=0.5):
    return [cache.attend(layer, *parts, scale) for step in steps for layer, parts in enumerate(step)]


def record(schedule, steps, guided=False, query_chunk=256):
    cache = RecordingCache(schedule, LAYERS, guided, query_chunk)
    run(cache, steps)
    return cache.statistics


def is_local(query, query_size, token, token_size, radius):
    """The definition, in exact fractions."""
    half = Fraction(1, 2)
    return all(
        abs((query[axis] + half) / query_size[axis] - (token[axis] + half) / token_size[axis])
        <= (radius + half) / token_size[axis]
        for axis in (0, 1)
    )


def oracle(schedule, steps, images, scale=0.5):
    """All arrays from whole matrices, with loops, in float64."""
    result = {
        name: np.zeros((images, *shape)) for name, shape in statistic_shapes(LAYERS, HEADS, len(schedule)).items()
    }
    tokens = [
        (s, divmod(place, size[1])) for s, size in enumerate(schedule.sizes) for place in range(size[0] * size[1])
    ]
    for step, prefix in enumerate(schedule.prefixes):
        present = tokens[: prefix + schedule.lengths[step]]
        queries = present[prefix:]
        local = {
            radius: np.array(
                [
                    [
                        schedule.lengths[s] >= 25
                        and is_local(place, schedule.sizes[step], token, schedule.sizes[s], radius)
                        for s, token in present
                    ]
                    for _, place in queries
                ]
            )
            for radius in (1, 2)
        }
        for image, layer, head in np.ndindex(images, LAYERS, HEADS):
            at = (image, layer, head, step)
            query, key, value = (
                [part[image, head].double().numpy() for part in (parts[layer][i] for parts in steps[: step + 1])]
                for i in range(3)
            )
            logits = scale * query[-1] @ np.concatenate(key).T
            attention = np.exp(logits - logits.max(1, keepdims=True))
            attention /= attention.sum(1, keepdims=True)
            for s in range(step + 1):
                columns = [j for j, (source, _) in enumerate(present) if source == s]
                result["mass"][(*at, s)] = attention[:, columns].sum(1).mean()
            result["colvar"][at] = attention.var(0).sum()
            descending = -np.sort(-attention[:, :prefix], 1)
            for index, count in enumerate((1, 4, 16, 64)):
                result["topk_hist"][(*at, index)] = descending[:, :count].sum(1).mean()
            for index, radius in enumerate((1, 2)):
                result["local"][(*at, index)] = (attention * local[radius]).sum(1).mean()
            result["entropy"][at] = -(attention * np.log(attention)).sum(1).mean()
            result["vnorm"][at] = np.linalg.norm(value[-1], axis=1).mean()
    return result


# The arrays


@pytest.mark.parametrize("schedule", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_equal_the_oracle(schedule, guided, dtype):
    steps = random_steps(schedule, rows=4, dtype=dtype)
    found = record(schedule, steps, guided, query_chunk=7)
    expected = oracle(schedule, steps, images=2 if guided else 4)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array, rtol=1e-5, atol=1e-7, err_msg=name)


def test_half_precision_changes_the_statistics_little():
    """Attention reads bfloat16, so the statistics are those of the rounded queries and keys, near those before."""
    exact = record(SQUARE, random_steps(SQUARE, 2))
    rounded = record(SQUARE, random_steps(SQUARE, 2, torch.bfloat16))
    for name, array in exact.items():
        torch.testing.assert_close(rounded[name], array, rtol=0.05, atol=0.02, msg=name)
    assert not torch.equal(exact["colvar"], rounded["colvar"])


@pytest.mark.parametrize("query_chunk", [1, 5, 36, 1000])
def test_chunks_do_not_matter(query_chunk):
    steps = random_steps(OBLONG, 2)
    expected, found = record(OBLONG, steps), record(OBLONG, steps, query_chunk=query_chunk)
    for name, array in expected.items():
        torch.testing.assert_close(found[name], array, rtol=1e-5, atol=1e-7, msg=name)


def test_mass_sums_to_one_and_lies_in_the_past():
    mass = record(OBLONG, random_steps(OBLONG, 3))["mass"]
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass[..., 0]), rtol=0, atol=1e-6)
    assert torch.equal(mass, mass.tril()), "no step looks at a later scale"


def test_variance_of_nearly_equal_rows_does_not_cancel():
    """Contextual heads: the rows differ in the third digit, so squares near 1 differ by less than float32 resolves."""
    steps = random_steps(SQUARE, 1, sharpness=1e-3)
    for step in steps:
        for query, _, _ in step:
            query += 3
    found, expected = record(SQUARE, steps, query_chunk=5)["colvar"], oracle(SQUARE, steps, images=1)["colvar"]
    assert 0 < expected[..., -1].max() < 1e-6
    np.testing.assert_allclose(found[..., 1:], expected[..., 1:], rtol=2e-2)


def test_equal_rows_have_no_variance():
    steps = random_steps(SQUARE, 1, sharpness=0.0)
    variances = record(SQUARE, steps, query_chunk=5)["colvar"]
    assert variances.min() >= 0
    assert variances.max() < 1e-12


def test_images_are_recorded_apart():
    steps = random_steps(SQUARE, 3)
    together = record(SQUARE, steps)
    for image in range(3):
        alone = record(
            SQUARE, [[tuple(part[image : image + 1] for part in parts) for parts in step] for step in steps]
        )
        for name, array in alone.items():
            torch.testing.assert_close(together[name][image : image + 1], array, rtol=1e-5, atol=1e-7, msg=name)


def test_attends_exactly_as_the_full_cache():
    steps = random_steps(OBLONG, 4)
    recording_cache, full = RecordingCache(OBLONG, LAYERS, True), FullCache(OBLONG, LAYERS, True)
    for first, second in zip(run(recording_cache, steps), run(full, steps), strict=True):
        assert torch.equal(first, second)
    assert recording_cache.report() == full.report()


def test_autocast_does_not_reach_the_statistics():
    steps = random_steps(SQUARE, 1)
    expected = record(SQUARE, steps)
    with torch.autocast("cpu", torch.bfloat16):
        found = record(SQUARE, steps)
    for name, array in expected.items():
        assert torch.equal(found[name], array), name


def test_reset_starts_a_new_recording():
    cache = RecordingCache(SQUARE, LAYERS)
    run(cache, random_steps(SQUARE, 2, seed=1))
    cache.reset()
    assert cache.statistics == {}
    run(cache, random_steps(SQUARE, 1))
    expected = record(SQUARE, random_steps(SQUARE, 1))
    assert all(torch.equal(array, expected[name]) for name, array in cache.statistics.items())


def test_query_chunk_must_be_positive():
    with pytest.raises(ValueError, match="`query_chunk` must be at least 1 but is 0"):
        RecordingCache(SQUARE, LAYERS, query_chunk=0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(("query_chunk", "limit"), [(32, 2**24), (10**6, 2**16)], ids=["by queries", "by memory"])
def test_no_attention_matrix_is_ever_whole(query_chunk, limit, monkeypatch):
    monkeypatch.setattr(recording, "MAX_CHUNK_ELEMENTS", limit)
    schedule = Schedule.from_sides((1, 8, 24, 40))
    cache = RecordingCache(schedule, 1, query_chunk=query_chunk)
    with LargestTensor() as largest:
        for length in schedule.lengths:
            cache.attend(0, *torch.randn(3, 1, 1, length, 4))
    queries, keys = schedule.lengths[-1], schedule.total
    assert 10 * keys < largest.elements < queries * keys / 20
    assert cache.statistics["mass"][0, 0, 0, -1].sum() == pytest.approx(1, abs=1e-6)


# Head types

PLANTED_TYPES = torch.tensor([[True, False, False, True], [False, False, True, True], [True, False, True, False]])


def positions(size, frequencies=4):
    """Features whose products depend on relative distances within the image, largest at distance 0: `[tokens, 16]`."""
    height, width = size
    grid = torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width)
    angles = (grid.unsqueeze(-1) * torch.pi * torch.arange(1, frequencies + 1)).flatten(1)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def planted_statistics(schedule, images, noise=0.3):
    """Contextual heads look at a few tokens from everywhere (stripes), structural ones at their own place (diagonals)."""
    generator = torch.Generator().manual_seed(0)
    layers, heads = PLANTED_TYPES.shape
    cache = RecordingCache(schedule, layers)
    direction = torch.randn(16, generator=generator)
    direction *= 3 / direction.norm()
    for size, length in zip(schedule.sizes, schedule.lengths):
        place = positions(size)
        stripes = torch.zeros(length, 16)
        stripes[torch.randperm(length, generator=generator)[:2]] = direction
        for layer in range(layers):
            types = PLANTED_TYPES[layer][:, None, None]
            query = torch.where(types, direction, place)
            key = torch.where(types, stripes, place)
            query, key = (
                tensor + noise * torch.randn(images, heads, length, 16, generator=generator) for tensor in (query, key)
            )
            cache.attend(layer, query, key, torch.randn(key.shape, generator=generator))
    return cache.statistics


def as_profile(mean, schedule, seeds=(0,)):
    layers, heads = mean["colvar"].shape[:2]
    return HeadProfile(
        mean=mean,
        variance={name: torch.zeros_like(array) for name, array in mean.items()},
        family="var",
        num_layers=layers,
        num_heads=heads,
        head_dim=16,
        schedule=[list(size) for size in schedule.sizes],
        dtype="float32",
        sampling={},
        inputs=list(seeds),
        seeds=list(seeds),
        software={},
    )


@pytest.mark.parametrize("schedule", [Schedule.from_sides((1, 2, 3, 4, 6, 8)), OBLONG], ids=["square", "oblong"])
def test_planted_heads_are_told_apart_from_one_sample_and_from_every_sample(schedule):
    samples = planted_statistics(schedule, images=6)
    profiles = [as_profile({name: array[i] for name, array in samples.items()}, schedule) for i in range(6)]
    profiles.append(as_profile({name: array.mean(0) for name, array in samples.items()}, schedule))
    for profile in profiles:
        assert profile.scores[PLANTED_TYPES].max() < profile.scores[~PLANTED_TYPES].min()
        assert torch.equal(profile.contextual_heads(0.5), PLANTED_TYPES)
        assert profile.gap(0.5) > 1.5
    local = samples["local"][:, :, :, -1, 0]
    assert local[:, ~PLANTED_TYPES].min() > local[:, PLANTED_TYPES].max(), "diagonals are local, stripes are not"


# Calibration


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = VARTransformer2DModel(
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        num_classes=10,
        vocab_size=32,
        latent_channels=8,
        patch_nums=(1, 2, 3, 4),
    )
    vae = MultiScaleVQModel(vocab_size=32, latent_channels=8, block_out_channels=(32, 32), layers_per_block=1)
    pipe = HackVARClassPipeline(transformer=transformer.eval(), vae=vae.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokens_of(pipe, **arguments):
    return pipe(
        class_labels=[1, 4], generator=torch.Generator().manual_seed(3), output_type="latent", **arguments
    ).tokens


def test_calibrating_twice_gives_the_same_profile(pipe):
    profile = calibrate(pipe, num_samples=3, progress=False)
    assert calibrate(pipe, num_samples=3, progress=False) == profile
    assert calibrate(pipe, num_samples=3, seed=1, progress=False) != profile
    assert profile.scores.shape == (3, 4)
    assert all(array.min() >= 0 for array in profile.variance.values())
    assert profile.variance["colvar"][:, :, 1:].min() > 0
    profile.check_fits(pipe.geometry())


def test_batch_size_does_not_matter(pipe):
    alone = calibrate(pipe, num_samples=5, batch_size=1, progress=False)
    together = calibrate(pipe, num_samples=5, batch_size=3, progress=False)
    assert (alone.inputs, alone.seeds) == (together.inputs, together.seeds)
    for part in ("mean", "variance"):
        for name, array in getattr(alone, part).items():
            torch.testing.assert_close(
                getattr(together, part)[name], array, rtol=1e-3, atol=1e-6, msg=f"{part} {name}"
            )


def test_mean_and_variance_are_those_of_the_samples(pipe):
    singles = [calibrate(pipe, 1, seed=seed, inputs=[seed], progress=False) for seed in range(4)]
    profile = calibrate(pipe, 4, inputs=[0, 1, 2, 3], progress=False)
    for name, array in profile.mean.items():
        samples = torch.stack([single.mean[name] for single in singles]).double()
        torch.testing.assert_close(array, samples.mean(0).float(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(profile.variance[name], samples.var(0, correction=0).float(), rtol=1e-3, atol=1e-10)
    assert all(not array.any() for array in singles[0].variance.values())


def test_profile_says_how_it_was_made(pipe):
    profile = calibrate(pipe, num_samples=4, seed=5, base_model="someone/tiny", base_revision="abc", progress=False)
    assert profile.inputs == [1, 3, 6, 8], "spread evenly over ten classes"
    assert profile.seeds == [5, 6, 7, 8]
    assert (profile.base_model, profile.base_revision) == ("someone/tiny", "abc")
    assert (profile.family, profile.num_layers, profile.num_heads, profile.head_dim) == ("var", 3, 4, 16)
    assert profile.schedule == Schedule.from_sides((1, 2, 3, 4))
    assert profile.dtype == "float32"
    assert profile.sampling["guidance"] == [1, 1.5, 2, 2.5]
    assert profile.sampling["top_k"] == [32] * 4
    assert set(profile.software) == {"hack_pipelines", "torch", "diffusers"}


def test_profile_names_no_folder_of_this_machine(pipe, tmp_path):
    pipe.register_to_config(_name_or_path=str(tmp_path / "my-model"))
    assert calibrate(pipe, 1, progress=False).base_model == "my-model"
    pipe.register_to_config(_name_or_path="someone/tiny")
    assert calibrate(pipe, 1, progress=False).base_model == "someone/tiny"


def test_given_classes_are_taken_in_turn(pipe):
    assert calibrate(pipe, 5, inputs=[7, 2], progress=False).inputs == [7, 2, 7, 2, 7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, dtype):
    pipe.to(dtype)
    profile = calibrate(pipe, 2, progress=False)
    assert profile.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(profile.mean["mass"].sum(-1), torch.ones(3, 4, 4))


def test_pipeline_is_left_as_it_was(pipe):
    expected = tokens_of(pipe)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    pipe._interrupt = True
    config, state = copy.deepcopy(pipe._progress_bar_config), torch.get_rng_state()
    calibrate(pipe, num_samples=2, progress=False)
    assert pipe._progress_bar_config == config
    assert pipe.interrupt is True
    assert torch.equal(torch.get_rng_state(), state)
    assert pipe.head_profile is None
    assert all(torch.equal(*pair) for pair in zip(tokens_of(pipe), expected, strict=True))


def test_state_is_put_back_after_an_error(pipe):
    config = copy.deepcopy(pipe._progress_bar_config)
    with pytest.raises(ValueError, match="10"):
        calibrate(pipe, num_samples=2, inputs=[1, 10], progress=False)
    assert pipe._progress_bar_config == config


def test_an_interrupted_calibration_gives_no_profile(pipe):
    def interrupt(module, args, output):
        pipe._interrupt = True

    handle = pipe.transformer.register_forward_hook(interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        calibrate(pipe, num_samples=2, progress=False)
    handle.remove()
    assert pipe.interrupt is False


def test_recording_run_draws_the_same_tokens(pipe):
    settings, geometry = pipe.prepare_settings(), pipe.geometry()
    condition = pipe.encode_inputs(pipe.calibration_inputs(2), settings.guided)
    drawn = []
    for kind in (FullCache, RecordingCache):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        with torch.no_grad():
            cache = kind(geometry.schedule, geometry.num_layers, settings.guided)
            drawn.append(pipe.draw_scales(condition, cache, settings, generators))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert all(torch.equal(*pair) for pair in zip(drawn[0][1], drawn[1][1], strict=True))


def test_profile_on_the_spot_does_not_depend_on_the_call(pipe):
    first = tokens_of(pipe, kv_budget=0.4)
    assert pipe.head_profile is None
    pipe(class_labels=9, kv_budget=0.5, output_type="latent")
    assert all(torch.equal(*pair) for pair in zip(tokens_of(pipe, kv_budget=0.4), first, strict=True))
    pipe.load_head_profile(calibrate(pipe, num_samples=1, progress=False))
    assert all(torch.equal(*pair) for pair in zip(tokens_of(pipe, kv_budget=0.4), first, strict=True))


def test_progress_is_shown_once(pipe, capsys):
    pipe.set_progress_bar_config()
    calibrate(pipe, num_samples=2)
    shown = capsys.readouterr().err
    assert "Calibrating: 100%" in shown and "2/2" in shown
    assert "4/4" not in shown, "the bar of each image is off"
    calibrate(pipe, num_samples=2, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1 but is 0"),
        ({"batch_size": -1}, "`batch_size` must be at least 1 but is -1"),
        ({"inputs": []}, "`inputs` is empty"),
        ({"inputs": ["cat"]}, "There is no class named 'cat'"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, progress=False, **{"num_samples": 1, **arguments})


def test_split_half_correlation(pipe):
    first = calibrate(pipe, num_samples=3, progress=False)
    assert split_half_correlation(first, first) == pytest.approx(1)
    second = calibrate(pipe, num_samples=3, seed=3, progress=False)
    ranks = [profile.scores.flatten().double().argsort().argsort().double() for profile in (first, second)]
    expected = torch.corrcoef(torch.stack(ranks))[0, 1]
    assert split_half_correlation(first, second) == pytest.approx(float(expected))
    other = as_profile({name: torch.ones(s) for name, s in statistic_shapes(2, 4, 4).items()}, first.schedule)
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
        split_half_correlation(first, other)
