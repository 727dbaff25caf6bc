"""Builds the emoji data set that the demo models are trained on: pictures with alpha, a class and a caption for each.

Run `python data.py --data examples/train_demo/data`. The npm packages are fetched with `npm pack`, everything else is
local, and the result is one `emoji.npz` beside `classes.json` (sorted class names; the position is the class id).
"""

import argparse
import io
import json
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "captions": "emojibase-data@17.0.0",
}
STYLES = ("3d", "flat")
# Pictures are stored at twice the training side, so that augmentation can shrink them without blurring.
STORED_SIDE = 128
TRAIN, HELD_OUT_PICTURE, HELD_OUT_CONCEPT = 0, 1, 2

MIN_CONCEPTS = 8
SKIPPED_GROUPS = {"component", "flags"}
SKIPPED_SUBGROUPS = {"person-symbol", "hotel"}
# Subgroups with fewer than MIN_CONCEPTS concepts join the one that looks most like them.
MERGED_SUBGROUPS = {
    "face-tongue": "face-smiling",
    "face-hat": "face-smiling",
    "face-glasses": "face-smiling",
    "face-hand": "face-neutral-skeptical",
    "face-sleepy": "face-unwell",
    "monkey-face": "animal-mammal",
    "animal-amphibian": "animal-reptile",
    "hand-single-finger": "hand-fingers-partial",
    "hand-fingers-closed": "hands",
    "hand-prop": "hands",
    "person-resting": "person-activity",
    "dishware": "household",
    "place-map": "place-geographic",
    "place-religious": "place-building",
    "award-medal": "sport",
    "writing": "arts-crafts",
    "phone": "computer",
    "lock": "tool",
    "medical": "science",
    "gender": "other-symbol",
    "math": "other-symbol",
    "currency": "other-symbol",
    "punctuation": "other-symbol",
}
# Backgrounds that a caption can ask for, as RGB; white goes without saying.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (224, 62, 62),
    "orange": (247, 160, 66),
    "yellow": (252, 225, 112),
    "green": (110, 190, 110),
    "blue": (90, 155, 225),
    "purple": (160, 110, 205),
    "pink": (247, 175, 205),
    "black": (30, 30, 34),
}
# A mirrored letter, arrow or clock is a wrong one.
NEVER_MIRRORED = {
    "alphanum",
    "arrow",
    "av-symbol",
    "book-paper",
    "keycap",
    "music",
    "office",
    "other-symbol",
    "religion",
    "time",
    "transport-sign",
    "warning",
    "zodiac",
}


@dataclass
class EmojiData:
    """Pictures and their labels.

    Args:
        images (`torch.Tensor`): `[N, 4, S, S]` uint8, RGBA, alpha not premultiplied.
        class_ids (`torch.Tensor`): `[N]` int64, positions in `class_names`.
        splits (`torch.Tensor`): `[N]` int64, one of `TRAIN`, `HELD_OUT_PICTURE` and `HELD_OUT_CONCEPT`.
        mirrored (`torch.Tensor`): `[N]` bool, whether a mirrored copy still shows the same thing.
        captions (`list[str]`): Label of each picture, without its style.
        styles (`list[str]`): Style of each picture, one of `STYLES`.
        class_names (`list[str]`): Sorted class names.
    """

    images: torch.Tensor
    class_ids: torch.Tensor
    splits: torch.Tensor
    mirrored: torch.Tensor
    captions: list[str]
    styles: list[str]
    class_names: list[str]

    def indices(self, split: int) -> torch.Tensor:
        return torch.nonzero(self.splits == split).flatten()


def load_data(folder: Path) -> EmojiData:
    """Reads what `build` wrote."""
    with np.load(folder / "emoji.npz") as arrays:
        return EmojiData(
            images=torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous(),
            class_ids=torch.from_numpy(arrays["class_ids"]),
            splits=torch.from_numpy(arrays["splits"]),
            mirrored=torch.from_numpy(arrays["mirrored"]),
            captions=arrays["captions"].tolist(),
            styles=arrays["styles"].tolist(),
            class_names=json.loads((folder / "classes.json").read_text()),
        )


def colours(backgrounds: torch.Tensor) -> torch.Tensor:
    """Colours `[B, 3, 1, 1]` in [-1, 1] of positions `[B]` in `BACKGROUNDS`."""
    table = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    return table[backgrounds][:, :, None, None]


