"""Plans in which all heads of a layer hold equally many tokens."""

from collections.abc import Sequence

from .base import Geometry, LayerPlan, Plan


def uniform_plan(geometry: Geometry, budget: int, protocol: str) -> Plan:
    """The plan that gives every head the same budget, as the head-agnostic methods do."""
    return layer_plan(geometry, budget, [[budget] * len(geometry.schedule)] * geometry.num_layers, protocol)


def layer_plan(geometry: Geometry, budget: int, limits: Sequence[Sequence[int]], protocol: str) -> Plan:
    """The plan that gives all heads of layer `l` the budget `limits[l][k]` after step `k`."""
    heads = tuple(range(geometry.num_heads))
    layers = {
        tuple(own): LayerPlan.from_limits(geometry.schedule, (heads,), ("all",), [(limit,) for limit in own], protocol)
        for own in limits
    }
    return Plan(geometry.schedule, budget, tuple(layers[tuple(own)] for own in limits))
