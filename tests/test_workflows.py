"""The comment on a pull request is posted once, and then kept up to date: the real gh talks to an API on loopback."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import environment
from support.project import ROOT

from commands.report import MARK

pytestmark = pytest.mark.skipif(not shutil.which("gh"), reason="needs gh (Debian: apt-get install gh)")


class GitHub(http.server.ThreadingHTTPServer):
    """The part of GitHub's API that has the comments of pull request 7 of owner/project."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.comments = [{"id": 1, "user": {"type": "User"}, "body": f"What does {MARK} mean?"}]
        self.writable = True


class Handler(http.server.BaseHTTPRequestHandler):
    server: GitHub

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        assert "/repos/owner/project/issues/7/comments" in self.path
        self.answer(200, self.server.comments)

    def write(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"]
        if not self.server.writable:
            self.answer(403, {"message": "Resource not accessible by integration"})
        elif self.path.endswith("/repos/owner/project/issues/7/comments"):
            number = len(self.server.comments) + 1
            self.server.comments.append({"id": number, "user": {"type": "Bot"}, "body": body})
            self.answer(201, self.server.comments[-1])
        elif found := re.search(r"/repos/owner/project/issues/comments/(\d+)$", self.path):
            comment = self.server.comments[int(found[1]) - 1]
            comment["body"] = body
            self.answer(200, comment)

    do_POST = do_PATCH = write  # noqa: N815


@pytest.fixture
def github() -> Iterator[GitHub]:
    with GitHub() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def comment(github: GitHub, file: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run .ci/comment; gh reaches the API as a proxy, since it takes no other port."""
    known = {
        "GH_HOST": "github.localhost",  # the only one to which gh talks without TLS
        "http_proxy": f"http://127.0.0.1:{github.server_port}",
        "GH_TOKEN": "token",
        "GITHUB_REPOSITORY": "owner/project",
        "PULL_REQUEST": "7",
    }
    command = [str(ROOT / ".ci/comment"), str(file)]
    return subprocess.run(command, env=environment() | known | env, capture_output=True, text=True)


def test_a_comment_is_posted_once_and_then_renewed(github: GitHub, tmp_path: Path) -> None:
    file = tmp_path / "comment.md"
    for text in ("**HEAD is better**", "**HEAD is worse**"):
        file.write_text(f"{text}\n\n{MARK}\n")
        ended = comment(github, file)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
        question, own = github.comments
        assert question["body"] == f"What does {MARK} mean?"
        assert own["body"] == f"{text}\n\n{MARK}\n"


def test_an_error_in_place_of_a_report_gets_the_mark(github: GitHub, tmp_path: Path) -> None:
    file = tmp_path / "comment.md"
    file.write_text("error: expected a git revision\n")
    for _ in range(2):
        assert comment(github, file).returncode == 0
    assert [one["body"] for one in github.comments[1:]] == [f"error: expected a git revision\n{MARK}\n"]


@pytest.mark.parametrize("name", ["GH_TOKEN", "GITHUB_REPOSITORY", "PULL_REQUEST"])
def test_a_missing_token_or_address_is_said_in_one_line(name: str, github: GitHub, tmp_path: Path) -> None:
    (tmp_path / "comment.md").write_text("text")
    ended = comment(github, tmp_path / "comment.md", **{name: ""})
    assert ended.returncode == 1
    assert ended.stderr == f"error: expected {name} in the environment, found none\n"


def test_a_missing_report_is_said_in_one_line(github: GitHub, tmp_path: Path) -> None:
    ended = comment(github, tmp_path / "comment.md")
    assert ended.returncode == 1
    assert ended.stderr == f"error: expected a report in {tmp_path}/comment.md, found none\n"
    assert not [*tmp_path.iterdir()]


def test_a_token_that_only_reads_is_said_clearly(github: GitHub, tmp_path: Path) -> None:
    github.writable = False
    (tmp_path / "comment.md").write_text(MARK)
    ended = comment(github, tmp_path / "comment.md")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("error: cannot post; a pull request from a fork has a token that ")
