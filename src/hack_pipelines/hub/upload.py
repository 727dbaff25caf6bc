"""From a folder to a repo on the Hub."""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .cards import CARD_NAME, is_unedited
from .client import download, patient
from .errors import explained


logger = logging.get_logger(__name__)


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    replace_card: bool = False,
) -> CommitInfo:
    """
    Put all files of a folder into a repo, in one commit, so that nobody reads half of them. The repo and the branch are made
    where they are missing. Weight files of the same models that the folder does not have are removed in the same commit: those
    of a model that was stored in other shards would be read before the new ones.

    Args:
        folder (`Path`):
            What to upload.
        repo_id (`str`):
            Where to.
        commit_message (`str`):
            What the commit is called.
        private (`bool`, *optional*):
            Whether a repo that is made now can be seen by its owner only; the owner's setting by default.
        token (`str` or `bool`, *optional*):
            That may write; by default the one of `hf auth login`.
        revision (`str`, *optional*):
            Branch, `"main"` by default.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to propose the commit instead, as a pull request.
        tag (`str`, *optional*):
            Name of a tag for the commit, so that a revision exists which does not move.
        replace_card (`bool`, *optional*, defaults to `False`):
            Whether to write over a card on the Hub that somebody edited. One that this package wrote is always renewed.

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit.

    Raises:
        `ValueError`: if the tag is taken, or the token may not write.
        `ConnectionError`: if the Hub cannot be reached.
    """
    check_upload(repo_id, revision, create_pr, tag)
    api = HfApi(token=token)
    with explained(repo_id, revision, act="write to"):
        repo_id = patient(lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if tag is not None:
            check_tag(api, repo_id, tag)
        if revision is not None:
            patient(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        there = patient(lambda: api.list_repo_files(repo_id, revision=revision))
        if not replace_card:
            for card in [name for name in files if Path(name).name == CARD_NAME and name in there]:
                if not unedited_there(repo_id, card, revision, token):
                    logger.warning(
                        f"The Hub repo {repo_id!r} keeps its {card}, which somebody edited: `replace_card` writes over it."
                    )
                    del files[card]
        adding = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        removing = [CommitOperationDelete(path_in_repo=name) for name in there if is_stale(name, files)]
        info = patient(
            lambda: api.create_commit(
                repo_id, [*removing, *adding], commit_message=commit_message, revision=revision, create_pr=create_pr
            )
        )
        if tag is not None:
            patient(lambda: api.create_tag(repo_id, tag=tag, revision=info.oid))
    return info


def check_upload(repo_id: str, revision: str | None, create_pr: bool, tag: str | None):
    """Refuse what no repo can take, before anything is made or sent."""
    with explained(repo_id, revision):
        validate_repo_id(repo_id)
    if create_pr and (tag is not None or revision is not None):
        raise ValueError("`create_pr` proposes a commit to the main branch: leave `tag` and `revision` out.")


def check_tag(api: HfApi, repo_id: str, tag: str):
    """Refuse a tag that is taken, before anything is uploaded."""
    refs = patient(lambda: api.list_repo_refs(repo_id))
    if tag in [ref.name for ref in (*refs.tags, *refs.branches)]:
        raise ValueError(
            f"The Hub repo {repo_id!r} has a revision {tag!r} already, which others may rely on: give the tag another name."
        )


def unedited_there(repo_id: str, card: str, revision: str | None, token: str | bool | None) -> bool:
    """Whether a card in a repo is as this package wrote it."""
    with TemporaryDirectory() as cache:
        try:
            path = download(repo_id, card, {"revision": revision, "token": token, "cache_dir": cache})
        except EntryNotFoundError:
            return True
        return is_unedited(path.read_text(encoding="utf-8", errors="replace"))


def is_stale(name: str, files: dict[str, Path]) -> bool:
    """Whether a file of a repo is of a model whose weights are uploaded, in the same variant, but not among them."""
    if name in files or (stem := weights_stem(name)) is None:
        return False
    return stem in {weights_stem(uploaded) for uploaded in files}


def weights_stem(name: str) -> str | None:
    """What all weight files of a model in one variant have in common: their path without number of the shard and ending."""
    path, shard = name, r"(-\d{5}-of-\d{5})?"
    match = re.fullmatch(
        rf"(.+/)(diffusion_pytorch_model|model)(\.[\w.]+?)?{shard}\.safetensors", path
    ) or re.fullmatch(r"(.+/)(diffusion_pytorch_model|model)\.safetensors\.index(\.[\w.]+?)?()\.json", path)
    return None if match is None else f"{match[1]}{match[2]}{match[3] or ''}"
