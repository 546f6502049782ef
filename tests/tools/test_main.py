"""The visionmix command, and the tools as scripts of a clone."""

import subprocess
import sys
from pathlib import Path

import pytest

from visionmix.tools import main

ROOT = Path(__file__).parents[2]


def test_help_lists_the_commands(capsys):
    assert main.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "validate", "predict", "info"))


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_says_how_it_is_called(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main([command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: visionmix {command} ")


def test_an_unknown_command_names_the_nearest(capsys):
    assert main.main(["trian"]) == 2
    assert "no command 'trian' (did you mean 'train'?)" in capsys.readouterr().err


def test_commands_are_dispatched(tmp_path, capsys):
    assert main.main(["train", "imagenet/vig_s.yaml", "--data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main.main(["predict", str(tmp_path / "no.jpg"), "--model", "vig_s", "--pretrained"]) == 2
    assert "no.jpg does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("script", [pytest.param("train.py", marks=pytest.mark.long), "main.py"])
def test_a_script_runs_from_any_folder(tmp_path, script):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / script), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize("script", ["demo.sh", "test.sh", "venv.sh"])
def test_shell_scripts_are_sound(script):
    assert subprocess.run(["sh", "-n", str(ROOT / "tools" / script)]).returncode == 0


def test_demo_says_how_to_get_venv(tmp_path):
    """In a copy of the scripts with a Python that lacks venv, the command that brings it is printed."""
    (tmp_path / "tools").mkdir()
    for name in ("demo.sh", "venv.sh"):
        (tmp_path / "tools" / name).write_text((ROOT / "tools" / name).read_text())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", str(tmp_path / "tools" / "demo.sh")],
        env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "-m venv is missing" in done.stderr
    assert "install" in done.stderr
    assert not (tmp_path / ".venv").exists()
