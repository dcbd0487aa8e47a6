"""params.yaml is checked before anything happens, and all mistakes are reported together, in words."""

import re
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml
from support.project import ROOT, Project

from stages.params import read_params
from stages.stage import StageError

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
MIRROR = r"https?://[^\s,\]]+"  # the first one
CLASSES = r"classes:(?: \[.*\]|(?:\n +- .*)+)"  # or as `dvc exp run -S` writes a list


def changed(pattern: str, new: str) -> str:
    """params.yaml with other text in the first place that matches a pattern."""
    text, count = re.subn(pattern, lambda _: new, TEXT, count=1, flags=re.MULTILINE)
    assert count, f"params.yaml has no {pattern}"
    return text


def error_of(text: str, folder: Path) -> str:
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StageError) as raised:
        read_params(folder / "params.yaml")
    return str(raised.value)


def test_the_project_s_own_params_are_valid() -> None:
    params, values = read_params(ROOT / "params.yaml"), load_yaml(ROOT / "params.yaml")
    assert params.model_dump() == values


@pytest.mark.parametrize(
    ("pattern", "new", "expected"),
    [
        ("  lr: .*", "  lrr: 0.01", ["train.lr: expected a value", "train.lrr: unknown key; did you mean train.lr?"]),
        ("  lr: .*", "  lr: 0", ["train.lr: expected greater than 0, found 0"]),
        ("  lr: .*", "  lr: -1.5", ["train.lr: expected greater than 0, found -1.5"]),
        ("  lr: .*", "  lr: '0.01'", ["train.lr: expected a valid number, found '0.01'"]),
        ("  lr: .*", "  lr: .nan", ["train.lr: expected a finite number, found nan"]),
        ("  lr: .*", "  lr:", ["train.lr: expected a valid number, found None"]),
        ("  lr: .*", "  lr: true", ["train.lr: expected a valid number, found True"]),
        ("  epochs: .*", "  epochs: 2.5", ["train.epochs: expected a valid integer, found 2.5"]),
        ("  epochs: .*", "  epochs: 0", ["train.epochs: expected greater than or equal to 1, found 0"]),
        ("  seed: .*", "  seed: -1", ["train.seed: expected greater than or equal to 0, found -1"]),
        ("activation: .*", "activation: tanh", ["train.activation: expected 'sigmoid' or 'relu', found 'tanh'"]),
        ("standardize: .*", "standardize: 1", ["train.standardize: expected a valid boolean, found 1"]),
        ("bits: .*", "bits: fast", ["train.bits: expected 'portable' or 'native', found 'fast'"]),
        ("name: ", "name: ../", ["fetch.files.train_images.name: expected"]),
        (MIRROR, "ftp://example.org/", ["fetch.mirrors.0: expected an http or https address without user and"]),
        ("  lr: .*", "  lr: 101", ["train.lr: expected less than or equal to 100, found 101"]),
        ("  epochs: .*", "  epochs: 1000001", ["train.epochs: expected less than or equal to 1000000, found 1000001"]),
        ("  threads: .*", "  threads: 1025", ["train.threads: expected less than or equal to 1024, found 1025"]),
        (
            "bytes: .*",
            f"bytes: {2**62}",
            [f"train_images.bytes: expected less than or equal to {2**30}, found {2**62}"],
        ),
        (
            CLASSES,
            "classes: [Shirt, Dress, Dress]",
            ["fetch.classes: expected names that differ from each other and from class, index, label"],
        ),
        (
            CLASSES,
            "classes: [Shirt, label]",
            ["fetch.classes: expected names that differ from each other and from class, index, label"],
        ),
        ("  seed: .*", f"  seed: {'9' * 5000}", ["has a value that cannot be read (ValueError: Exceeds the limit"]),
        (
            "seed: .*",
            f"seed: 0x{'f' * 5000}",
            ["train.seed: expected less than 4294967296, found a number with thousands"],
        ),
        ("train:\n", "train: &a\n", ["expected anchors (&) on single values only, found a on more"]),
        ("evaluate:\n", "evaluate: none\nother:\n", ["evaluate: expected a mapping", "other: unknown key"]),
    ],
)
def test_a_mistake_is_reported_with_its_key_and_what_was_found(
    pattern: str, new: str, expected: list[str], tmp_path: Path
) -> None:
    message = error_of(changed(pattern, new), tmp_path)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@example.org/data/",
        "https://secret@example.org/",
        "https://user:se/cret@example.org/",
        "https://example.org/data/?token=secret",
        "https://example.org/?secret",
        "https://example.org/data/#secret",
        "https://example.org:secret/",
        "https:///secret",
        "https://example.org/a b",
    ],
)
def test_an_address_that_may_contain_a_secret_is_refused_without_showing_it(url: str, tmp_path: Path) -> None:
    message = error_of(changed(MIRROR, f"'{url}'"), tmp_path)
    assert "fetch.mirrors.0: expected an http or https address without user and password" in message
    if any(mark in url for mark in "@?#"):
        assert "***" in message
        assert "secret" not in message


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/",
        "https://example.org",
        "http://[::1]:80/a/",
        "https://example.org/%7Euser/@scope/a=b;c/",
    ],
)
def test_an_address_without_secrets_is_accepted(url: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(changed(MIRROR, f"'{url}'"))
    assert read_params(path).fetch.mirrors[0] == url


def test_a_value_may_have_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(re.sub("threads: [0-9]+", "threads: *threads", changed("threads: .*", "threads: &threads 1")))
    assert read_params(path).evaluate.threads == 1


def test_the_first_of_many_mistakes_are_listed(tmp_path: Path) -> None:
    message = error_of(TEXT + "".join(f"x{number}: 1\n" for number in range(500)), tmp_path)
    assert "has 500 mistake(s)" in message
    assert message.endswith("\n  x19: unknown key\n  and 480 more")


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    text = re.sub("  epochs: .*", "  epochs: many", changed("  lr: .*", "  lr: 0"))
    message = error_of(re.sub("  threads: .*", "  threads: 0", text), tmp_path)
    assert "4 mistake" in message
    for key in ("train.lr", "train.epochs", "train.threads", "evaluate.threads"):
        assert f"\n  {key}: " in message


@pytest.mark.parametrize("text", ["", "just words", "- a\n- list", "train: [1, 2"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    assert "params.yaml" in error_of(text, tmp_path)


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"cannot read .*params\.yaml"):
        read_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StageError, match=r"cannot read .*params\.yaml"):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("number", ["1e-2", "1E-2", "0.01", "1.0e-2", ".01", "+1e-2", "1", "0x1", "010", "1_0"])
def test_a_number_is_read_as_dvc_reads_it(number: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(changed("  lr: .*", f"  lr: {number}"), encoding="utf-8")
    by_dvc: Any = load_yaml(path)["train"]["lr"]
    assert read_params(path).train.lr == by_dvc
    assert isinstance(by_dvc, int | float)


def test_a_mistake_changes_nothing(project: Project) -> None:
    outs = {path: (project.folder / path).read_bytes() for path in project.md5s()}
    lock = (project.folder / "dvc.lock").read_bytes()
    project.set("train.lr", -1)
    result = project.dvc("repro", check=False)
    assert result.returncode != 0
    assert "train.lr: expected greater than 0, found -1" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path: (project.folder / path).read_bytes() for path in outs} == outs
    assert (project.folder / "dvc.lock").read_bytes() == lock
    project.set("train.lr", 0.01)
    assert project.repro() == []
