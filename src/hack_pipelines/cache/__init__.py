"""Caches for keys and values: the attention layer hands over a scale and gets its output back."""

from functools import partial

from ..methods.base import Method, Plan
from ..methods.segment_plan import SegmentPlan
from .cache import Cache, FullCache
from .head_group import HeadGroupCache
from .report import CacheReport
from .rowwise import RowwiseCache
from .segments import SegmentCache
from .storage import Storage


def make_cache(plan: Plan, method: Method, guided: bool = False, storage: Storage | None = None) -> Cache:
    """
    The cache that carries out a plan.

    Args:
        plan (`Plan`):
            Lengths of every layer, group and step.
        method (`Method`):
            Ranks the tokens.
        guided (`bool`, *optional*, defaults to `False`):
            Whether the second half of the rows are the unconditional ones of guidance.
        storage (`Storage`, *optional*):
            The form in which keys and values are held; as attention reads them by default.
    """
    if isinstance(plan, SegmentPlan):
        return SegmentCache(plan, guided, storage)
    if method.plans_by_row and plan.budget < plan.schedule.cacheable:
        make_row = partial(HeadGroupCache, plan, method, storage=storage)
        return RowwiseCache(plan.schedule, len(plan.layers), make_row, guided, method.needs_projection)
    return HeadGroupCache(plan, method, guided, storage)


__all__ = ["Cache", "CacheReport", "FullCache", "HeadGroupCache", "RowwiseCache", "SegmentCache", "make_cache"]
