"""bilevel/step/align.py: alignments of gradients, and the weights learned from them."""

import copy

import pytest
import torch
from score_helpers import make_samples
from score_helpers import model as learner
from step_helpers import batch, cut, flat, plain_loss, sample_weights, source_weights, tiny_model

from bilevel.data.stream import BatchStream
from bilevel.model.torch_copy import TorchCopy
from bilevel.step.align import align_step, alignments
from bilevel.weights.learned import SourceWeights

TRAIN, VAL = list(range(12)), list(range(100, 107))


def flat_gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def expected_alignments(model: torch.nn.Module) -> torch.Tensor:
    """Inner products of single gradients by autograd, in float64."""
    model = copy.deepcopy(model).double()
    wanted = flat_gradient(torch.stack([plain_loss(model, i) for i in VAL]).mean(), model)
    return torch.stack([flat_gradient(plain_loss(model, i), model) @ wanted for i in TRAIN])


def trained_model() -> torch.nn.Module:
    """Where gradients of different samples differ."""
    w = TorchCopy(tiny_model())
    for _ in range(20):
        w.backward(w.losses(batch([*TRAIN, *VAL]), 0).mean(), True)
        w.step(3e-3, 1.0)
    return w.model


def test_alignments_are_inner_products_of_gradients():
    w = TorchCopy(trained_model())
    before = flat(w.model).clone()
    validation = cut(VAL, 3)
    for micro in validation.micro_batches:
        w.backward(w.losses(micro, 0).sum() / len(VAL), True)
    found, expected = alignments(w, cut(TRAIN, 5), seed=0), expected_alignments(w.model)
    assert expected.std() > 0.1 * expected.abs().mean()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-3 * float(expected.abs().max()))
    assert torch.equal(flat(w.model), before)


@pytest.mark.parametrize("make", [source_weights, sample_weights])
def test_a_step_moves_y_down_g_and_x_along_the_alignments(make):
    model = trained_model()
    w, x, reference = TorchCopy(copy.deepcopy(model)), make(), make()
    result = align_step(w, x, cut(TRAIN, 5), cut(VAL, 3), lr_y=1e-3, seed=0)

    reference.accumulate(torch.tensor(TRAIN), -expected_alignments(model))
    for one in (x, reference):
        one.step(0.1)
    torch.testing.assert_close(x.x, reference.x, rtol=1e-2, atol=1e-3)

    plain = TorchCopy(copy.deepcopy(model))
    losses = torch.stack([plain_loss(plain.model, i) for i in TRAIN])
    plain.backward((make().coefficients(torch.tensor(TRAIN)).float() * losses).mean(), True)
    plain.step(1e-3, 1.0)
    assert (flat(w.model) - flat(plain.model)).norm() / flat(plain.model).norm() < 1e-5
    row = result.row()
    assert row["loss_w"] == pytest.approx(losses.mean().item(), rel=1e-5) and "gap" not in row
    assert row["val_loss_w"] == pytest.approx(torch.stack([plain_loss(model, i) for i in VAL]).mean().item(), rel=1e-5)


def test_the_noisy_source_s_weight_falls():
    """Where its answers are random tokens, and validation's can be learned."""
    train, val = make_samples(64, "random", 0), make_samples(32, "clean", 1)
    w, batches = TorchCopy(learner()), BatchStream(64, 16, 0)
    x = SourceWeights(torch.from_numpy(train.is_noisy).long(), torch.tensor([0.5, 0.5]), 1.0, "adam")
    for step in range(20):
        validation = val.batch(torch.arange(16) + 16 * (step % 2), 200)
        align_step(w, x, train.batch(next(batches), 200), validation, lr_y=1e-2, seed=step)
        x.step(0.2)
    assert x.p[1] < 0.1
