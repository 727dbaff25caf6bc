"""
A compression method of one's own, compared with others on the demo model (about two minutes on a laptop).

    python examples/add_a_method.py --output results/checkerboard

`docs/adding-a-method.md` walks through it. The folder then holds the table, the plot and the pictures.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from hack_pipelines.cli import main
from hack_pipelines.methods import Geometry, Method, Plan, Ranking, StepView, register_method, uniform_plan


if TYPE_CHECKING:
    from hack_pipelines import HeadProfile


@register_method
@dataclass
class Checkerboard(Method):
    """
    Keep the coarsest scales and, of all others, every second token first.

    Args:
        coarse (`int`, *optional*, defaults to 2):
            First scales that are never lost.
    """

    name: ClassVar[str] = "checkerboard"  # what method="..." and --method call it
    protocol = "post"  # attends to all that is there, then stores a part
    needs_ids: ClassVar[bool] = True  # ranking reads which tokens are there
    source: ClassVar[str] = "an example"

    coarse: int = 2  # an option: a field with a default

    def min_budget(self, geometry: Geometry, profile: "HeadProfile | None") -> int:
        return sum(geometry.schedule.lengths[: self.coarse]) + 1

    def plan(
        self,
        geometry: Geometry,
        budget: int,
        profile: "HeadProfile | None",
        attention_budget: int | None = None,
    ) -> Plan:
        return uniform_plan(geometry, budget, self.protocol)

    def rank(self, view: StepView) -> Ranking:
        schedule, ids = view.schedule, view.ids
        starts = torch.tensor(schedule.prefixes, device=ids.device)
        widths = torch.tensor([width for _, width in schedule.sizes], device=ids.device)
        scales = torch.bucketize(ids, starts[1:], right=True)
        place = ids - starts[scales]
        rows, columns = place // widths[scales], place % widths[scales]
        coarse = (scales < self.coarse).long()
        # Newer scales before older ones; inside a scale the black squares before the white ones.
        scores = scales + ((rows + columns) % 2 == 0) * 0.5
        # The first scales have never lost a token, so their places are the same for all rows and heads.
        return Ranking(scores.float(), tiers=coarse[0, 0])


if __name__ == "__main__":
    sys.exit(
        main(
            [
                "compare",
                *("--methods", "checkerboard", "scale_window", "random", "hack++"),
                *("--budgets", "0.3", "0.1"),
                *("--images", "16"),
                *sys.argv[1:],
            ]
        )
    )
