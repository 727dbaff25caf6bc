"""What the memory calculator computes: published sizes, the cache's own report, and the tables of the documents."""

import csv
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from hack_pipelines.activations import block_bytes, cache_work_bytes, decoder_bytes, group_bytes, merge_bytes
from hack_pipelines.cache import FullCache, make_cache
from hack_pipelines.cache.budget import TokenBytes, budget_tokens
from hack_pipelines.cli import main, memory_table
from hack_pipelines.cli import memory as command
from hack_pipelines.memory import (
    MODELS,
    Request,
    cache_bytes,
    estimate,
    even_profile,
    geometry_of,
    held_bytes,
    largest_budget,
    parts_of,
    plan_of,
    text_bytes,
    text_encoder_bytes,
    weight_bytes,
)
from hack_pipelines.methods import METHODS, Geometry, ScaleWindow, get_method
from hack_pipelines.models.infinity_schedules import nearest_schedule
from hack_pipelines.models.transformer_infinity import InfinityCondition, InfinityTransformer2DModel
from hack_pipelines.schedule import Schedule

from .released import RELEASED


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text()
BUDGETS_PAGE = (ROOT / "docs" / "budgets.md").read_text()
# Biases of keys, which the released checkpoints lack and ours hold as zeros: two a layer and one in the pooling.
KEY_BIASES = {"2b": 65 * 2048, "8b": 81 * 3584}

DEMO = Geometry(Schedule.from_sides((1, 2, 3, 4, 5, 6, 8)), 8, 6, 32)


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f}"


# Published sizes


@pytest.mark.parametrize(("model", "parameters"), [("2b", 2_204_564_032), ("8b", 8_375_791_824)])
def test_parameters_of_infinity(model, parameters):
    transformer, _ = parts_of(model)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters + KEY_BIASES[model]


@pytest.mark.parametrize("model", RELEASED)
def test_parameters_of_var(model):
    transformer, _ = parts_of(model)
    depth, *_, parameters = RELEASED[model]
    # The published count has no bias of keys either.
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters + depth * 64 * depth


@pytest.mark.parametrize(
    ("model", "original", "all_scales", "lossless"),
    [("2b", 8.27, 5.516, 3.369), ("8b", 18.10, 12.066, 7.369)],
)
def test_cache_of_infinity_at_1024(model, original, all_scales, lossless):
    report = estimate(Request(model))
    assert round(report.cache_original / 1e9, 2) == original
    assert round(report.cache_original * 4 / 6 / 1e9, 3) == all_scales
    assert round(report.cache_lossless / 1e9, 3) == lossless
    assert report.cache == report.cache_lossless and report.peak_tokens == 6425


@pytest.mark.parametrize(
    ("model", "original", "lossless"), [("d30", 470_016_000, 195_379_200), ("d36", 2_229_534_720, 806_879_232)]
)
def test_cache_of_var(model, original, lossless):
    report = estimate(Request(model))
    assert (report.cache_original, report.cache_lossless) == (original, lossless)
    assert report.text_encoder == report.text == 0 and report.total_offload == report.total


def test_weights_keep_what_the_model_keeps_in_float32():
    transformer, tokenizer = parts_of("2b")
    kept = 512 * 2048 + 2048 + 2048 + 15 * 2048 + (6 + 2) * 2048 * 2049 + 64 * 2049
    parameters = 2_204_564_032 + KEY_BIASES["2b"]
    assert weight_bytes(transformer, torch.bfloat16) == 2 * parameters + 2 * kept
    assert weight_bytes(transformer, torch.float32) == 4 * parameters
    assert weight_bytes(tokenizer, torch.bfloat16) == 2 * 110_118_051


def test_text_encoder_is_half_precision_but_for_its_wo():
    parameters, wo = 1_223_527_424, 24 * 5120 * 2048
    assert text_encoder_bytes(torch.bfloat16) == 2 * parameters + 2 * wo
    assert text_encoder_bytes(torch.float32) == 4 * parameters


