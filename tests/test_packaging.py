"""The wheel carries what the commands need: presets and weights."""

import os
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, unpacked where nothing else of the repository lies."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(code, installed, cwd):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


def test_wheel_finds_presets_and_weights_from_any_directory(installed, tmp_path):
    code = (
        "import ddil_env, ddil_agents.commands.run, ddil_env.presets as p;"
        "from ddil_agents.evaluation.metrics.extractors import load_extractor;"
        "print(ddil_env.__file__);"
        "print(p.preset_names('env'), p.preset_names('dagger'));"
        "print(ddil_env.load_expert('digits').sample_shape, ddil_env.load_expert('digits8').sample_shape);"
        "load_extractor('fd_mnist16_clf'); load_extractor('fd_digits8_clf')"
    )
    where, presets, shapes = run(code, installed, tmp_path).splitlines()
    assert where.startswith(str(installed))
    envs = "['coloured_digits', 'ddpm', 'digits', 'digits8', 'dit', 'fork', 'gaussian_mixture', 'kuramoto', 'kuramoto_solver', "
    envs += "'lunar_lander', 'sd15', 'sd3', 'sdxl', 'ssd1b']"
    assert presets == f"{envs} ['demo', 'fork', 'imagine_flash', 'kuramoto', 'lunar_lander', 'paper', 'staged', 'text_to_image']"
    assert shapes == "(1, 16, 16) (1, 8, 8)"


def test_a_learner_prints_nothing_that_a_user_need_not_know(installed, tmp_path):
    code = (
        "from ddil_agents import Dagger, DaggerConfig;"
        "learner = Dagger('digits8', DaggerConfig(num_updates=1, batch_size=4, collect_size=8));"
        "learner.learn(progress=False)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_wheel_prints_the_config_of_a_preset(installed, tmp_path):
    code = "from ddil_agents.dagger import main; main(['--env', 'gaussian_mixture', '--config', 'demo', '--print_config'])"
    assert "num_updates: 400" in run(code, installed, tmp_path)
