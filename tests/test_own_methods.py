"""What who writes a method is told where it is wrong: in its name, and before numbers come out."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from hack_pipelines.cache.raster import RasterCache
from hack_pipelines.cli import main
from hack_pipelines.methods import METHODS, LayerPlan, Method, Ranking, get_method, register_method, uniform_plan

from .components import seeds, tiny_pipeline


@dataclass
class Own(Method):
    """A method that is right: the newest tokens stay."""

    name: ClassVar[str] = "own"
    protocol = "post"

    def min_budget(self, geometry, profile):
        return 1

    def plan(self, geometry, budget, profile, attention_budget=None):
        return uniform_plan(geometry, budget, self.protocol)

    def scores(self, view):
        rows, heads = view.key.shape[:2]
        return torch.arange(view.num_present, dtype=torch.float32).expand(rows, heads, -1)

    def rank(self, view):
        return Ranking(self.scores(view))


class Short(Own):
    """Scores of the current scale only."""

    def rank(self, view):
        return Ranking(self.scores(view)[..., view.num_stored :])


class OneHead(Own):
    """Scores of one head for all."""

    def rank(self, view):
        return Ranking(self.scores(view)[:, :1])


class ShortTiers(Own):
    def rank(self, view):
        return Ranking(self.scores(view), torch.zeros(view.key.shape[2], dtype=torch.long))


class ShortStored(Own):
    def rank(self, view):
        return Ranking(self.scores(view), store_scores=self.scores(view)[..., 1:])


class WithoutIds(Own):
    def rank(self, view):
        return Ranking(view.ids.float())


class Unannounced(Own):
    def rank(self, view):
        return Ranking(self.scores(view), carried=self.scores(view))


class NothingCarried(Own):
    carries_scores: ClassVar[bool] = True


class CarriedOfTheScale(NothingCarried):
    def rank(self, view):
        return Ranking(self.scores(view), carried=torch.ones(view.key.shape[:3]))


class Over(Own):
    """Holds twenty tokens more than it was asked for, in a plan that says so."""

    def plan(self, geometry, budget, profile, attention_budget=None):
        return uniform_plan(geometry, budget + 20, self.protocol)


class OverByRow(Own):
    """Changes its mind in the second step, and then holds more than it was asked for."""

    @property
    def plans_by_row(self):
        return True

    def replan(self, view, layer):
        if view.step != 1:
            return None
        limits = [(view.budget + view.layer,)] * len(view.schedule)
        return LayerPlan.from_limits(view.schedule, layer.groups, layer.labels, limits, self.protocol)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def methods():
    """What a test registers is forgotten after it."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


def draw(pipe, method, budget=12):
    return pipe([1, 2], generator=seeds(0, 1), output_type="latent", kv_budget=budget, method=method)


# The scales have 1, 4, 9 and 16 tokens: with a budget of 12 some have to go after the third.


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Short,
            "Method 'own' ranked 9 tokens (`scores`), but 14 are present (5 of the history, then 9 of the current scale).",
        ),
        (OneHead, "`scores` of method 'own' must be [rows, heads, present] = [4, 4, 14] but is [4, 1, 14]."),
        (
            ShortTiers,
            "Method 'own' ranked 9 tokens (`tiers`), but 14 are present (5 of the history, then 9 of the current scale).",
        ),
        (
            ShortStored,
            "Method 'own' ranked 13 tokens (`store_scores`), but 14 are present (5 of the history, then 9 of the current "
            "scale).",
        ),
        (WithoutIds, "Method 'own' reads `view.ids`: set `needs_ids = True` in its class."),
        (
            Unannounced,
            "Method 'own' returns `Ranking(..., carried=...)`, but the budget has no room for it: set `carries_scores = "
            "True` in its class, or leave `carried` out.",
        ),
        (
            NothingCarried,
            "Method 'own' says `carries_scores = True`, but its ranking gives the tokens nothing to carry: return "
            "`Ranking(..., carried=...)`.",
        ),
        (
            CarriedOfTheScale,
            "Method 'own' ranked 4 tokens (`carried`), but 5 are present (1 of the history, then 4 of the current scale).",
        ),
    ],
)
def test_wrong_rankings_are_refused(pipe, kind, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        draw(pipe, kind())


def test_the_method_that_is_right_runs(pipe):
    assert draw(pipe, Own()).cache_report.peak_tokens == 12


def test_plans_over_their_budget_are_refused_before_anything_runs(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "forward", None)
    with pytest.raises(
        ValueError, match="^The plan of method 'own' holds 14 tokens a head after step 2, but 12 were asked"
    ):
        draw(pipe, Over())


def test_lengths_of_a_row_over_its_budget_are_refused(pipe):
    """The second and third layer hold one and two tokens more."""
    with pytest.raises(
        ValueError, match="^The plan of method 'own' holds 13 tokens a head after step 2, but 12 were asked"
    ):
        draw(pipe, OverByRow())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Short,
            "Method 'own' ranked 4 tokens (`scores`), but 12 are present (8 of the history, then 4 of the current",
        ),
        (
            NothingCarried,
            "Method 'own' says `carries_scores = True`, but its ranking gives the tokens nothing to carry",
        ),
    ],
)
def test_models_that_draw_line_by_line_refuse_them_too(kind, message):
    cache = RasterCache((6, 4), 8, kind())
    with pytest.raises(ValueError, match=re.escape(message)):
        layer = cache.layer(0)
        for _ in range(24):
            part = torch.randn(1, 2, 1, 8)
            if layer.append(part, part) is None:
                layer.attend(part, None, 0.5, lambda query, key, value: query)


# -- the list ----------------------------------------------------------------------------------------------------------


def registered(**attributes):
    return register_method(dataclass(type("Mine", (Own,), {"__module__": __name__, "name": "mine", **attributes})))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (
            {"protocol": "late"},
            "`protocol` of Mine must be one of 'pre', 'post', 'decoupled', 'static' but is 'late'.",
        ),
        ({"protocol": None}, "`protocol` of Mine must be one of 'pre', 'post', 'decoupled', 'static' but is None."),
        ({"name": None}, "`name` of Mine must be a word without any of ':,=@/' but is None."),
        ({"name": "a b"}, "`name` of Mine must be a word without any of ':,=@/' but is 'a b'."),
        ({"name": "random"}, "There is a method 'random' already, Random: choose another name."),
    ],
)
def test_classes_that_lack_something_are_not_registered(methods, attributes, message):
    before = dict(methods)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        registered(**attributes)
    assert methods == before


def test_a_method_without_a_source_is_listed(methods, capsys):
    registered()
    assert main(["methods"]) == 0
    assert "mine: Mine()" in capsys.readouterr().out.replace("\n", " ")


def test_an_unknown_name_says_how_ones_own_becomes_known(methods):
    with pytest.raises(ValueError, match="One of your own is known once `register_method` has run in this process"):
        get_method("mine")
    registered()
    assert get_method("mine").name == "mine"