# Against real runs at small sizes


@pytest.mark.parametrize("budget", [None, 0.5, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_cache_is_what_a_run_reports(method, budget):
    request = Request("2b", kv_budget=budget, method=method, images=2, dtype=torch.float32)
    geometry = Geometry(Schedule.from_sides((1, 2, 3, 4, 6)), 3, 4, 8)
    plan = plan_of(request, geometry)
    chosen = get_method(method)
    cache = make_cache(plan, chosen, True) if plan else FullCache(geometry.schedule, 3, True)
    for length in geometry.schedule.lengths:
        for layer in range(3):
            cache.attend(layer, *torch.randn(3, request.rows, 4, length, 8))
    report = cache.report()
    assert held_bytes(request, geometry, plan) == report.bytes_allocated_peak * request.images
    assert cache_bytes(request, geometry, geometry.schedule.total, 8) == report.bytes_full * request.images


@torch.inference_mode()
def test_text_is_what_the_transformer_keeps():
    model = InfinityTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_hidden_dim=32,
        text_channels=128,
        num_pooling_heads=1,
    ).eval()
    prompts = [torch.randn(5, 128)] * 2
    condition = InfinityCondition(prompts)
    schedule = nearest_schedule(256, 256)
    model(None, condition, schedule, step=0, kv_cache=FullCache(schedule, 2, True))
    kept = [
        *prompts,
        *(part for layer in condition.keys_values.values() for _, *parts in layer for part in parts),
    ]
    kept += [value for value in vars(condition.states).values() if isinstance(value, torch.Tensor)]
    request = Request("2b", images=2, dtype=torch.float32, prompt_tokens=5)
    assert text_bytes(request, model.config) == sum(tensor.nbytes for tensor in kept)


def test_measured_sizes_are_within_a_fifth():
    with open(ROOT / "benchmarks" / "results" / "memory_shapes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows if float(row["ratio"]) == 1} >= {"cache", "text", "transformer", "tokenizer"}
    for row in rows:
        exact = row["part"] in ("cache", "text", "transformer", "tokenizer", "text encoder")
        assert abs(int(row["computed"]) / int(row["measured"]) - 1) <= (0 if exact else 0.2), row


# Formulas by hand


def test_block_of_infinity_is_34_bytes_a_channel():
    assert block_bytes(parts_of("2b")[0].config, 2) == 34 * 2048
    # Inputs, norms before cross-attention and before feed-forward in float32, attention's output, 4 times the width twice.
    assert block_bytes(parts_of("2b")[0].config, 4) == (4 * 4 + 4 + 2 * 4 * 4) * 2048
    assert block_bytes(parts_of("d30")[0].config, 2) == (3 * 4 + 2 + 2 * 4 * 2) * 1920


def test_merge_by_hand():
    present, largest, kept, head_dim = 90, 50, 30, 4
    # Keys and values handed over, and for each present token a flag, a cosine, a weight and a target.
    always = 2 * kept * head_dim * 2 + present * (1 + 4 + 4 + 8)
    # All in one chunk: float32 keys, values and their sums, 50 tokens with 30 weights each, and a product.
    by_product = always + (5 * kept * head_dim + largest * (kept + head_dim)) * 4
    assert merge_bytes(present, kept, largest, 8, head_dim, 2, True) == by_product
    # Float32 keys, values and unit keys, and 50 tokens with 30 cosines each.
    on_cpu = always + (3 * kept * head_dim + largest * (kept + head_dim)) * 4
    assert merge_bytes(present, kept, largest, 8, head_dim, 2, False) == on_cpu


def test_merge_goes_by_chunks():
    kept, head_dim = 1024, 128
    chunk = 2**22 // (8 * kept)
    expected = 2 * kept * head_dim * 2 + (5 * kept * head_dim + chunk * (kept + head_dim)) * 4
    for length in (4096, 2**20):
        assert merge_bytes(2048 + length, kept, length, 8, head_dim, 2, True) == expected + 17 * (2048 + length)


def test_scores_are_more_than_what_few_kept_tokens_take():
    # 32 queries score 5000 keys; 10 keys and values are kept.
    assert group_bytes((904, 4096, 10, 0), 128, 2, 32) == 2 * 32 * 5000 * 4
    assert group_bytes((904, 4096, 10, 0), 128, 2, 0) == 4 * 10 * 128 * 2
    # All that is there is attended to: keys and values once.
    assert group_bytes((904, 4096, 5000, 5000), 128, 2, 0) == 2 * 5000 * 128 * 2


@dataclass
class Curious(ScaleWindow):
    """Ranks like its parent, but says otherwise."""

    queries: int = 0
    merging: bool = False

    def scored_queries(self, label, length):
        return min(self.queries, length)

    def merges(self, label, last):
        return self.merging and label == "all" and not last


def test_work_asks_the_method_what_it_scores_and_merges():
    geometry = Geometry(Schedule.from_sides((1, 2, 3, 16, 24)), 2, 4, 8)
    plan = Curious().plan(geometry, 200, None)

    def beside(step, **options):
        return cache_work_bytes(Curious(**options), geometry, plan, step, 1, 4)

    # 256 of 270 tokens and 8 float32 channels of query, key, value and attention's output, and of the block's input and norm.
    base = 4 * 256 * 8 * (2 * 4 + 6 * 4)
    # All 270 are attended to, and 200 chosen of them; nothing goes at the last step.
    assert beside(3) == base + 4 * (2 * 270 + 4 * 200) * 8 * 4
    # The logits of 256 queries outweigh that, twice.
    assert beside(3, queries=10**6) == base + 4 * 2 * 256 * 270 * 4
    assert beside(3, merging=True) == base + 4 * (2 * 270 * 8 * 4 + merge_bytes(270, 200, 256, 4, 8, 4, True))
    assert beside(4, queries=10**6, merging=True) == beside(4)


def test_work_is_that_of_the_layer_that_needs_most():
    geometry = Geometry(Schedule.from_sides((1, 2, 3, 16, 24)), 2, 4, 8)
    plan = Curious().plan(geometry, 200, None)
    smaller = Curious().plan(geometry, 100, None).layers[0]
    uneven = replace(plan, layers=(smaller, plan.layers[0]))
    for step in range(5):
        both = [cache_work_bytes(Curious(), geometry, part, step, 1, 4) for part in (plan, uneven)]
        assert both[0] == both[1]


@pytest.mark.parametrize("model", ["2b", "8b", "8b-512"])
def test_budgets_of_the_page_cost_no_work_memory_in_infinity(model):
    work = {estimate(Request(model, kv_budget=budget)).work for budget in (None, 0.3, 0.1)}
    transformer, _ = parts_of(model)
    tokens = 2 * geometry_of(Request(model)).schedule.lengths[-1]
    assert work == {tokens * block_bytes(transformer.config, 2)}


def test_decoder_is_fullest_at_full_resolution():
    # The first residual block of the last level: 256 channels in, their norm, and its activation.
    assert decoder_bytes(parts_of("2b")[1].config, (1024, 1024), 3, 2) == 3 * 3 * 256 * 1024**2 * 2
    # VAR's last level is 160 wide throughout: its input, a block's input, the branch, their sum and its quotient.
    assert decoder_bytes(parts_of("d30")[1].config, (256, 256), 1, 4) == 5 * 160 * 256**2 * 4


def test_peaks_are_sums_of_the_parts():
    report = estimate(Request("2b", kv_budget=0.1))
    weights = report.transformer + report.tokenizer + report.text_encoder
    assert report.total == weights + report.text + report.decoder
    assert report.total_offload == report.transformer + report.text + report.cache + report.work
    report = estimate(Request("2b"))
    assert report.total == weights + report.text + report.cache + report.work


def test_batch_and_guidance_scale_what_belongs_to_images():
    one, four = (estimate(Request("2b", kv_budget=0.3, images=images)) for images in (1, 4))
    single = estimate(Request("2b", kv_budget=0.3, guided=False))
    for name in ("cache_original", "cache_lossless", "cache", "work", "text", "decoder"):
        assert getattr(four, name) == 4 * getattr(one, name)
    for name in ("cache_original", "cache_lossless", "cache", "work"):
        assert 2 * getattr(single, name) == getattr(one, name)
    assert four.transformer == one.transformer


def test_even_profile_splits_every_layer():
    geometry = geometry_of(Request("d30"))
    contextual = even_profile(geometry).contextual_heads(0.5)
    assert contextual.sum(1).tolist() == [15] * 30


# Sizes, budgets and cards


def test_infinity_draws_the_nearest_size():
    report = estimate(Request("2b", (1100, 800)))
    assert report.size == (1152, 864)


def test_largest_budget_is_the_largest_that_fits():
    request, card = Request("8b"), 24 * 10**9
    budget = largest_budget(request, card, offload=False)
    assert estimate(replace(request, kv_budget=budget)).total <= card
    assert estimate(replace(request, kv_budget=round(budget + 0.01, 2))).total > card
    assert largest_budget(replace(request, kv_budget=0.1), card, offload=False) == 0.1
    assert largest_budget(request, 10**9, offload=True) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "3b"}, "`model` must be one of '2b', .* but is '3b'"),
        ({"model": "d30", "size": (512, 512)}, "`size` is 512x512 but model 'd30' draws 256x256 only"),
        ({"model": "2b", "prompt_tokens": 513}, r"`prompt_tokens` must lie in \[1, 512\] but is 513"),
        ({"model": "2b", "kv_budget": 2}, "leaves 2 tokens a head, but method 'hack\\+\\+' needs at least 5"),
        ({"model": "2b", "kv_budget": 1.5}, "`kv_budget` must be a fraction"),
        ({"model": "2b", "method": "best"}, "`method` must be one of"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(Request(**options))


# The command


def test_models_of_the_command_are_those_of_the_calculator():
    assert command.MODELS == tuple(MODELS)


def test_json_holds_the_report(capsys):
    assert main(["memory", "--model", "2b", "--kv-budget", "0.1", "--card", "8GB", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    report = estimate(Request("2b", kv_budget=0.1))
    assert printed["total"] == report.total and printed["cache"] == report.cache and printed["size"] == [1024, 1024]
    assert (printed["fits"], printed["fits_with_offload"]) == (False, True)
    assert (printed["largest_kv_budget"], printed["largest_kv_budget_with_offload"]) == (None, None)


def test_command_says_what_was_snapped_and_what_fits(capsys):
    assert main(["memory", "--model", "8b", "--size", "1100x800", "--card", "24GB", "--no-guidance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Infinity 8b, 1152x864, 1 image without guidance, bf16"
    assert lines[1] == "1100x800 was asked for; 1152x864 is the nearest it draws"
    assert re.fullmatch(
        r"  all weights on it: \d\.\d\d GB too much; hack\+\+ fits with kv_budget=0\.\d+ or less", lines[-2]
    )
    assert re.fullmatch(r"  with model offload \(--offload model\): fits, \d\.\d\d GB to spare", lines[-1])


@pytest.mark.parametrize("option", ["--size=0", "--size=10x", "--card=12", "--batch-size=0", "--model=3b"])
def test_command_refuses_what_it_cannot_read(option, capsys):
    with pytest.raises(SystemExit):
        main(["memory", option])
    assert "argument --" in capsys.readouterr().err


# The documents


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of the page, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_page_shows_what_the_command_prints(capsys):
    shown = re.search(r"```bash\nhack-pipelines (.*?)\n```\n\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]


def test_table_of_budgets():
    rows = rows_of("Models and budgets")
    assert len(rows) == 15
    for model, size, budget, *numbers in rows:
        report = estimate(Request(model.strip("`"), kv_budget=None if budget == "None" else float(budget)))
        parts = (report.transformer + report.tokenizer, report.text_encoder, report.cache, report.text + report.work)
        assert size == "x".join(map(str, report.size))
        assert numbers == [gigabytes(count) for count in (*parts, report.decoder, report.total, report.total_offload)]


def test_tables_of_cards_are_those_of_the_command(capsys):
    """The page has headings of its own; every row is one that the command prints now."""
    assert "hack-pipelines memory --table" in BUDGETS_PAGE
    assert main(["memory", "--table"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 2 * (len(MODELS) + 3)
    section = BUDGETS_PAGE.split("## Which card holds what\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")] == printed


@pytest.mark.parametrize(
    ("model", "gigabyte", "cell"),
    [
        ("2b", 8, "0.48 with offload"),
        ("2b", 12, "no budget needed, 0.13 GB left"),
        ("8b", 16, "does not fit"),
        ("8b", 24, "0.19, 0.44 with offload"),
    ],
)
def test_cell_of_a_card(model, gigabyte, cell):
    request, card = Request(model), gigabyte * 10**9
    assert memory_table.fit_cell(request, card) == cell
    for offload in (False, True):
        budget = largest_budget(request, card, offload)
        if budget is not None and budget < 1:
            needs = [estimate(replace(request, kv_budget=budget + more)) for more in (0, 0.01)]
            totals = [report.total_offload if offload else report.total for report in needs]
            assert totals[0] <= card < totals[1]


@pytest.mark.parametrize(("model", "gigabyte"), [("2b", 24), ("d36", 8), ("8b", 8)])
def test_largest_batch_fits_and_one_more_does_not(model, gigabyte):
    request, card = Request(model, kv_budget=0.1), gigabyte * 10**9
    images = memory_table.largest_batch(request, card)
    assert images == 0 or estimate(replace(request, images=images)).total <= card
    assert estimate(replace(request, images=images + 1)).total > card


def test_one_token_is_not_everything():
    assert estimate(Request("d16", kv_budget=1.0)).peak_tokens == 424
    with pytest.raises(ValueError, match="leaves 1 tokens a head"):
        estimate(Request("d16", kv_budget=1))


def test_table_of_one_card(capsys):
    assert main(["memory", "--table", "--card", "80GB", "--prompt-tokens", "64"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {2}
    assert rows[0][1].strip() == "80 GB"


def test_table_refuses_what_it_settles_itself(capsys):
    assert main(["memory", "--table", "--size", "512", "--kv-budget", "0.3"]) == 2
    assert "leave --size, --kv-budget out" in capsys.readouterr().err


def test_numbers_in_the_text():
    compressed, full = Request("2b", kv_budget=0.1), Request("2b")
    assert f"leaves {gigabytes(12e9 - estimate(compressed).total)} GB" in BUDGETS_PAGE
    assert f"offload alone {gigabytes(12e9 - estimate(full).total_offload)} GB" in BUDGETS_PAGE
    for model, tokens, size in ((geometry_of(full), 1052, "554MB"), (DEMO, 15, "190kB")):
        token_bytes = TokenBytes(2, 2, get_method("hack++").metadata_bytes)
        assert budget_tokens(size, model, token_bytes) == budget_tokens(0.1, model, token_bytes) == tokens
        assert f"`{tokens}`" in BUDGETS_PAGE and f'`"{size}"`' in BUDGETS_PAGE
    for request in (compressed, full):
        assert f"{gigabytes(estimate(replace(request, images=4)).total)} GB" in PAGE


def test_table_of_measurements():
    with open(ROOT / "benchmarks" / "results" / "memory_shapes.csv", newline="") as file:
        stored = [row for row in csv.DictReader(file) if row["part"] in ("work", "decoder") or "merge" in row["part"]]
    shown = [
        [row["part"], f"`{row['model']}`", row["px"], row["dtype"], row["kv_budget"] or "None"]
        + [f"{int(row[name]) / 1e6:.1f}" for name in ("computed", "measured")]
        + [f"{float(row['ratio']):.2f}"]
        for row in stored
    ]
    assert rows_of("Against measurement") == shown
