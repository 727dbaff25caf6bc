"""ScaleKV: layers that look back keep nearly everything, the others share the rest (arXiv 2505.19602)."""

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F

from ..profiles.statistics import TOP_COUNTS
from ..schedule import Schedule
from .base import SCORED_KEYS, SCORED_QUERIES, Geometry, Method, Plan, Ranking, StepView, check_choice
from .uniform import layer_plan


if TYPE_CHECKING:
    from ..profiles.head_profile import HeadProfile


# The paper's refiners of Infinity-2B start at 600 tokens and lose 70 a scale, where layers hold 650 on average.
FIRST_REFINER, DECAY = 600 / 650, 70 / 650
# Keeps the normalised index at 0 where all layers are the same.
EPSILON = 1e-8
SCALE_KEY, BLOCK_KEY = re.compile(r"Scale (\d+)"), re.compile(r"Block (\d+)")
FILE_COUNTS = ("High", "Max", "Min", "Limit")


@dataclass
class ScaleKV(Method):
    """
    Two kinds of layers at every scale: drafters, which look back at all earlier scales and keep nearly all of them, and
    refiners, which look at the current map and share what is left of the budget.

    All heads of a layer hold as many tokens, and each chooses its own: those near the centres of a grid of patches of the
    current map, and the ones that these look at most.

    Args:
        allocation (`"saturate"` or `"linear_decay"`, *optional*, defaults to `"saturate"`):
            `"saturate"` gives drafters what they can hold and refiners the rest, scale by scale, as the released budget
            files do. `"linear_decay"` is the rule that the paper prints: refiners get less at every scale, and drafters
            the rest, as far as they can hold it.
        budgets_file (`str`, *optional*):
            Released budgets, or a file of that form, in the place of a head profile and an allocation. Its budgets are used
            as they are; `kv_budget` must be at least their average.
        scoring (`"paper"` or `"released"`, *optional*, defaults to `"paper"`):
            `"paper"` sums the attention of the window's queries. `"released"` does what the released code does, to compare
            with its figures: it sums products of the bare projections with the keys, without a softmax, pools by the
            largest, and has another window where 4 does not divide the map.
        window (`int`, *optional*, defaults to 16):
            Tokens of the current map that score the others and are always kept, a square number; fewer on smaller maps.
        kernel (`int`, *optional*, defaults to 5):
            Neighbours along the sequence that are pooled, an odd number.
        pooling (`"average"` or `"max"`, *optional*, defaults to `"average"`):
            How the paper's scores are pooled.
        top_count (`1`, `4`, `16` or `64`, *optional*, defaults to 16):
            Tokens of the history whose attention tells drafters from refiners, `K'` of the attention selectivity index.
        drafters (`float`, *optional*, defaults to 1/16):
            Share of drafters among all pairs of a layer and a scale after the first. The paper does not print it; the
            released files have 2 of 32 layers for Infinity-2B and 3 of 40 for Infinity-8B.
        decay (`float`, *optional*):
            Tokens that a refiner loses a scale, for `"linear_decay"`. By default the paper's 70 of 650, or as much as leaves
            the last refiner its window and a token.
    """

    name: ClassVar[str] = "scalekv"
    profile_arrays: ClassVar[tuple[str, ...]] = ("mass", "topk_hist")
    source: ClassVar[str] = "arXiv 2505.19602"
    protocol = "post"

    allocation: str = "saturate"
    budgets_file: str | None = None
    scoring: str = "paper"
    window: int = 16
    kernel: int = 5
    pooling: str = "average"
    top_count: int = 16
    drafters: float = 1 / 16
    decay: float | None = None

    def __post_init__(self):
        check_choice("allocation", self.allocation, ("saturate", "linear_decay"))
        check_choice("scoring", self.scoring, ("paper", "released"))
        check_choice("pooling", self.pooling, ("average", "max"))
        if self.window < 1 or math.isqrt(self.window) ** 2 != self.window:
            raise ValueError(f"`window` must be a square number, such as 16, but is {self.window}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"`kernel` must be an odd number of at least 1 but is {self.kernel}.")
        if self.top_count not in TOP_COUNTS:
            raise ValueError(
                f"`top_count` must be one of {', '.join(map(str, TOP_COUNTS))}, which a head profile holds, but is "
                f"{self.top_count}."
            )
        if not 0 <= self.drafters <= 1:
            raise ValueError(f"`drafters` must lie in [0, 1] but is {self.drafters}.")
        if self.decay is not None and not 0 <= self.decay < math.inf:
            raise ValueError(f"`decay` must be at least 0 but is {self.decay}.")

    @property
    def needs_profile(self) -> bool:  # type: ignore[override]
        """Whether planning reads a head profile: a budgets file says all."""
        return self.budgets_file is None

    @property
    def needs_projection(self) -> bool:  # type: ignore[override]
        """Whether ranking reads the bare projections of the queries."""
        return self.scoring == "released"

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        if self.budgets_file is not None:
            return read_budgets(self.budgets_file, geometry)[0]
        return self._floor(geometry.schedule)

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        if self.budgets_file is not None:
            average, limits = read_budgets(self.budgets_file, geometry)
            if average > budget:
                raise ValueError(
                    f"The budgets of {self.budgets_file} hold {average} tokens a head but the budget is {budget}: set "
                    f"`kv_budget` to {average} or more, or leave `budgets_file` out."
                )
            return layer_plan(geometry, budget, limits, self.protocol)
        if profile is None:
            raise ValueError("ScaleKV needs a head profile to tell drafters from refiners, or a `budgets_file`.")
        drafters = self._drafters(geometry, profile)
        floor = min(self._floor(geometry.schedule), budget)
        if self.allocation == "saturate":
            limits = saturated_limits(geometry, budget, drafters, floor)
        else:
            limits = self._decaying_limits(geometry, budget, drafters, floor)
        return layer_plan(geometry, budget, limits, self.protocol)

    def rank(self, view: StepView) -> Ranking:
        window = torch.tensor(self._window(view.schedule.sizes[view.step]))
        tiers = torch.zeros(view.num_present, dtype=torch.long)
        tiers[window + view.num_stored] = 1
        positions = window.to(view.query.device)
        if self.scoring == "paper":
            scores, pooling = view.attention_columns(positions), self.pooling
        else:
            # The window does not count for its neighbours, yet scores must stay finite.
            lowest = torch.finfo(torch.float32).min
            scores = projected_scores(view, positions).index_fill(-1, positions + view.num_stored, lowest)
            pooling = "max"
        return Ranking(pooled(scores, self.kernel, pooling), tiers)

    def scored_queries(self, label: str, length: int) -> int:
        # The released scores are products with the sum of the window's queries.
        return min(self.window, length, SCORED_QUERIES) if self.scoring == "paper" else 1

    def _window(self, size: tuple[int, int]) -> tuple[int, ...]:
        side = math.isqrt(self.window)
        return centre_positions(size, side) if self.scoring == "paper" else released_positions(size, side)

    def _floor(self, schedule: Schedule) -> int:
        """A token more than the largest window; less where all that is ever read fits."""
        largest = max((len(self._window(size)) for size in schedule.sizes[:-1]), default=0)
        return max(1, min(largest + 1, schedule.cacheable))

    def _drafters(self, geometry: Geometry, profile: "HeadProfile") -> list[set[int]]:
        """Layers that are drafters at each scale: the pairs of a layer and a scale with the lowest normalised index."""
        missing = [name for name in self.profile_arrays if name not in profile.mean]
        if missing:
            raise ValueError(
                f"ScaleKV plans with {' and '.join(self.profile_arrays)}, but the head profile lacks {' and '.join(missing)}: "
                "make a full one with `hack-pipelines calibrate`."
            )
        scales = len(geometry.schedule)
        index = selectivity(profile.mean["mass"], profile.mean["topk_hist"][..., TOP_COUNTS.index(self.top_count)])
        centred = index - index.mean(0)
        normalised = (centred / (index.std(0, correction=0) + EPSILON))[:, 1:].flatten()
        # The epsilon keeps products such as 0.145 * 100 = 14.499999999999998 at what they mean.
        count = math.floor(self.drafters * normalised.numel() + 0.5 + 1e-9)
        result: list[set[int]] = [set() for _ in range(scales)]
        for pair in normalised.argsort(stable=True)[:count].tolist():
            result[pair % (scales - 1) + 1].add(pair // (scales - 1))
        return result

    def _decaying_limits(
        self, geometry: Geometry, budget: int, drafters: Sequence[Collection[int]], floor: int
    ) -> list[list[int]]:
        """
        Limits of the published rule, `B_r(i) = B_r(0) - decay * i` at the `i`-th scale that is compressed, from 0.

        Drafters share what refiners leave at the same scale, because the budget holds between any two steps.
        """
        first = max(floor, int(FIRST_REFINER * budget))
        steps = sum(prefix > budget for prefix in geometry.schedule.prefixes)
        largest = (first - floor) / max(1, steps - 1)
        decay = min(DECAY * budget, largest) if self.decay is None else self.decay
        if steps > 1 and decay > largest:
            raise ValueError(
                f"`decay` {decay} leaves a refiner {first - decay * (steps - 1):g} tokens at the last of {steps} scales, but "
                f"its window needs {floor}: set `decay` to {math.floor(largest)} or less, or leave it out."
            )
        lowest = [math.floor(first - decay * max(0, i - (len(drafters) - steps)) + 1e-9) for i in range(len(drafters))]

        def shares(scale: int, present: list[int]) -> list[int]:
            held = [min(count, lowest[scale]) for count in present]
            own = sorted(drafters[scale])
            room = budget * len(present) - sum(held) + sum(held[layer] for layer in own)
            level = water_level([present[layer] for layer in own], room)
            for layer in own:
                held[layer] = min(present[layer], level)
            return held

        return limits_by_scale(geometry, budget, shares)


def selectivity(mass: torch.Tensor, top_history: torch.Tensor) -> torch.Tensor:
    """
    Attention selectivity index, high for refiners (ScaleKV, arXiv 2505.19602), `[num_layers, scales]` in float64.

    Attention on the current scale, times attention on the tokens of the history that a query looks at most, each averaged
    over heads before they are multiplied.

    Args:
        mass (`torch.Tensor`):
            Attention on each scale, `[num_layers, num_heads, scales, scales]`.
        top_history (`torch.Tensor`):
            Attention on the most attended tokens of the history, `[num_layers, num_heads, scales]`.
    """
    current = mass.double().diagonal(dim1=-2, dim2=-1)
    return current.mean(1) * top_history.double().mean(1)


# -- budgets -----------------------------------------------------------------------------------------------------------


def limits_by_scale(geometry: Geometry, budget: int, shares: Callable[[int, list[int]], list[int]]) -> list[list[int]]:
    """
    Tokens that each layer holds after each step, `[num_layers][scales]`.

    Args:
        geometry ([`Geometry`]):
            Of the model.
        budget (`int`):
            Tokens a head, averaged over layers. All is kept while the history of the next scale is no longer.
        shares (`Callable[[int, list[int]], list[int]]`):
            Tokens of each layer for the scale that is drawn next, out of those that are present.
    """
    schedule = geometry.schedule
    held = [0] * geometry.num_layers
    by_step = []
    for following, length in enumerate(schedule.lengths, start=1):
        present = [count + length for count in held]
        if following < len(schedule) and schedule.prefixes[following] > budget:
            held = shares(following, present)
        else:
            held = present
        by_step.append(held)
    return [list(counts) for counts in zip(*by_step)]


def saturated_limits(
    geometry: Geometry, budget: int, drafters: Sequence[Collection[int]], floor: int
) -> list[list[int]]:
    """
    Limits of the rule that the released budget files follow, `[num_layers][scales]`.

    At every scale, refiners hold `Min` tokens and drafters `Max`: `Min` is the smallest number with which the mean is the
    budget exactly and no drafter holds more than it can. Where a layer holds less because it was a refiner before, no such
    numbers may exist; then the first drafters hold a token more.

    Args:
        geometry ([`Geometry`]):
            Of the model.
        budget (`int`):
            Tokens a head, averaged over layers.
        drafters (`Sequence[Collection[int]]`):
            Layers that are drafters at each scale. At a scale without any, all layers count as such and share equally.
        floor (`int`):
            The smallest `Min`.
    """

    def shares(scale: int, present: list[int]) -> list[int]:
        own = sorted(drafters[scale]) or list(range(len(present)))
        others = sorted(set(range(len(present))) - set(own))
        histories = [present[layer] for layer in own]

        def left(lowest: int) -> int:
            return budget * len(present) - sum(min(lowest, present[layer]) for layer in others)

        low, high = floor, max(floor, *present)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if left(middle) <= sum(histories) else (middle + 1, high)
        levels = [(lowest, water_level(histories, left(lowest))) for lowest in range(low, low + len(own))]
        exact = (
            (lowest, level)
            for lowest, level in levels
            if lowest <= level and sum(min(level, count) for count in histories) == left(lowest)
        )
        lowest, level = next(exact, levels[0])
        held = [min(lowest, count) for count in present]
        for layer in own:
            held[layer] = min(level, present[layer])
        rest = budget * len(present) - sum(held)
        for layer in own + others:
            if rest > 0 and held[layer] < present[layer]:
                held[layer] += 1
                rest -= 1
        return held

    return limits_by_scale(geometry, budget, shares)


def water_level(capacities: Sequence[int], total: int) -> int:
    """The largest level, at most the largest capacity, with `sum(min(level, capacity)) <= total`."""
    level, room = 0, total
    for index, capacity in enumerate(sorted(capacities)):
        # `index` capacities are reached already; the others rise together.
        rising = len(capacities) - index
        if room < (capacity - level) * rising:
            return level + room // rising
        level, room = capacity, room - (capacity - level) * rising
    return level


def read_budgets(path: str, geometry: Geometry) -> tuple[int, list[list[int]]]:
    """
    Budgets in the form in which ScaleKV's authors released theirs.

    The file is a JSON object with the keys `"Scale s"` for the scales that are compressed, counted from 1 up to the last.
    Each holds, for every layer, `"Block i"`: 1 for a drafter and 0 for a refiner, counted from 0; and `"High"`, the number of
    drafters, `"Max"` and `"Min"`, the tokens of a drafter's and a refiner's head while that scale is drawn, and `"Limit"`,
    what a drafter could hold.

    Args:
        path (`str`):
            The file.
        geometry ([`Geometry`]):
            Of the model.

    Returns:
        `tuple[int, list[list[int]]]`: the smallest budget that it fits, and the most that a head holds after each step,
        `[num_layers][scales]`.

    Raises:
        `ValueError`: if there is no such file, it is damaged, or it was made for another model.
    """
    schedule, layers = geometry.schedule, geometry.num_layers
    scales = read_scales(Path(path))
    first, last = min(scales), max(scales)
    if sorted(scales) != list(range(first, last + 1)) or last != len(schedule) or first < 2:
        raise ValueError(
            f"{path} has budgets for the scales {sorted(scales)}, but they must go on without a gap to scale "
            f"{len(schedule)}, the last of the schedule."
        )
    limits = [[schedule.total] * len(schedule) for _ in range(layers)]
    sums = {}
    for scale, entry in scales.items():
        blocks = {int(match[1]): entry[key] for key in entry if (match := BLOCK_KEY.fullmatch(key))}
        if sorted(blocks) != list(range(layers)):
            raise ValueError(
                f"{path} has budgets for {len(blocks)} layers at scale {scale}, but the model has {layers}: use a file that "
                "was made for it."
            )
        if set(blocks.values()) - {0, 1} or sum(blocks.values()) != entry["High"] or entry["Max"] > entry["Limit"]:
            raise ValueError(
                f"{path} is damaged at scale {scale}: every block must be 0 or 1, `High` the number of ones, and `Max` at "
                "most `Limit`."
            )
        # What holds while a scale is drawn is what is stored after the one before; the file counts scales from 1.
        for layer, drafter in blocks.items():
            limits[layer][scale - 2] = entry["Max"] if drafter else entry["Min"]
        sums[scale] = entry["High"] * entry["Max"] + (layers - entry["High"]) * entry["Min"]
    if len(set(sums.values())) > 1:
        means = ", ".join(f"{sums[scale] / layers:g} at scale {scale}" for scale in sorted(sums))
        raise ValueError(f"{path} is damaged: its budgets must average the same at every scale but are {means}.")
    return max(-(-sums[first] // layers), schedule.prefixes[first - 2]), limits


def read_scales(path: Path) -> dict[int, dict[str, int]]:
    """The entries of a budgets file by scale."""
    if not path.is_file():
        raise ValueError(f"`budgets_file` must be a file with ScaleKV budgets, but there is none at {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    scales = {}
    for key, entry in content.items() if isinstance(content, dict) else ():
        match = SCALE_KEY.fullmatch(key)
        if match is None or not isinstance(entry, dict) or not entry.keys() >= set(FILE_COUNTS):
            raise ValueError(
                f'{path} must hold `"Scale s"` keys with {", ".join(FILE_COUNTS)} and a `"Block i"` for every layer, but '
                f"{key!r} is not one."
            )
        if any(type(value) is not int or value < 0 for value in entry.values()) or not entry["Min"]:
            raise ValueError(f"{path} is damaged: {key!r} must hold whole numbers, and a `Min` of at least 1.")
        scales[int(match[1])] = entry
    if not scales:
        raise ValueError(f'{path} holds no ScaleKV budgets: it has no `"Scale s"` key.')
    return scales


# -- scores ------------------------------------------------------------------------------------------------------------


def projected_scores(view: StepView, positions: torch.Tensor) -> torch.Tensor:
    """
    Products of the bare projections of some current queries with the keys over `sqrt(head_dim)`, summed over the queries.

    Args:
        view ([`StepView`]):
            The step.
        positions (`torch.Tensor`):
            Which of the current queries, `[observed]`.

    Returns:
        `torch.Tensor`: `[rows, heads, present]` in float32.
    """
    if view.projection is None:
        raise ValueError("The released scores of ScaleKV need the bare projections of the queries but got none.")
    query = view.projection[:, :, positions].float().sum(2, keepdim=True) / math.sqrt(view.key.shape[-1])
    keys = [part for key in (view.stored_key, view.key) for part in key.split(SCORED_KEYS, dim=2)]
    return torch.cat([query @ key.float().transpose(-1, -2) for key in keys], dim=-1).squeeze(2)


def pooled(scores: torch.Tensor, kernel: int, pooling: str) -> torch.Tensor:
    """Scores `[rows, heads, tokens]`, each the average of its neighbours, with zeros beyond the ends, or the largest."""
    function = F.avg_pool1d if pooling == "average" else F.max_pool1d
    return function(scores, kernel, stride=1, padding=kernel // 2)


@lru_cache(maxsize=256)
def centre_positions(size: tuple[int, int], side: int) -> tuple[int, ...]:
    """
    Raster positions nearest to the centres of `side x side` patches of a map, each once.

    Rows are `floor((i + 1/2) height / side - 1/2)`, at least 0, and columns likewise: where `side` divides the map, these are
    the released positions.
    """
    # In whole numbers: (2 i + 1) height - side over 2 side.
    rows, columns = (
        sorted({max(0, ((2 * i + 1) * length - side) // (2 * side)) for i in range(side)}) for length in size
    )
    return tuple(row * size[1] + column for row in rows for column in columns)


@lru_cache(maxsize=256)
def released_positions(size: tuple[int, int], side: int) -> tuple[int, ...]:
    """
    Raster positions of the released code's window: on a square map of width `w`, rows and columns
    `i floor(w / side) + floor((floor(w / side) - 1) / 2)`; on others, and on maps narrower than `side`, the last tokens.
    """
    height, width = size
    patch = width // side
    if height != width or not patch:
        return tuple(range(max(0, height * width - side * side), height * width))
    places = [i * patch + (patch - 1) // 2 for i in range(side)]
    return tuple(row * width + column for row in places for column in places)
