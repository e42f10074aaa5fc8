"""The penalty step against plain torch, and what must hold of it whatever the model."""

import copy
import math

import pytest
import torch
from step_helpers import (
    NU,
    SAMPLES,
    batch,
    cut,
    flat,
    plain_loss,
    sample_weights,
    source_weights,
    tiny_model,
    train,
    two_copies,
)

from bilevel.model.torch_copy import TorchCopy
from bilevel.step.f2sa import penalty_step
from bilevel.step.result import NonFiniteLoss


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make", [source_weights, sample_weights])
def test_steps_are_those_of_the_equations(make, order: int):
    """u, w and x after four steps equal plain torch on g and g + nu f, written row by row as the equations stand.

    With order 2, on g - nu f and g + nu f.
    """
    u, w, x = train(4, micro=5, x=make(), order=order)
    models = {"u": tiny_model(), "w": tiny_model()}
    optimizers = {k: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0) for k, m in models.items()}
    reference_x = make()
    generator = torch.Generator().manual_seed(5)
    for step in range(4):
        ids = torch.randperm(SAMPLES, generator=generator)
        c = reference_x.coefficients(ids[:12]).float()
        losses = {}
        for name, nu in (("u", 0.0 if order == 1 else -NU), ("w", NU)):
            losses[name] = torch.stack([plain_loss(models[name], i) for i in ids[:12].tolist()])
            f = torch.stack([plain_loss(models[name], 100 + i) for i in ids[:7].tolist()]).mean()
            optimizers[name].zero_grad()
            ((c * losses[name]).mean() + nu * f).backward()
            optimizers[name].step()
        reference_x.accumulate(ids[:12], (losses["w"] - losses["u"]).detach())
        if step % 2:
            reference_x.step(0.1)
    for mine, name in ((u, "u"), (w, "w")):
        assert (flat(mine.model) - flat(models[name])).norm() / flat(models[name]).norm() < 1e-5
    torch.testing.assert_close(x.x, reference_x.x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make", [source_weights, sample_weights])
def test_micro_batch_size_changes_nothing(make, order: int):
    """Invariant 2: parameters to 1e-5 as a whole, x to 1e-5, from micro-batches of 1, 5 and 12 rows."""
    runs = [train(3, micro, make(), order=order) for micro in (1, 5, 12)]
    for u, w, x in runs[1:]:
        for mine, first in ((u, runs[0][0]), (w, runs[0][1])):
            assert (flat(mine.model) - flat(first.model)).norm() / flat(first.model).norm() < 1e-5
        assert (x.x - runs[0][2].x).norm() / runs[0][2].x.norm() < 1e-5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make", [source_weights, sample_weights])
def test_while_w_equals_u_the_x_gradient_is_exactly_zero(make, order: int):
    """Invariant 1, with dropout on: both copies draw the same masks."""
    _, _, x = train(1, micro=5, x=make(), dropout=0.3, order=order)
    assert torch.equal(x.gradient()[1], torch.zeros_like(x.gradient()[1]))


def test_both_copies_see_validation_under_the_same_masks():
    """With order 2; else the two gradients of f would differ by more than what u and w do."""
    u, w = two_copies(tiny_model(0.3))
    result = penalty_step(u, w, source_weights(), cut([0, 1], 2), cut([100, 101, 102], 2), NU, 1e-3, 0, order=2)
    assert result.val_loss_u == result.val_loss


def test_dropout_is_on_and_differs_between_micro_batches_and_steps():
    u, _ = two_copies(tiny_model(0.3), 0.0, None)
    row = batch([3])
    with torch.no_grad():
        losses = {float(u.losses(row, seed)) for seed in range(4)}
        assert float(u.losses(row, 0)) in losses and len(losses) == 4


@pytest.mark.parametrize("order", [1, 2])
def test_without_validation_x_never_moves(order: int):
    """Invariant 11: nothing is learned from nothing, and w stays u bit for bit."""
    start = source_weights().x.clone()
    u, w, x = train(6, micro=5, x=source_weights(), dropout=0.2, val=False, order=order)
    assert torch.equal(x.x, start) and torch.equal(flat(u.model), flat(w.model))
    assert not torch.equal(flat(u.model), flat(tiny_model()))


def test_with_validation_x_moves():
    x = train(6, micro=5, x=source_weights())[2]
    assert (x.x - source_weights().x).abs().max() > 0.05


def test_results_are_means_over_the_batch_before_the_step():
    u, w = two_copies(tiny_model(), 0.0, None)
    ids = list(range(12))
    expected = torch.stack([plain_loss(u.model, i) for i in ids]).mean().item()
    val = torch.stack([plain_loss(w.model, i) for i in range(100, 107)]).mean().item()
    result = penalty_step(u, w, source_weights(), cut(ids, 5), cut(list(range(100, 107)), 5), NU, 1e-3, 0)
    row = result.row()
    assert row["loss_u"] == pytest.approx(expected, rel=1e-5) and row["gap"] == 0
    assert row["val_loss_w"] == pytest.approx(val, rel=1e-5) and "val_loss_u" not in row

    # u and w differ now, and with order 2 u sees validation as well.
    val_w, val_u = (torch.stack([plain_loss(c.model, i) for i in (100, 101)]).mean().item() for c in (w, u))
    central = penalty_step(u, w, source_weights(), cut(ids, 5), cut([100, 101], 2), NU, 1e-3, 0, order=2)
    row = central.row()
    assert row["val_loss_u"] == pytest.approx(val_u, rel=1e-5) != row["val_loss_w"]
    assert row["val_loss_w"] == pytest.approx(val_w, rel=1e-5)
    without = penalty_step(u, w, source_weights(), cut(ids, 5), cut([100, 101], 2), NU, 1e-3, 0)
    assert central.tokens - without.tokens == batch([100, 101]).input_ids.numel()


def test_gradient_norms_and_clipping():
    reference = tiny_model()
    c = source_weights().coefficients(torch.arange(12)).float()
    (c * torch.stack([plain_loss(reference, i) for i in range(12)])).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()

    u, w = two_copies(tiny_model(), 0.0, clip_grad_norm=0.1)
    result = penalty_step(u, w, source_weights(), cut(list(range(12)), 5), None, NU, 0.0, 0)
    assert result.grad_norm_u == pytest.approx(norm.item(), rel=1e-4)
    u.backward(u.losses(batch([1]), 0).sum(), True)
    norm = u.gradient_norm()
    gradients = [p.grad for p in u.model.parameters()]
    u.step(0.0, norm)
    clipped = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert norm > 0.1 and clipped == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("where", ["train", "validation"])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(where: str, order: int):
    """Invariant 8. The embedding of token 7 is infinite; only one of the two batches holds it."""
    model = tiny_model()
    u, w = two_copies(model, 0.0, None)
    clean = cut([0, 1], 2)
    for micro in clean.micro_batches:
        micro.input_ids[micro.input_ids == 7] = 8
        micro.targets[micro.targets == 7] = 8
    poisoned = copy.deepcopy(clean)
    poisoned.micro_batches[0].input_ids[0, 0] = 7
    for copy_ in (u, w):
        copy_.model.transformer.wte.weight.data[7] = math.inf
        copy_.model.lm_head.weight = torch.nn.Parameter(copy_.model.lm_head.weight.detach().clone())
        copy_.model.lm_head.weight.data[7] = 0
    before = flat(u.model).clone(), flat(w.model).clone()
    x = source_weights()
    batches = (poisoned, clean) if where == "train" else (clean, poisoned)
    with pytest.raises(NonFiniteLoss, match="not finite"):
        penalty_step(u, w, x, *batches, NU, 1e-3, 0, order)
    assert torch.equal(flat(u.model), before[0]) and torch.equal(flat(w.model), before[1])
    assert x.seen.sum() == 0


def test_the_validation_sample_that_only_u_cannot_compute_is_named():
    u, w = two_copies(tiny_model())
    clean, val = cut([0, 1], 2), cut([100, 101], 2)
    for micro in clean.micro_batches + val.micro_batches:
        micro.input_ids[micro.input_ids == 7] = 8
    val.micro_batches[0].input_ids[0, 0] = 7
    u.model.lm_head.weight = torch.nn.Parameter(u.model.lm_head.weight.detach().clone())
    u.model.transformer.wte.weight.data[7] = math.inf
    with pytest.raises(NonFiniteLoss, match="val_loss_u nan") as error:
        penalty_step(u, w, source_weights(), clean, val, NU, 1e-3, 0, order=2)
    named = val.micro_batches[0].sample_ids[0]
    assert {part: ids.tolist() for part, ids in error.value.suspects.items()} == {"train": [], "val": [named]}


def test_weight_decay_pulls_the_model_and_never_x():
    """Invariant 9: with zero gaps x stays, while the decay moves the model."""
    u, w = two_copies(tiny_model(), weight_decay=0.5, clip_grad_norm=None)
    x = source_weights()
    before = x.x.clone()
    plain = TorchCopy(tiny_model())
    for copy_ in (u, w, plain):
        copy_.backward(copy_.losses(batch([1, 2]), 0).sum(), True)
        copy_.step(1e-2, copy_.gradient_norm())
    x.accumulate(torch.arange(6), torch.zeros(6))
    x.step(0.1)
    assert flat(u.model).norm() < flat(plain.model).norm()
    assert torch.equal(x.x, before)


def test_gaps_of_fresh_validation_samples_are_those_before_the_step():
    """In their order, by full logits row by row; they change neither the step nor what the other gaps are."""
    ids, fresh, x = [0, 3, 4, 8, 9], [103, 101, 108], {name: sample_weights() for name in ("with", "without")}
    pairs, found_gaps = {name: two_copies(tiny_model()) for name in x}, {name: [] for name in x}
    for step in range(3):
        for name, (u, w) in pairs.items():
            validation = cut([100, *fresh], 3)
            if name == "with":
                validation.fresh = cut(fresh, 2)
                expected = [(plain_loss(w.model, i) - plain_loss(u.model, i)).item() for i in fresh]
            gaps = penalty_step(u, w, x[name], cut(ids, 2), validation, NU, 1e-2, step).gaps
            found_gaps[name].append(gaps)
        if step:
            expected = torch.tensor(expected).double()
            found = x["with"].records.trusted[-3:] * torch.cat([gaps.double(), expected]).std(correction=0)
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    for ours, others in zip(*pairs.values(), strict=True):
        assert torch.equal(flat(ours.model), flat(others.model))
    assert all(torch.equal(*each) for each in zip(*found_gaps.values(), strict=True))
    assert x["without"].records.first.isnan().all() and not x["with"].records.first[ids].isnan().any()
