"""The cache of models that draw token by token: head groups with room for a line, which each row fills with heads of its own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..methods import RASTER_METHODS, Geometry, LayerPlan, Method, Plan, get_method
from ..methods.lines import LineView, TellsHeads
from ..methods.selection import top
from ..schedule import Schedule
from .attention import attention
from .budget import TokenBytes, budget_tokens, make_plan
from .checks import check_ranking
from .head_group import id_dtype, tokens_at
from .report import CacheMeter, CacheReport


DenseAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Attention to tensors that nothing has left: query `[rows, query heads, 1, head_dim]`, then all keys and values."""


@dataclass(eq=False)
class LineGroup:
    """
    Heads of a layer that hold the same number of tokens. Their planes have room for the line that is being drawn.

    Args:
        heads (`torch.Tensor`):
            Which heads these are in each row, ascending, `[rows, heads]`.
        key, value (`torch.Tensor`):
            `[rows, heads, slots, head_dim]`: the condition, then image tokens by id, then free slots.
        ids (`torch.Tensor`, *optional*):
            Ids of the image tokens, `[rows, heads, slots]` without the condition's slots; `None` while nothing has left.
        carried (`torch.Tensor`, *optional*):
            Numbers that the method gave the image tokens to carry, likewise, in float32.
        label (`str`):
            Name of the group in the plan.
        tokens (`int`):
            Image tokens that it holds.
    """

    heads: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    ids: torch.Tensor | None
    carried: torch.Tensor | None
    label: str
    tokens: int


@dataclass(frozen=True)
class LinePlan:
    """
    What happens at the end of a line, the same in all layers.

    Args:
        store (`tuple[int, ...]`):
            Image tokens that a head of each group holds afterwards.
        loses (`bool`):
            Whether any goes.
        identifies (`bool`):
            Whether heads are looked at.
        ranks (`bool`):
            Whether the method reads the line's queries, for one of these or for what tokens carry.
        columns (`tuple[int, ...]`):
            Which of them.
    """

    store: tuple[int, ...]
    loses: bool
    identifies: bool
    ranks: bool
    columns: tuple[int, ...]


