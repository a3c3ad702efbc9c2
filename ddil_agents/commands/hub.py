"""Publishing a run's student on the Hugging Face hub; what the hub would refuse after the training is asked before it.

python -m ddil_agents.dagger --env sd15 --push_to_hub me/sd15-in-4-steps --hub_private true
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, LocalTokenNotFoundError, validate_repo_id

from ddil_agents.training.checkpoint import write_atomically


def check_push(repo: str) -> None:
    """Refuses a repository that the student could not be written to.

    Raises:
        ValueError: it is no OWNER/NAME, the hub is not reached, or its answer is that the token is missing, wrong, read-only or another's.
    """
    start = f"push_to_hub={repo}"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{start}: {error}; pass OWNER/NAME") from error
    if "/" not in repo:
        raise ValueError(f"{start}: pass OWNER/NAME, the user or organisation too")
    api = HfApi()
    try:
        told = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"{start}: there is no token of the hub here; run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # of requests or httpx, by the hub client's version
        raise ValueError(
            f"{start}: {api.endpoint} did not say who the token is of ({_first_line(error)}); mend the network or the token "
            f"(`hf auth login`), or leave push_to_hub out and run `{upload_command('RUN/student', repo)}` later"
        ) from error
    owners = [told["name"], *(each["name"] for each in told.get("orgs", []))]
    if repo.split("/")[0] not in owners:
        raise ValueError(f"{start}: the token is of {owners[0]}, whose repositories are of: {', '.join(owners)}; choose one of them")
    if told.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{start}: the token of {owners[0]} may only read; make one that may write, and run `hf auth login` again")


def push(folder: Path, repo: str, private: bool) -> str:
    """Uploads a student's folder, whose model card then names the repository; returns its address.

    Raises:
        ValueError: the hub did not take it; says how to go on.
    """
    card, api = folder / "README.md", HfApi()
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        write_atomically(card, text.replace('from_pretrained("student"', f'from_pretrained("{repo}"'))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A student of ddil")
    except Exception as error:
        why, cure = _first_line(error), upload_command(folder, repo, private)
        raise ValueError(f"the run is whole, but its student was not uploaded ({why}); upload it by: {cure}") from error
    return f"{api.endpoint}/{repo}"


def upload_command(folder: Path | str, repo: str, private: bool = False) -> str:
    """What uploads the folder from a shell."""
    return f"hf upload {repo} {folder} .{' --private' if private else ''}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
