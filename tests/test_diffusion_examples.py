"""The diffusion examples run in their short form, and an interrupted training ends where a whole one does."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcifar.data import SAMPLE, cifar10

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("name", ["diffusion_train", "diffusion_classifier"])
def test_training_examples_run(name, tmp_path):
    weights = tmp_path / "weights.pt"
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--steps", "20", "--output", weights]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test" in done.stdout
    assert weights.stat().st_size > 100_000


@pytest.mark.parametrize(
    ("name", "words"), [("diffusion_cifar10", "searched"), ("tree_sampling", "best of n")], ids=["solvers", "tree"]
)
def test_sampling_examples_run(name, words, tmp_path):
    plot = EXAMPLES / "output" / f"{name}.png"
    plot.unlink(missing_ok=True)
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert words in done.stdout
    assert plot.stat().st_size > 10_000


def test_solvers_of_the_example_call_the_model_as_often_as_is_said(example):
    module = example("diffusion_cifar10")
    for calls in module.CALLS:
        for name in module.SOLVERS:
            spent = int(module.table_of(name, calls).evaluates.sum())
            assert calls - (name == "Heun") <= spent <= calls, (name, calls)
        found = module.FoundSchedule.load(module.schedule_file(calls))
        assert int(found.table(module.SCHEDULE, "v").evaluates.sum()) == calls


def test_training_that_was_stopped_ends_at_the_same_bits(example, tmp_path):
    train, unet = example("diffusion_train"), example("diffusion_unet")
    images, labels = cifar10(SAMPLE, "test")

    def fresh():
        torch.manual_seed(0)
        return train.Training(unet.UNet(16, 32), steps=4)

    whole, first, second = fresh(), fresh(), fresh()
    for _ in range(4):
        whole.step(images, labels, 8)
    for _ in range(2):
        first.step(images, labels, 8)
    first.test(images[:32], labels[:32])  # must leave the weights and the random stream as they were
    first.save(tmp_path / "checkpoint.pt")
    second.resume(tmp_path / "checkpoint.pt")
    assert second.done == 2
    for _ in range(2):
        second.step(images, labels, 8)
    for name, tensor in whole.mean.items():
        assert torch.equal(tensor, second.mean[name]), name
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_muon_steps_along_a_nearly_orthogonal_matrix(example):
    muon = example("diffusion_train").Muon
    for shape in ((8, 32), (32, 8), (8, 4, 3, 3)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        muon([weight], lr=1.0).step()
        rows = weight.shape[0]
        update = -weight.detach().flatten(1) / max(1, rows / weight[0].numel()) ** 0.5
        values = torch.linalg.svdvals(update)
        assert 0.5 < values.min() <= values.max() < 1.3
        # It turns the gradient's singular directions into themselves.
        assert (update * weight.grad.flatten(1)).sum() > 0.8 * torch.linalg.svdvals(weight.grad.flatten(1)).sum()


def test_trained_weights_predict_v(example):
    """Better than the prediction that knows only how images vary, at every level of noise but the highest."""
    train, unet = example("diffusion_train"), example("diffusion_unet")
    assert unet.WEIGHTS.stat().st_size < 1.6e6
    model = unet.load()
    images, labels = cifar10(SAMPLE, "test")
    x0 = images[:64].float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    for step in (50, 150, 300, 500):
        t = torch.full((64,), step)
        noisy, v = train.noised(x0, t, noise)
        signal = unet.SIGNAL[step].item()
        # The best scalar multiple of the noisy image, for v and for this batch.
        best = (v - noisy * (v * noisy).mean() / noisy.square().mean()).square().mean()
        assert 0 < signal < 1
        with torch.inference_mode():
            assert (model(noisy, t, labels[:64]) - v).square().mean() < 0.6 * best, step
