"""Sends an exported folder to the Hub. Imports no torch."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from .. import __version__
from ..errors import InputError, WorkError
from .manifest import exported_files

STALE = ["*.safetensors", "*.index.json", "*.py", "*.jinja"]
"""What an earlier push may have left on the Hub that would be loaded in place of what is sent now."""


def check_target(repo: str) -> None:
    """Whether a push can start: the name of the repository, a token, and that the Hub knows it.

    Raises:
        InputError: the name is malformed, or there is no token that the Hub accepts. A Hub that cannot be reached
            is not found out here: what was asked for is still written locally.
    """
    if repo.count("/") != 1:
        raise InputError(f"--push {repo}: a repository such as USER/NAME is needed")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push {repo}: no name for a repository: {str(error).splitlines()[0]}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"--push {repo}: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
    if get_token() is None:
        raise InputError(f"--push {repo}: no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise InputError(
                f"--push {repo}: the Hub refuses the token ({_words(error)}); log in again: `hf auth login --force`"
            ) from error
    except Exception:  # no network, a proxy, a timeout: the push itself will say so, after the export
        return


def push_folder(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Make the repository where it is missing, and commit an export to it.

    Files of an earlier export that this one does not have are deleted by the same commit; other files stay.

    Args:
        folder: written by `export`.
        repo: `USER/NAME`.
        private: a new repository is private; one that exists and is public is refused.
        revision: branch, made where it is missing; None is the main one.
    Returns:
        the address of the commit.
    Raises:
        InputError: not an export.
        WorkError: the Hub refused or cannot be reached; the folder is untouched.
    """
    names = exported_files(folder)
    api = HfApi()
    try:
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise WorkError(
                f"{repo}: exists on the Hub and is public, but --private was given; nothing was sent. Make it private "
                f"in its settings, or choose another name; {_again(folder, repo, private, revision)}"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=STALE,
            commit_message=f"Export by nha-convert {__version__}",
        )
    except WorkError:
        raise
    except Exception as error:  # the Hub client raises many unrelated classes; each means: it was not sent
        raise WorkError(
            f"{repo}: the Hub did not take it ({_words(error)}); {_again(folder, repo, private, revision)}"
        ) from error
    return str(commit.commit_url)


def _words(error: BaseException) -> str:
    """Status and words of the server where it answered, else the innermost reason."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for one in chain:
        if isinstance(one, HfHubHTTPError):
            said: Any = one.server_message or str(one)
            return f"{one.response.status_code}: {_first_line(str(said))}"
    return f"{type(chain[0]).__name__}: {_first_line(str(chain[0]) or str(chain[-1]))}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def _again(folder: Path, repo: str, private: bool, revision: str | None) -> str:
    options = f"{' --private' if private else ''}{f' --revision {revision}' if revision else ''}"
    return f"the export is kept in {folder}; push again with: nha-convert export {folder} --push {repo}{options}"
