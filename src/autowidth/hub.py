"""Runs on the Hugging Face Hub: pushed as their files, loaded from there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from autowidth.checkpoint import HISTORY, MODEL, RUN, Run, read_run, read_tensors
from autowidth.errors import AutoWidthError
from autowidth.extras import check_extra
from autowidth.takeaway import from_run
from autowidth.trace import Inputs
from autowidth.widths import WIDTHS

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

CARD = "README.md"
FILES = (MODEL, RUN, HISTORY, WIDTHS, CARD)
"""What a repository of a run holds; of these, a run may lack its history and its widths for people."""


class HubError(AutoWidthError, ConnectionError):
    """What the hub refuses, or that it does not answer."""


def push_to_hub(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a run of autowidth",
) -> str:
    """Puts a run into a model repository of the hub, in one commit; returns the address of the commit.

    The repository is made if it is not there. `token`: None for the one that huggingface_hub has stored. run.json goes
    along as it is, with the settings of the run: names of folders among them. A model card is written where the
    repository has none. Needs the extra `hub`.

    Raises MissingExtraError, CheckpointError where the run is missing or damaged, HubError where the hub refuses.
    """
    check_extra("hub", ("huggingface_hub",), what="the hub")
    from huggingface_hub import HfApi

    run = read_run(path)
    read_tensors(run)  # a damaged run stays here
    api = HfApi(token=token, library_name="autowidth")
    with _said(f"cannot push run {run.folder} to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = _operations(run, card=None if api.file_exists(repo_id, CARD) else _card(run))
        commit = api.create_commit(repo_id, operations, commit_message=message)
    return str(commit.commit_url)


def from_hub(
    repo_id: str,
    model_factory: Callable[[], nn.Module],
    *,
    revision: str | None = None,
    token: str | None = None,
    example_inputs: Inputs | None = None,
) -> nn.Module:
    """The network of a run on the hub, as `from_run` returns it; its files go into the cache of huggingface_hub.

    `revision` is a branch, tag or commit. Nothing that is loaded is ever run: weights are safetensors. Raises
    MissingExtraError, HubError, and what `from_run` raises.
    """
    check_extra("hub", ("huggingface_hub",), what="the hub")
    from huggingface_hub import snapshot_download

    with _said(f"cannot load {repo_id}"):
        folder = snapshot_download(
            repo_id, revision=revision, token=token, allow_patterns=list(FILES), library_name="autowidth"
        )
    with (
        tempfile.TemporaryDirectory() as place
    ):  # the cache holds links, and a run whose files lie elsewhere is refused
        for file in Path(folder).iterdir():
            if file.name in FILES:
                shutil.copyfile(file, Path(place) / file.name)
        return from_run(place, model_factory, example_inputs=example_inputs)


def _operations(run: Run, *, card: str | None) -> list[CommitOperationAdd]:
    """The files of a run as additions to a commit, under the names that a reader looks for."""
    from huggingface_hub import CommitOperationAdd

    files: dict[str, Path] = {MODEL: run.file(MODEL), RUN: run.folder / RUN, WIDTHS: run.file(WIDTHS)}
    if run.events is not None:
        files[HISTORY] = run.file(HISTORY)
    found = [CommitOperationAdd(name, str(file)) for name, file in files.items() if file.is_file()]
    return found if card is None else [*found, CommitOperationAdd(CARD, card.encode())]


def _card(run: Run) -> str:
    """A model card: what the run says of itself, and how to load it."""
    about = run.extra
    facts = [f"- network: `{about['model']}`"] if "model" in about else []
    if isinstance(result := about.get("result"), dict):
        facts += [
            f"- {name.replace('_', ' ')}: {result[name]}" for name in ("accuracy", "macs", "params") if name in result
        ]
    if classes := about.get("classes"):
        facts.append(f"- classes: {', '.join(map(str, classes))}")
    return "\n".join(
        [
            "---", "library_name: autowidth", "tags: [autowidth, pruning]", "---", "",
            "# A network with widths found by autowidth", "", *facts, "",
            "```python", "import autowidth as aw", "",
            "model = aw.from_hub(REPOSITORY, lambda: Net())  # the class that the run started with", "```", "",
            "`widths.json` holds the width of every layer.", "",
        ]
    )  # fmt: skip


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turns what huggingface_hub and its client raise into a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HfHubHTTPError, HFValidationError) as error:
        raise HubError(f"{what}: {' '.join(str(error).split())}") from error
    except OSError as error:  # among them: no connection, and nothing in the cache
        raise HubError(f"{what}: {' '.join(str(error).split())}") from error
