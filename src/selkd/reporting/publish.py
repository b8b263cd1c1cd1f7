"""Pushes the finished student to the Hugging Face hub."""

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HTTPError

from selkd.errors import InputError, RunError
from selkd.recipe.recipe import HubOptions


def require_login() -> None:
    """Raise InputError if nobody is logged in: the push would fail after the training."""
    if huggingface_hub.get_token() is None:
        raise InputError("hub: nobody is logged in to the Hugging Face hub; `hf auth login`, or set HF_TOKEN.")


def push_student(student: Path, options: HubOptions) -> dict[str, Any]:
    """Upload the student's folder with its card, into a new repository if there is none yet.

    Returns:
        The ``repo``, ``url`` and ``commit`` of the upload.

    Raises:
        RunError: the hub refused or could not be reached; no local file is changed.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=options.repo, folder_path=str(student), commit_message="A student distilled with selkd"
        )
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"hub: {options.repo} was not pushed ({reason:.200}). The student is finished in {student}; run "
            "again to push."
        ) from error
    return {"repo": options.repo, "url": str(commit.commit_url), "commit": commit.oid}
