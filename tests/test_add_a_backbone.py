"""The example of a backbone of one's own: it passes its checks, and they notice a backbone that is wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch


PATH = Path(__file__).parents[1] / "examples" / "add_a_backbone.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("add_a_backbone", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_example_holds(example, capsys):
    example.check(example.build())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert all(line.startswith("holds: ") for line in lines)


def test_example_notices_a_backbone_that_forgets_the_history(example, monkeypatch, capsys):
    pipe = example.build()
    forward = example.Block.forward

    def forgetful(self, hidden_states, layer, kv_cache, mask):
        if kv_cache is not None:
            forward(self, hidden_states, layer, kv_cache, mask)
            mask = torch.ones(2 * (hidden_states.shape[1],), dtype=torch.bool)
        return forward(self, hidden_states, layer, None, mask)

    monkeypatch.setattr(example.Block, "forward", forgetful)
    assert example.drift_from_teacher_forcing(pipe) > 0.01


def test_failed_check_is_an_error(example, monkeypatch, capsys):
    monkeypatch.setattr(example, "drift_from_teacher_forcing", lambda pipe: 1.0)
    with pytest.raises(RuntimeError, match="relies on"):
        example.check(example.build())
    assert "FAILS: a cache changes nothing" in capsys.readouterr().out
