"""The figures of the pages: every script runs, and what it draws is what the package reports."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hack_pipelines import HackVARPipeline


pytest.importorskip("matplotlib", reason="the figures need matplotlib, which is in the extra `plots`")

ROOT = Path(__file__).parents[1]
FIGURES = {
    "scales": ["concepts_scales.png"],
    "cache_by_scale": ["concepts_cache.png"],
    "head_types": ["concepts_heads.png", "concepts_head_map.png"],
    "kept_tokens": ["concepts_kept.png"],
}
PROMPT = "a red heart"


@pytest.fixture(scope="module")
def pipe():
    pipe = HackVARPipeline.from_pretrained("demo")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def script(request, monkeypatch):
    """A script of `docs/figures`, imported as it imports its neighbour."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "figures"))
    for name in ("common", *FIGURES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(request.param)


def scripts(*names):
    return pytest.mark.parametrize("script", names, indirect=True)


@scripts(*FIGURES)
def test_script_writes_what_the_page_shows(script, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "concepts.md").read_text()
    first, *others = FIGURES[script.__name__]
    monkeypatch.setattr(sys, "argv", [script.__name__, "--output", str(tmp_path / first)])
    script.main()
    assert f"python docs/figures/{script.__name__}.py" in page
    for name in (first, *others):
        with Image.open(tmp_path / name) as drawn, Image.open(ROOT / "docs" / "images" / name) as shown:
            assert f"(images/{name})" in page
            assert drawn.size == shown.size
        assert (ROOT / "docs" / "images" / name).stat().st_size < 200_000


@scripts("scales")
def test_last_scale_is_the_picture(script, pipe):
    pictures = script.pictures_by_scale(pipe, PROMPT)
    assert len(pictures) == len(pipe.schedule)
    assert pictures[-1] == pipe(PROMPT, generator=torch.Generator().manual_seed(0)).images[0]
    assert pictures[-2] != pictures[-1]


@scripts("cache_by_scale")
def test_cache_by_scale_draws_the_reports(script, pipe):
    found = script.reports(pipe, PROMPT)
    lines = [line.get_ydata() for axes in script.draw(pipe.schedule, found).axes for line in axes.get_lines()]
    stored = [[*report.tokens_by_step, 0] for report in found.values()]
    attended = [report.attended_by_step for report in found.values()]
    assert [list(line) for line in lines] == [[1, 5, 14, 30, 55, 91, 155], *stored, *attended]
    assert stored[0] == [1, 5, 14, 30, 55, 91, 0]
    assert max(stored[2]) <= 0.1 * pipe.schedule.total


@scripts("head_types")
def test_heads_are_those_of_the_profile(script, pipe):
    contextual, structural = script.two_heads(pipe, PROMPT)
    scores, types = pipe.head_profile.scores, pipe.head_profile.contextual_heads(0.5)
    assert contextual.variance == scores.min() and types[contextual.layer, contextual.index]
    assert structural.variance == scores.max() and not types[structural.layer, structural.index]
    for head in contextual, structural:
        assert head.attention.shape == (64, 155)
        torch.testing.assert_close(head.attention.sum(-1), torch.ones(64))
    variances = [head.attention.var(0, unbiased=False).sum() for head in (contextual, structural)]
    assert variances[0] < variances[1]


@pytest.mark.parametrize("budget", [0.3, 0.1, 1.0])
@scripts("kept_tokens")
def test_kept_tokens_are_those_of_the_cache(script, pipe, budget):
    held, contextual = script.kept(pipe, PROMPT, budget)
    report = pipe(PROMPT, generator=torch.Generator().manual_seed(0), kv_budget=budget).cache_report
    assert held.float().sum(-1).mean().item() == pytest.approx(report.tokens_by_step[-1])
    if budget < 1:
        assert torch.equal(contextual, pipe.head_profile.contextual_heads(0.5))
        assert not held.all()
