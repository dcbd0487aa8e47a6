"""params.yaml is checked whole before anything happens, and mistakes are told in words."""

from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml
from support.project import ROOT, Project

from stages.params import read_params
from stages.stage import StageError

TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")


def error_of(text: str, folder: Path) -> str:
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(StageError) as raised:
        read_params(folder / "params.yaml")
    return str(raised.value)


def test_the_project_s_own_params_are_valid() -> None:
    params = read_params(ROOT / "params.yaml")
    assert (params.train.lr, params.train.batch_size, params.train.epochs) == (0.01, 64, 5)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  lr: 0.01", "  lrr: 0.01", ["train.lr: expected a value", "train.lrr: unknown key; did you mean train.lr?"]),
        ("  lr: 0.01", "  lr: 0", ["train.lr: expected greater than 0, found 0"]),
        ("  lr: 0.01", "  lr: -1.5", ["train.lr: expected greater than 0, found -1.5"]),
        ("  lr: 0.01", "  lr: '0.01'", ["train.lr: expected a valid number, found '0.01'"]),
        ("  lr: 0.01", "  lr: .nan", ["train.lr: expected a finite number, found nan"]),
        ("  lr: 0.01", "  lr:", ["train.lr: expected a valid number, found None"]),
        ("  lr: 0.01", "  lr: true", ["train.lr: expected a valid number, found True"]),
        ("  epochs: 5", "  epochs: 2.5", ["train.epochs: expected a valid integer, found 2.5"]),
        ("  epochs: 5", "  epochs: 0", ["train.epochs: expected greater than or equal to 1, found 0"]),
        ("  seed: 0", "  seed: -1", ["train.seed: expected greater than or equal to 0, found -1"]),
        ("activation: sigmoid", "activation: tanh", ["train.activation: expected 'sigmoid' or 'relu', found 'tanh'"]),
        ("standardize: true", "standardize: 1", ["train.standardize: expected a valid boolean, found 1"]),
        ("bits: portable", "bits: fast", ["train.bits: expected 'portable' or 'native', found 'fast'"]),
        ("name: train-images", "name: ../train-images", ["fetch.files.train_images.name: expected"]),
        ("http://fashion", "ftp://fashion", ["fetch.mirrors.0: expected an http or https address without user and"]),
        ("  lr: 0.01", "  lr: 101", ["train.lr: expected less than or equal to 100, found 101"]),
        ("  epochs: 5", "  epochs: 1000001", ["train.epochs: expected less than or equal to 1000000, found 1000001"]),
        ("  threads: 2", "  threads: 1025", ["train.threads: expected less than or equal to 1024, found 1025"]),
        (
            "bytes: 10008",
            f"bytes: {2**62}",
            [f"test_labels.bytes: expected less than or equal to {2**30}, found {2**62}"],
        ),
        (
            "Trouser",
            "Dress",
            ["fetch.classes: expected names that differ from each other and from class, index, label"],
        ),
        (
            "Trouser",
            "label",
            ["fetch.classes: expected names that differ from each other and from class, index, label"],
        ),
        ("seed: 0", f"seed: {'9' * 5000}", ["has a value that cannot be read (ValueError: Exceeds the limit"]),
        (
            "seed: 0",
            f"seed: 0x{'f' * 5000}",
            ["train.seed: expected less than 4294967296, found a number with thousands"],
        ),
        ("train:\n", "train: &a\n", ["expected anchors (&) on single values only, found a on more"]),
        ("evaluate:\n", "evaluate: none\nother:\n", ["evaluate: expected a mapping", "other: unknown key"]),
    ],
)
def test_a_mistake_is_told_with_its_key_and_what_was_found(
    old: str, new: str, expected: list[str], tmp_path: Path
) -> None:
    assert old in TEXT
    message = error_of(TEXT.replace(old, new, 1), tmp_path)
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
def test_an_address_that_may_hold_a_secret_is_refused_and_the_secret_is_not_shown(url: str, tmp_path: Path) -> None:
    first = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    message = error_of(TEXT.replace(first, f"'{url}'", 1), tmp_path)
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
    path.write_text(TEXT.replace("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", f"'{url}'"))
    assert read_params(path).fetch.mirrors[0] == url


def test_one_value_may_be_named_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT.replace("threads: 2", "threads: &threads 1", 1).replace("threads: 2", "threads: *threads"))
    assert read_params(path).evaluate.threads == 1


def test_of_many_mistakes_the_first_are_listed(tmp_path: Path) -> None:
    message = error_of(TEXT + "".join(f"x{number}: 1\n" for number in range(500)), tmp_path)
    assert "has 500 mistake(s)" in message
    assert message.endswith("\n  x19: unknown key\n  and 480 more")


def test_every_mistake_is_listed(tmp_path: Path) -> None:
    text = TEXT.replace("lr: 0.01", "lr: 0").replace("epochs: 5", "epochs: many").replace("threads: 2", "threads: 0")
    message = error_of(text, tmp_path)
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
    path.write_text(TEXT.replace("  lr: 0.01", f"  lr: {number}"), encoding="utf-8")
    by_dvc: Any = load_yaml(path)["train"]["lr"]
    assert read_params(path).train.lr == by_dvc
    assert isinstance(by_dvc, int | float)


def test_a_mistake_leaves_everything_as_it_was(project: Project) -> None:
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