def on_colour(images: torch.Tensor, background: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Composites uint8 RGBA `[B, 4, S, S]` on colours `[B, 3, 1, 1]`, white by default: float `[B, 3, S, S]` in [-1, 1]."""
    images = images.float() / 255
    colour, alpha = images[:, :3] * 2 - 1, images[:, 3:]
    return colour * alpha + background * (1 - alpha)


def plain_view(images: torch.Tensor, side: int, background: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The pictures on a plain colour at the training side, without augmentation."""
    return F.interpolate(on_colour(images, background), size=(side, side), mode="bilinear", antialias=True)


def augmented_view(
    images: torch.Tensor,
    mirrored: torch.Tensor,
    side: int,
    generator: torch.Generator,
    background: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """A random view: mirrored where that is allowed, up to an eighth smaller, anywhere on the square of one colour.

    The batch shares one size, because resizing with antialiasing works on whole batches only.
    """
    content = int(torch.randint(side * 7 // 8, side + 1, (), generator=generator))
    pictures = plain_view(images, content, background)
    flip = mirrored & (torch.rand(len(images), generator=generator) < 0.5)
    pictures = torch.where(flip[:, None, None, None], pictures.flip(-1), pictures)
    views = torch.ones(len(images), 3, side, side) * background
    corners = torch.randint(0, side - content + 1, (len(images), 2), generator=generator).tolist()
    for view, picture, (top, left) in zip(views, pictures, corners):
        view[:, top : top + content, left : left + content] = picture
    return views


def fetch(archives: Path, package: str) -> tarfile.TarFile:
    """Downloads one npm package unless it is there already, and opens it."""
    archives.mkdir(parents=True, exist_ok=True)
    name, version = package.rsplit("@", 1)
    path = archives / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", package, "--silent"], cwd=archives, check=True)
    return tarfile.open(path)


def read_json(archive: tarfile.TarFile, path: str):
    return json.load(archive.extractfile(f"package/{path}"))


def code_point_key(hexcode: str) -> str:
    """The packages disagree on letter case and on the variation selector."""
    return hexcode.lower().replace("-fe0f", "")


def shrink(picture: Image.Image) -> np.ndarray:
    """RGBA uint8 `[S, S, 4]`; pillow averages with premultiplied alpha, so no fringe of the hidden colour appears."""
    picture = picture.convert("RGBA").resize((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def pictures_3d(archives: Path) -> dict[str, np.ndarray]:
    pictures = {}
    with fetch(archives, PACKAGES["3d"]) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".webp"):
                stream = io.BytesIO(archive.extractfile(member).read())
                pictures[code_point_key(Path(member.name).stem)] = shrink(Image.open(stream))
    return pictures


def pictures_flat(archives: Path) -> dict[str, np.ndarray]:
    # Only who builds the data set needs the renderer.
    import resvg_py

    with fetch(archives, PACKAGES["flat"]) as archive:
        icons, names = read_json(archive, "icons.json"), read_json(archive, "chars.json")
    side = icons["width"]
    pictures = {}
    for hexcode, name in names.items():
        icon = icons["icons"].get(name)
        if icon is None or "skin-tone" in name:
            continue
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{icon["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * STORED_SIDE, height=4 * STORED_SIDE)
        pictures[code_point_key(hexcode)] = shrink(Image.open(io.BytesIO(bytes(png))))
    return pictures


def read_concepts(archives: Path) -> list[dict[str, str]]:
    """Every emoji that is neither a flag nor a skin tone, with the subgroup that becomes its class."""
    with fetch(archives, PACKAGES["captions"]) as archive:
        entries, meta = read_json(archive, "en/data.json"), read_json(archive, "meta/groups.json")
    concepts = []
    for entry in entries:
        if "group" not in entry or meta["groups"][str(entry["group"])] in SKIPPED_GROUPS:
            continue
        subgroup = meta["subgroups"][str(entry["subgroup"])]
        if subgroup not in SKIPPED_SUBGROUPS:
            subgroup = MERGED_SUBGROUPS.get(subgroup, subgroup)
            concepts.append({"key": code_point_key(entry["hexcode"]), "label": entry["label"], "subgroup": subgroup})
    return concepts


def choose_splits(keys: list[str], held_out: int, generator: np.random.Generator) -> np.ndarray:
    """Holds out `held_out` concepts in every style, and one picture of as many others."""
    order = generator.permutation(sorted(set(keys))).tolist()
    concepts, pictures = set(order[:held_out]), set(order[held_out : 2 * held_out])
    splits = np.full(len(keys), TRAIN)
    for key in concepts | pictures:
        rows = [row for row, other in enumerate(keys) if other == key]
        if key in concepts:
            splits[rows] = HELD_OUT_CONCEPT
        elif len(rows) > 1:
            splits[generator.choice(rows)] = HELD_OUT_PICTURE
    return splits


def build(folder: Path, held_out: int = 60, seed: int = 0) -> None:
    """Writes `emoji.npz` and `classes.json` into `folder`."""
    archives = folder / "archives"
    by_style = {"3d": pictures_3d(archives), "flat": pictures_flat(archives)}
    concepts = [c for c in read_concepts(archives) if any(c["key"] in pictures for pictures in by_style.values())]
    sizes = Counter(concept["subgroup"] for concept in concepts)
    concepts = [concept for concept in concepts if sizes[concept["subgroup"]] >= MIN_CONCEPTS]
    subgroups = sorted({concept["subgroup"] for concept in concepts})
    rows = [(style, c) for style in STYLES for c in concepts if c["key"] in by_style[style]]
    np.savez_compressed(
        folder / "emoji.npz",
        images=np.stack([by_style[style][concept["key"]] for style, concept in rows]),
        class_ids=np.array([subgroups.index(concept["subgroup"]) for _, concept in rows]),
        splits=choose_splits([concept["key"] for _, concept in rows], held_out, np.random.default_rng(seed)),
        mirrored=np.array([concept["subgroup"] not in NEVER_MIRRORED for _, concept in rows]),
        captions=np.array([concept["label"] for _, concept in rows]),
        styles=np.array([style for style, _ in rows]),
    )
    names = [subgroup.replace("-", " ") for subgroup in subgroups]
    (folder / "classes.json").write_text(json.dumps(names, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data", help="folder to write")
    folder = parser.parse_args().data
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    data = load_data(folder)
    counts = [len(data.indices(split)) for split in (TRAIN, HELD_OUT_PICTURE, HELD_OUT_CONCEPT)]
    print(f"{len(data.class_names)} classes; {counts[0]} pictures to train on, held out {counts[1]} pictures of seen")
    print(f"concepts and {counts[2]} pictures of unseen concepts; styles {dict(Counter(data.styles))}")


if __name__ == "__main__":
    main()