class RasterCache:
    """
    Keys and values of one image, or of a batch of images in step, of a model that draws a grid token by token.

    A line is the step: at its end the method ranks the image tokens, and each head group keeps what the plan says. The
    prompt or class before the image is always kept and does not count. While nothing has to go, the tokens of all heads lie
    together and attention is the model's own. Lengths are known before the first image token, also those of heads that are
    told apart while drawing.

    Args:
        grid (`tuple[int, int]`):
            Lines, and tokens of a line, that which ends it included.
        kv_budget (`float`, `int` or `str`, *optional*):
            Image tokens that may stay stored between lines: a fraction of the grid, tokens per head, or bytes per image such as
            `"64MB"`, from which the condition and the line that is being drawn are taken first. `None` keeps everything.
        method (`str` or [`Method`], *optional*, defaults to `"headkv_ar"`):
            One of `RASTER_METHODS`, also with options.
        condition_tokens (`int`, *optional*):
            Tokens before the image. By default those of the first call.
        rows_per_image (`int`, *optional*, defaults to 1):
            2 where guidance doubles the batch; reports and byte budgets are per image.
        line_end (`bool`, *optional*, defaults to `False`):
            Whether the last token of a line only ends it.
        sharing (`int`, *optional*, defaults to 1):
            Query heads that share a key head, for the count of operations.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the budget holds at every token and not only between lines, inside which a line comes on top of it.

    Raises:
        `TypeError`: if the budget is neither a number nor a string.
        `ValueError`: if the grid, the budget or the method is none.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        kv_budget: float | int | str | None = None,
        method: str | Method = "headkv_ar",
        condition_tokens: int | None = None,
        rows_per_image: int = 1,
        line_end: bool = False,
        sharing: int = 1,
        strict: bool = False,
    ):
        if len(grid) != 2 or any(type(side) is not int or side < 1 for side in grid):
            raise ValueError(f"`grid` must be two positive ints, lines and tokens of a line, but is {grid!r}.")
        if condition_tokens is not None and (type(condition_tokens) is not int or condition_tokens < 1):
            raise ValueError(f"`condition_tokens` must be a positive int but is {condition_tokens!r}.")
        if rows_per_image not in (1, 2):
            raise ValueError(f"`rows_per_image` must be 1, or 2 with guidance, but is {rows_per_image!r}.")
        self.schedule = Schedule.from_lines(*grid)
        self.width = grid[1]
        self.kv_budget = kv_budget
        self.method = get_method(method, RASTER_METHODS)
        if self.method.protocol != "post":
            raise ValueError(
                f"Method {self.method.name!r} has the protocol {self.method.protocol!r}, but tokens that come one by one are "
                "attended to before any goes: use 'post'."
            )
        self.given_condition = condition_tokens
        self.rows_per_image = rows_per_image
        self.line_end = line_end
        self.sharing = sharing
        self.strict = strict
        if kv_budget is not None:
            # Its form; and where it is not in bytes, whether it suffices, which does not depend on the model.
            smallest = Geometry(self.schedule, 1, 1, 1), TokenBytes(1, 1)
            budget_tokens(kv_budget, *smallest)
            if not isinstance(kv_budget, str):
                self._plan(*smallest)
        self.reset()

    def reset(self):
        """Forget everything, as if no token had been seen."""
        self.layers: list[RasterLayer] = []
        # Tokens before the image; 0 while it is not known.
        self.condition = self.given_condition or 0
        self.plan: Plan | None = None
        self.lines: list[LinePlan] = []
        self.lossless = self.kv_budget is None
        self._meter: CacheMeter | None = None
        self.finite: torch.Tensor | None = None
        self._itemsize = 0

    def layer(self, index: int) -> "RasterLayer":
        """A layer, made when it is first asked for."""
        while len(self.layers) <= index:
            self.layers.append(RasterLayer(self, len(self.layers)))
        return self.layers[index]

    def report(self) -> CacheReport:
        """
        What was held so far, measured from the tensors. Tokens are image tokens; bytes, operations and the keys that a query
        saw include the condition.

        Raises:
            `ValueError`: if no line is complete yet.
        """
        if self._meter is None or not self._meter.boundaries:
            raise ValueError("No line is complete yet: there is nothing to report.")
        return self._meter.report(
            self.condition + self.schedule.total,
            self.condition + self.schedule.cacheable,
            self._itemsize,
            key_itemsize=self._itemsize,
            full_note="all tokens",
        )

    @property
    def has_begun(self) -> bool:
        """Whether an image token has come."""
        return self._meter is not None

    @property
    def meter(self) -> CacheMeter:
        """Counts what is held."""
        if self._meter is None:
            raise ValueError("No image token has come yet: there is nothing to count.")
        return self._meter

    def begin(self, key: torch.Tensor):
        """Settle the plan, when the first image token has come."""
        rows, heads, _, head_dim = key.shape
        geometry = Geometry(self.schedule, len(self.layers), heads, head_dim)
        metadata = self.method.metadata_bytes
        self.plan = self._plan(geometry, TokenBytes(self.rows_per_image, key.element_size(), metadata))
        self.lossless = self.plan is None
        self.lines = [] if self.plan is None else line_plans(self.plan, self.method)
        self._meter = CacheMeter(len(self.layers), heads, head_dim, rows, rows // self.rows_per_image)
        self._itemsize = key.element_size()

    def _plan(self, geometry: Geometry, token_bytes: TokenBytes) -> Plan | None:
        """The plan of the budget; `None` where nothing ever has to go."""
        if self.kv_budget is None:
            return None
        if isinstance(self.kv_budget, str):
            # The condition and the line that is being drawn lie beside what the budget is for.
            beside = self.condition + (0 if self.strict else self.width)
            budget = budget_tokens(self.kv_budget, geometry, token_bytes) - beside
        else:
            budget = budget_tokens(self.kv_budget, geometry, token_bytes)
        if budget >= self.schedule.cacheable + (self.width if self.strict else 0):
            return None
        allowed = budget - self.width if self.strict else budget
        smallest = self.method.min_budget(geometry, None)
        if allowed < smallest:
            smallest += self.width if self.strict else 0
            strict = " with `strict=True`" if self.strict else ""
            raise ValueError(
                f"`kv_budget={self.kv_budget!r}` leaves {max(0, budget)} image tokens a head, but method "
                f"{self.method.name!r} needs at least {smallest}{strict} on lines of {self.width}: set `kv_budget` to "
                f"{smallest} (tokens) or {round(smallest / self.schedule.total + 5e-5, 4)} (of {self.schedule.total}) or more."
            )
        return make_plan(self.method, geometry, None, token_bytes, allowed)


class RasterLayer:
    """
    One layer of a [`RasterCache`]. For each token [`~RasterLayer.append`] is called, and [`~RasterLayer.attend`] where that
    gives nothing back.
    """

    def __init__(self, cache: RasterCache, index: int):
        self.cache = cache
        self.index = index
        self.seen = 0
        # All heads in one group that nothing has left, and afterwards those of the plan.
        self.whole: LineGroup | None = None
        self.groups: list[LineGroup] = []
        self.queries: torch.Tensor | None = None
        self.evidence: torch.Tensor | None = None
        self.attended = 0

    @property
    def image_tokens(self) -> int:
        """Image tokens that were seen."""
        return max(0, self.seen - self.cache.condition) if self.cache.condition else 0

    @property
    def step(self) -> int:
        """The line of the token that was seen last."""
        return (self.image_tokens - 1) // self.cache.width

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        Take the keys and values of new tokens.

        Args:
            key, value (`torch.Tensor`):
                `[rows, heads, tokens, head_dim]`; one token, except before the image and where nothing ever has to go.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, *optional*: all keys and values, for the model's own attention; `None` where
            [`~RasterLayer.attend`] has to be called with the query.

        Raises:
            `ValueError`: if several image tokens come at once, or more than the grid and a line behind it have room for.
        """
        cache, tokens = self.cache, key.shape[2]
        if not cache.condition:
            cache.condition = tokens
        is_image = self.seen + tokens > cache.condition
        if is_image and not cache.has_begun:
            cache.begin(key)
        if is_image and tokens != 1 and not cache.lossless:
            raise ValueError(
                f"{tokens} tokens came at once after {self.seen} tokens, {cache.condition} of which come before the image, but "
                "image tokens must come one by one. A cache serves one generation: make a new one, or `reset` it. If the "
                "prompt comes in parts, say with `condition_tokens` how long it is."
            )
        self.seen += tokens
        for group in self.groups:
            self._write(group, key, value)
        if not self.groups:
            self._join(key, value)
        line = self._line()
        needs_query = self.whole is None or (line is not None and line.ranks)
        if is_image:
            self._count(key.shape[1], tokens)
            if not needs_query and self.image_tokens % cache.width == 0:
                self._commit()
        return None if self.whole is None or needs_query else (self.whole.key, self.whole.value)

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, scale: float, dense_attention: DenseAttention
    ) -> torch.Tensor:
        """
        Attend from the token that was appended last, and at the end of a line let go what has to.

        Args:
            query (`torch.Tensor`):
                `[rows, query heads, 1, head_dim]`; neighbouring heads share keys where there are more than of the keys.
            mask (`torch.Tensor`, *optional*):
                Which of all tokens that were seen may be attended to, boolean `[rows, 1, 1, seen]`; all by default.
            scale (`float`):
                Factor of the logits.
            dense_attention (`DenseAttention`):
                How the model attends while nothing has left.

        Returns:
            `torch.Tensor`: `[rows, query heads, 1, head_dim]`.
        """
        heads = sum(group.heads.shape[1] for group in self._present())
        shared = query.squeeze(2).unflatten(1, (heads, -1))
        if self.whole is not None:
            output = dense_attention(query, self.whole.key, self.whole.value)
        else:
            output = self._attend_to_groups(shared, mask, scale).flatten(1, 2).unsqueeze(2)
        column = (self.image_tokens - 1) % self.cache.width
        self._observe(shared, column)
        if column == self.cache.width - 1:
            self._end_line(mask, scale)
        return output

    # -- what a step is ------------------------------------------------------------------------------------------------

    def _present(self) -> list[LineGroup]:
        """All tokens that are held."""
        return self.groups if self.whole is None else [self.whole]

    def _line(self) -> LinePlan | None:
        """What happens at the end of the line of the token that was seen last; nothing behind the grid."""
        step = self.step
        return self.cache.lines[step] if 0 <= step < len(self.cache.lines) else None

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attend_to_groups(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Attention of `[rows, heads, sharing, head_dim]`, group by group."""
        if len(self.groups) == 1:
            return self._attend_to(self.groups[0], query, mask, scale)
        output = torch.empty_like(query)
        for group in self.groups:
            own = self._attend_to(group, of_heads(query, group.heads), mask, scale)
            output.scatter_(1, group.heads[..., None, None].expand_as(own), own)
        return output

    def _attend_to(
        self, group: LineGroup, query: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        present = self.cache.condition + group.tokens
        own = self._mask_of(group, mask)
        return attention(
            query,
            group.key[:, :, :present],
            group.value[:, :, :present],
            scale,
            None if own is None else own.unsqueeze(2),
        )

    def _mask_of(self, group: LineGroup, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which tokens of a group may be attended to, boolean `[rows, heads or 1, condition + tokens]`."""
        if mask is None or group.ids is None:
            return None if mask is None else mask[:, 0]
        rows, heads, _ = group.ids.shape
        condition = torch.arange(self.cache.condition, device=mask.device).expand(rows, heads, -1)
        places = torch.cat((condition, self.cache.condition + group.ids[:, :, : group.tokens].long()), dim=-1)
        return mask[:, 0].expand(-1, heads, -1).gather(-1, places)

    # -- storage -------------------------------------------------------------------------------------------------------

    def _join(self, key: torch.Tensor, value: torch.Tensor):
        """Add new tokens to those that lie together."""
        if self.whole is None:
            heads = torch.arange(key.shape[1], device=key.device).expand(len(key), -1)
            self.whole = LineGroup(heads, key, value, None, None, "", 0)
        else:
            self.whole.key = torch.cat((self.whole.key, key), dim=2)
            self.whole.value = torch.cat((self.whole.value, value), dim=2)
        self.whole.tokens = self.image_tokens

    def _write(self, group: LineGroup, key: torch.Tensor, value: torch.Tensor):
        """Put the new token into the next free slot."""
        place = self.cache.condition + group.tokens
        if place == group.key.shape[2]:
            raise ValueError(
                f"{self.image_tokens} tokens came after {self.cache.condition} that come before the image, but the grid has "
                f"{self.cache.schedule.total}. A cache serves one generation: make a new one, or `reset` it."
            )
        group.key[:, :, place] = of_heads(key.squeeze(2), group.heads)
        group.value[:, :, place] = of_heads(value.squeeze(2), group.heads)
        if group.ids is not None:
            group.ids[:, :, group.tokens] = self.image_tokens - 1
        group.tokens += 1

    def _split(self, whole: LineGroup, plan: LayerPlan) -> Iterator[LineGroup]:
        """The heads of all rows in the groups of the plan, still with all tokens."""
        method = self.cache.method
        order = whole.heads
        if self.evidence is not None and isinstance(method, TellsHeads):
            order = method.head_order(self.evidence)
        for places, label in zip(plan.groups, plan.labels):
            own = order[:, list(places)].sort(dim=-1).values
            carried = None if whole.carried is None else of_heads(whole.carried, own)
            key, value = (of_heads(plane, own) for plane in (whole.key, whole.value))
            yield LineGroup(own, key, value, None, carried, label, whole.tokens)

    def _keep(self, group: LineGroup, kept: torch.Tensor, carried: torch.Tensor | None, ids: torch.Tensor, slots: int):
        """Let a group hold the tokens at some positions `[rows, heads, tokens]` of those present, in so many slots."""
        condition = self.cache.condition
        rows, heads, tokens = kept.shape
        if group.ids is None:
            # The first time: planes of the group's own, with room for a line.
            group.ids = kept.new_empty(rows, heads, slots, dtype=id_dtype(self.cache.schedule.total + slots))
            group.key, group.value = (
                self._roomy(plane, kept, condition + slots) for plane in (group.key, group.value)
            )
            group.carried = None if carried is None else carried.new_empty(rows, heads, slots)
        else:
            for plane in (group.key, group.value):
                plane[:, :, condition : condition + tokens] = tokens_at(plane, kept + condition)
        group.tokens = tokens
        group.ids[:, :, :tokens] = ids.gather(-1, kept)
        if carried is not None and group.carried is not None:
            group.carried[:, :, :tokens] = carried.gather(-1, kept)

    def _roomy(self, plane: torch.Tensor, kept: torch.Tensor, slots: int) -> torch.Tensor:
        """The condition and the tokens that are kept in a plane of so many slots."""
        condition = self.cache.condition
        rows, heads, _, head_dim = plane.shape
        own = plane.new_empty(rows, heads, slots, head_dim)
        own[:, :, :condition] = plane[:, :, :condition]
        own[:, :, condition : condition + kept.shape[2]] = tokens_at(plane, kept + condition)
        return own

    # -- the end of a line ---------------------------------------------------------------------------------------------

    def _observe(self, query: torch.Tensor, column: int):
        """Keep the query `[rows, heads, sharing, head_dim]` of a column that is observed."""
        line = self._line()
        if line is None or column not in line.columns:
            return
        rows, heads, sharing, head_dim = query.shape
        if self.queries is None or self.queries.shape[2] != len(line.columns):
            self.queries = query.new_empty(rows, heads, len(line.columns), sharing, head_dim)
        self.queries[:, :, line.columns.index(column)] = query

    def _view(
        self,
        group: LineGroup,
        store: int,
        plan: Plan,
        queries: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> LineView:
        """What the method is shown of a group."""
        cache, step = self.cache, self.step
        condition, width, old = cache.condition, cache.width, group.tokens - cache.width
        key, value = (plane[:, :, : condition + group.tokens] for plane in (group.key, group.value))
        return LineView(
            schedule=cache.schedule,
            step=step,
            layer=self.index,
            heads=tuple(range(group.heads.shape[1])),
            label=group.label,
            budget=plan.budget,
            query=of_heads(queries, group.heads),
            key=key[:, :, -width:],
            value=value[:, :, -width:],
            stored_key=key[:, :, condition:-width],
            stored_value=value[:, :, condition:-width],
            attend=group.tokens,
            store=store,
            scale=scale,
            guided=cache.rows_per_image == 2,
            stored_ids=None if group.ids is None else group.ids[:, :, :old],
            stored_carried=None if group.carried is None else group.carried[:, :, :old],
            columns=torch.tensor(cache.lines[step].columns, device=key.device),
            condition_key=key[:, :, :condition],
            mask=self._mask_of(group, mask),
            line_end=cache.line_end,
        )

    def _end_line(self, mask: torch.Tensor | None, scale: float):
        """Look at the line that is complete, and let go what has to."""
        cache, method, line = self.cache, self.cache.method, self._line()
        if line is not None and cache.plan is not None and self.queries is not None:
            look = partial(self._view, plan=cache.plan, queries=self.queries, mask=mask, scale=scale)
            if self.whole is not None and line.identifies and isinstance(method, TellsHeads):
                evidence = method.head_evidence(look(self.whole, self.whole.tokens))
                self.evidence = evidence if self.evidence is None else self.evidence + evidence
            if line.loses:
                groups: Iterable[LineGroup] = self.groups
                if self.whole is not None:
                    groups = self._split(self.whole, cache.plan.layers[self.index])
                self.groups = [
                    self._shrunk(group, place, line.store[place], look) for place, group in enumerate(groups)
                ]
                self.whole = self.evidence = None
            elif self.whole is not None and method.carries_scores:
                view = look(self.whole, self.whole.tokens)
                ranking = method.rank(view)
                check_ranking(method, view, ranking)
                self.whole.carried = ranking.carried
        self._commit()

    def _shrunk(
        self, group: LineGroup, place: int, store: int, look: Callable[[LineGroup, int], LineView]
    ) -> LineGroup:
        """A group, which is the plan's at that place, after it has let go all but `store` tokens."""
        cache = self.cache
        view = look(group, store)
        ranking = cache.method.rank(view)
        check_ranking(cache.method, view, ranking)
        finite = torch.isfinite(ranking.scores).all()
        cache.finite = finite if cache.finite is None else cache.finite.to(finite.device) & finite
        slots = max(line.store[place] for line in cache.lines[self.step :]) + cache.width
        self._keep(group, top(ranking.scores, store, ranking.tiers), ranking.carried, view.ids, slots)
        return group

    # -- accounts ------------------------------------------------------------------------------------------------------

    def _count(self, heads: int, tokens: int):
        """Note what is held and looked at, when image tokens have come."""
        held = sum(group.heads.shape[1] * group.tokens for group in self._present())
        # Of several tokens, which only come where nothing goes, each looks at those before it and at itself.
        later = heads * sum(range(tokens))
        self.attended += tokens * (held + heads * self.cache.condition) - later
        self.cache.meter.hold(self.index, held)

    def _commit(self):
        """Note what is held between two lines."""
        cache, condition = self.cache, self.cache.condition
        tensors, beside, metadata = [], [], [] if self.queries is None else [self.queries]
        for group in self._present():
            for plane in (group.key, group.value):
                tensors.append(plane[:, :, condition : condition + group.tokens])
                beside.append(plane[:, :, :condition])
            metadata += [part[:, :, : group.tokens] for part in (group.ids, group.carried) if part is not None]
        cache.meter.commit(
            self.index,
            self.step,
            tensors,
            metadata,
            self.attended / cache.width,
            cache.width * cache.sharing,
            condition=beside,
        )
        self.attended = 0
        if self.index == len(cache.layers) - 1 and cache.finite is not None and not bool(cache.finite):
            raise ValueError(
                f"Method {cache.method.name!r} got scores that are not finite. The model's keys or queries overflowed: use a "
                "dtype with a larger range (bfloat16 or float32)."
            )


def line_plans(plan: Plan, method: Method) -> list[LinePlan]:
    """What happens at the end of each line."""
    store = plan.layers[0].store
    identifying = method.identifying_steps(plan) if isinstance(method, TellsHeads) else range(0)
    lines, before = [], (0,) * len(store[0])
    for step, width in enumerate(plan.schedule.lengths):
        # The last line has no successor in the plan: it leaves what that before it does, to what ends the image.
        own = store[min(step, len(store) - 2)]
        loses = any(old + width > new for old, new in zip(before, own))
        ranks = loses or step in identifying or method.carries_scores
        columns: Sequence[int] = ()
        if ranks:
            observed = method.observed_queries(plan, step)
            columns = range(width) if observed is None else observed
        lines.append(LinePlan(own, loses, step in identifying, ranks, tuple(columns)))
        before = own
    return lines


def of_heads(tensor: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Some heads of each row: `[rows, all heads, ...]` at `[rows, heads]`."""
    if heads.shape[1] == tensor.shape[1]:
        # All of them, and they are ascending.
        return tensor
    index = heads.view(*heads.shape, *(1,) * (tensor.ndim - 2)).expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, index)
