"""Classes by id and by name."""

import difflib
from collections.abc import Iterable, Mapping

from .settings import is_whole


NULL_CLASS = -1


def labels_by_name(id2label: Mapping[str, str]) -> dict[str, list[int]]:
    """
    Class ids by name. A class is found by its whole name or by one of its synonyms; a few ImageNet names belong to two
    classes, unless they are the whole name of one.

    Args:
        id2label (`Mapping[str, str]`):
            Names of the classes by id; several names of one class are separated by commas.
    """
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for key, names in id2label.items():
        whole.setdefault(normalised(names), []).append(int(key))
        for name in {normalised(part) for part in names.split(",")}:
            synonyms.setdefault(name, []).append(int(key))
    return {**synonyms, **whole}


def class_id(name: str, id2label: Mapping[str, str], num_classes: int) -> int:
    """
    Id of a class name; case does not matter.

    Args:
        name (`str`):
            The name, `"golden retriever"` for example.
        id2label (`Mapping[str, str]`):
            As of [`labels_by_name`].
        num_classes (`int`):
            Classes of the model.

    Raises:
        `ValueError`: if the name is unknown, with the nearest ones, or if it belongs to several classes, with their ids.
    """
    known = labels_by_name(id2label)
    ids = known.get(normalised(name), [])
    if len(ids) == 1:
        return ids[0]
    if ids:
        full = "; ".join(f"{entry} ({id2label[str(entry)]})" for entry in ids)
        raise ValueError(f"Class name {name!r} belongs to several classes: {full}. Give the id.")
    nearest = difflib.get_close_matches(normalised(name), known, n=5, cutoff=0.4)
    hint = f" Did you mean {', '.join(map(repr, nearest))}?" if nearest else ""
    if not known:
        hint = f" This model has no class names: give ids from 0 to {num_classes - 1}."
    raise ValueError(f"There is no class named {name!r}.{hint}")


def class_ids(labels: Iterable[int | str], id2label: Mapping[str, str], num_classes: int) -> list[int]:
    """
    Ids of classes, the null class as `num_classes`.

    Args:
        labels (iterable of `int` or `str`):
            Ids or names; -1 is the null class.
        id2label, num_classes:
            As of [`class_id`].

    Raises:
        `ValueError`: if there is no such class, or none is given.
    """
    ids = []
    for label in labels:
        if isinstance(label, str):
            ids.append(class_id(label, id2label, num_classes))
        elif is_whole(label) and NULL_CLASS <= label < num_classes:
            ids.append(num_classes if label == NULL_CLASS else int(label))
        else:
            raise ValueError(
                f"`class_labels` must hold names, ids from 0 to {num_classes - 1}, or -1 for the null class, but holds "
                f"{label!r}."
            )
    if not ids:
        raise ValueError("`class_labels` is empty: give at least one class.")
    return ids


def normalised(name: str) -> str:
    """A class name as it is looked up."""
    return " ".join(name.casefold().replace("_", " ").split())
