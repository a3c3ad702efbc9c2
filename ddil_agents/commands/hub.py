"""Uploads a run's student to the Hugging Face hub; the access is checked before the training.

python -m ddil_agents.dagger --env sd15 --push_to_hub me/sd15-in-4-steps --hub_private true
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, LocalTokenNotFoundError, validate_repo_id

from ddil_agents.training.checkpoint import write_atomically


def check_push(repo: str) -> None:
    """Checks that a student can be uploaded to a repository.

    Raises:
        ValueError: the name is not OWNER/NAME, the hub cannot be reached, or the token is missing, wrong, read-only or of another owner.
    """
    given = f"push_to_hub={repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{given}: {error}; pass OWNER/NAME") from error
    if "/" not in repo:
        raise ValueError(f"{given}: pass OWNER/NAME, the user or organisation too")
    api = HfApi()
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{given}: no Hugging Face token found; run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # an error of requests or httpx, depending on the version of huggingface_hub
        raise ValueError(
            f"{given}: could not verify the token at {api.endpoint} ({_first_line(error)}); check the network and the token "
            f"(`hf auth login`), or leave push_to_hub out and run `{upload_command('RUN/student', repo)}` later"
        ) from error
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    if repo.split("/")[0] not in owners:
        raise ValueError(
            f"{given}: the token is of {owners[0]}, which may write to the repositories of: {', '.join(owners)}; choose one of these owners"
        )
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{given}: the token of {owners[0]} may only read; create one that may write, and run `hf auth login` again")


def push(folder: Path, repo: str, private: bool) -> str:
    """Writes the repository's name into the model card of a student and uploads its folder.

    Args:
        folder: The student's folder.
        repo: OWNER/NAME.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the upload failed; the message has the command that repeats it.
    """
    card, api = folder / "README.md", HfApi()
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        write_atomically(card, text.replace('from_pretrained("student"', f'from_pretrained("{repo}"'))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A student of ddil")
    except Exception as error:
        reason, command = _first_line(error), upload_command(folder, repo, private)
        raise ValueError(f"the run is complete, but its student was not uploaded ({reason}); upload it with: {command}") from error
    return f"{api.endpoint}/{repo}"


def upload_command(folder: Path | str, repo: str, private: bool = False) -> str:
    """The shell command that uploads a folder."""
    return f"hf upload {repo} {folder} .{' --private' if private else ''}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
