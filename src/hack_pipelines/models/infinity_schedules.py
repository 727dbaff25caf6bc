"""The scale schedules that Infinity was trained on, the grid that rotary positions refer to, and its sampling settings."""

from ..schedule import Schedule


# By height over width; the order decides between ratios that are equally near.
RATIOS = (1.0, 1.25, 0.8, 1.333, 0.75, 1.5, 0.666, 1.75, 0.571, 2.0, 0.5, 2.5, 0.4, 3.0, 0.333)
# How many of a template's scales a pixel class uses.
PIXEL_CLASSES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
DOWNSCALE_FACTOR = 16
"""Image pixels per side of a token, with either tokenizer."""

# What the original's notebooks and `reproduce.py` draw with; the temperature is 0.5 for the 2B and 1 for the patchified 8B.
DEFAULT_SAMPLING = {"guidance_scale": 3.0, "temperature": 0.5, "top_k": 900, "top_p": 0.97}

TALL = {
    1.0: "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def template_sizes(ratio: float) -> tuple[tuple[int, int], ...]:
    """All 13 token maps of a template."""
    tall = ratio if ratio in TALL else TALL_OF[ratio]
    sizes = tuple((int(high), int(wide)) for high, wide in (size.split("x") for size in TALL[tall].split()))
    return sizes if tall == ratio else tuple((wide, high) for high, wide in sizes)


# A wide template is its tall one turned by a quarter.
TALL_OF = dict(zip([ratio for ratio in RATIOS if ratio < 1], [ratio for ratio in TALL if ratio > 1]))


def nearest_ratio(height: float, width: float) -> float:
    """The template for an image's height over its width: the one at the smallest linear distance."""
    return min(RATIOS, key=lambda ratio: abs(height / width - ratio))


def template_schedule(ratio: float, pixel_class: str) -> Schedule:
    """
    The schedule of a template for a pixel class.

    Args:
        ratio (`float`):
            One of `RATIOS`.
        pixel_class (`str`):
            One of `PIXEL_CLASSES`.
    """
    return Schedule(template_sizes(ratio)[: PIXEL_CLASSES[pixel_class]])


def image_size(schedule: Schedule) -> tuple[int, int]:
    """Height and width in pixels of what a released model draws along a schedule."""
    height, width = schedule.sizes[-1]
    return height * DOWNSCALE_FACTOR, width * DOWNSCALE_FACTOR


def nearest_schedule(height: int, width: int) -> Schedule:
    """The schedule whose image is nearest to a size: first by its ratio of sides, then by its number of pixels."""
    ratio = nearest_ratio(height, width)
    schedules = [template_schedule(ratio, pixel_class) for pixel_class in PIXEL_CLASSES]
    wanted = height * width

    def distance(schedule: Schedule) -> float:
        high, wide = image_size(schedule)
        return max(high * wide / wanted, wanted / (high * wide))

    return min(schedules, key=distance)


def reference_size(schedule: Schedule) -> tuple[int, int]:
    """
    The token map whose cells rotary positions count: the last one of the 13 of the schedule's template, whatever part of
    them is drawn. A schedule that is in no template takes the one whose ratio is nearest to that of its last map.
    """
    for ratio in RATIOS:
        if template_sizes(ratio)[: len(schedule)] == schedule.sizes and len(schedule) >= min(PIXEL_CLASSES.values()):
            return template_sizes(ratio)[-1]
    return template_sizes(nearest_ratio(*schedule.sizes[-1]))[-1]
