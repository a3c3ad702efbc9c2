"""Publishing a student: the model card of a run, and the hub, which here is a server of this machine."""

from __future__ import annotations

import base64
import json
import re
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from PIL import Image
from tiny_sd import write_tiny_sd

from ddil_agents import dagger
from ddil_agents.commands.hub import check_push, push

try:
    from huggingface_hub import close_session
except ImportError:  # before 1.0
    from huggingface_hub.utils import reset_sessions as close_session

pytestmark = pytest.mark.usefixtures("elsewhere")

SMALL = shlex.split(
    "--num_updates 2 --teacher_steps 8 --batch_size 4 --collect_size 8 --updates_per_collect 2 --evaluate.n 10 --evaluate.n_action 2 "
    "--beta.forward 0 --beta.student 1"
)


class Hub(ThreadingHTTPServer):
    """Answers as the hub does: who a token is of, a repository made, files uploaded in one commit.

    Attributes:
        said: The paths of the questions who it is, and of what is to be written, in order.
        files: What was committed, by repository and name.
        role: Of the token.
        accepts: Whether it takes commits.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.said: list[str] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.role = "write"
        self.accepts = True


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, code: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if "whoami" in self.path:  # the client asks for other things too, by its version
            self.server.said.append(self.path)
        if self.path == "/api/whoami-v2" and self.headers["Authorization"] == "Bearer right":
            token = {"accessToken": {"role": self.server.role}}
            self.answer(200, {"type": "user", "name": "me", "orgs": [{"name": "lab"}], "auth": token})
        elif "expand=xetEnabled" in self.path:  # before 1.0
            self.answer(200, {"id": "me/fast", "xetEnabled": False})
        else:
            self.answer(401 if "whoami" in self.path else 404, {"error": "Invalid credentials"})

    def do_POST(self) -> None:
        self.server.said.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"  # by the client's version
            self.answer(200, {"url": f"{constants.ENDPOINT}/{repo}", "name": repo, "id": repo})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif "/commit/" in self.path and self.server.accepts:
            _, _, _, owner, name, *_ = self.path.split("/")
            lines = [json.loads(line) for line in body.splitlines()]
            found = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            self.server.files.setdefault(f"{owner}/{name}", {}).update(found)
            url = f"{constants.ENDPOINT}/{owner}/{name}/commit/1"
            self.answer(200, {"success": True, "commitOid": "1", "commitUrl": url, "hookOutput": "", "pullRequestUrl": None})
        else:
            self.answer(403, {"error": "You have no storage left"})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_ends_on_the_hub_with_its_card(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = ["--env.expert", "ddil_env.experts.stable_diffusion.StableDiffusion", "--env.model", str(write_tiny_sd(tmp_path / "teacher"))]
    prompts = ["--env.prompts", '["a bee", "two seas"]', "--stages", "[{num_steps: 4}, {num_steps: 2}]"]
    dagger.main([*teacher, *prompts, *SMALL, "--out", "run", "--push_to_hub", "lab/fast", "--hub_private", "true"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{constants.ENDPOINT}/lab/fast"
    files = {str(path.relative_to("run/student")): path.read_bytes() for path in Path("run/student").rglob("*") if path.is_file()}
    assert hub.files == {"lab/fast": files}
    assert hub.private == {"lab/fast": True}
    assert hub.said[0] == "/api/whoami-v2"
    card = files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "diffusers"
    assert (head["license"], head["pipeline_tag"]) == ("unknown", "text-to-image")
    assert "distillation" in head["tags"]
    assert 'DiffusionPipeline.from_pretrained("lab/fast"' in card
    assert "`dagger` of ddil " in card
    assert "4 gradient steps of 4 states in each of 1 process(es)" in card
    assert "states: forward 0, teacher 0, student 1. The teacher samples in 8 steps." in card
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[0])
    assert (settings["num_updates"], settings["stages"]) == (2, [{"num_steps": 4}, {"num_steps": 2}])
    models = json.loads(Path("run/result.json").read_text())["models"]
    assert all(f"| {name} " in card for name in models)
    assert "n = 10, evaluation seed 0, features of latent_pool8" in card
    assert "@article{garrepalli2024ddil," in card
    assert str(tmp_path) not in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet.replace("lab/fast", "run/student"), {})
    with Image.open("sample.png") as picture:
        assert picture.size == (16, 16)


def test_an_upload_that_fails_loses_nothing_and_a_resume_goes_on_with_it(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.accepts = False
    with pytest.raises(SystemExit) as stop:
        dagger.main(["--env", "gaussian_mixture", *SMALL, "--out", "run", "--push_to_hub", "me/fast"])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert re.search(
        r"the run is complete, but its student was not uploaded \(.*403.*\); upload it with: hf upload me/fast run/student \.", said.err
    )
    assert "dagger@4" in said.out
    assert Path("run/result.json").is_file()
    hub.accepts = True
    dagger.main(["--resume", "run"])
    assert hub.files == {"me/fast": {"student.safetensors": Path("run/student/student.safetensors").read_bytes()}}


def test_a_finished_run_is_published_by_its_resume(hub: Hub) -> None:
    dagger.main(["--env", "gaussian_mixture", *SMALL, "--out", "run"])
    assert not hub.said
    dagger.main(["--resume", "run", "--push_to_hub", "me/fast"])
    assert list(hub.files) == ["me/fast"]


@pytest.mark.parametrize(
    ("repo", "token", "role", "message"),
    [
        ("fast", "right", "write", "push_to_hub=fast: pass OWNER/NAME"),
        ("me/fa st", "right", "write", r"push_to_hub=me/fa st: .*; pass OWNER/NAME"),
        ("you/fast", "right", "write", r"the token is of me, which may write to the repositories of: me, lab; choose one of these owners"),
        ("me/fast", "wrong", "write", r"could not verify the token at .* \(.*\); check the network and the token \(`hf auth login`\)"),
        ("me/fast", "right", "read", "the token of me may only read; create one that may write"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_training(
    repo: str, token: str, role: str, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub.role = role
    with pytest.raises(SystemExit) as stop:
        dagger.main(["--env", "gaussian_mixture", *SMALL, "--out", "run", "--push_to_hub", repo])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("run").exists()
    assert set(hub.said) <= {"/api/whoami-v2"}


def test_no_token_and_no_network_are_told(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no Hugging Face token found; run `hf auth login`, or set HF_TOKEN"):
        check_push("me/fast")
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(
        ValueError, match=r"could not verify the token at .*127.0.0.1:9 .* leave push_to_hub out and run `hf upload me/fast RUN/student \.`"
    ):
        check_push("me/fast")
    with pytest.raises(ValueError, match=r"not uploaded .*; upload it with: hf upload me/fast .* \. --private"):
        push(tmp_path, "me/fast", private=True)
