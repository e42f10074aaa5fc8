"""bilevel/baselines/influence.py against gradients by autograd, one sample at a time."""

import pytest
import torch
from benchmarks.samples import random_samples
from families import GPT2, LENGTHS, LLAMA
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from bilevel.baselines import influence
from bilevel.baselines.influence import LastBlock, cosines, random_projection
from bilevel.data.samples import Samples
from bilevel.data.tokenise import IGNORE
from bilevel.model.cpu_kernels import speed_up
from bilevel.model.lisa import find_blocks
from bilevel.model.torch_copy import TorchCopy


def warm_copy(shape: dict, samples: Samples) -> TorchCopy:
    """After five steps, so that Adam has moments."""
    torch.manual_seed(0)
    model = speed_up(AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)))
    w = TorchCopy(model.eval())
    for _ in range(5):
        for micro in samples.in_order(1000):
            w.backward(w.losses(micro, 0).mean(), True)
        w.step(1e-2, 1.0)
    return w


def matrices(w: TorchCopy) -> list[torch.nn.Parameter]:
    return [p for p in find_blocks(w.model)[-1].parameters() if p.ndim == 2]


def plain_gradient(w: TorchCopy, samples: Samples, number: int) -> list[torch.Tensor]:
    row = samples.tokens[number]
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    logits = w.model(input_ids=ids).logits[0]
    loss = functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE)
    return list(torch.autograd.grad(loss, matrices(w)))


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("shape", [GPT2, LLAMA])
def test_cosines_are_those_of_single_gradients_and_adam_s_steps(shape: dict, monkeypatch: pytest.MonkeyPatch):
    """Without projection; AdamW itself says what step it would make, from weights of zero and with a step size of 1."""
    train, val = random_samples(["t"], LENGTHS, 50, 0), random_samples(["a", "b"], LENGTHS[:3], 50, 1)
    w = warm_copy(shape, train)
    files = [torch.stack([flat(plain_gradient(w, val, i)) for i in part]).mean(0) for part in ([0, 1, 2], [3, 4, 5])]
    expected = torch.zeros(len(train), 2)
    for i in range(len(train)):
        twins = [torch.nn.Parameter(torch.zeros_like(p)) for p in matrices(w)]
        optimizer = torch.optim.AdamW(twins, lr=1.0, weight_decay=0.0)
        for twin, p, gradient in zip(twins, matrices(w), plain_gradient(w, train, i), strict=True):
            optimizer.state[twin] = {name: value.clone() for name, value in w.optimizer.state[p].items()}
            twin.grad = gradient
        optimizer.step()
        expected[i] = torch.stack([functional.cosine_similarity(-flat(twins), file, 0) for file in files])
    assert expected.std() > 0.01
    monkeypatch.setattr(influence, "AT_ONCE", 2 * LastBlock(w).size)  # two rows at a time
    done = []
    found = cosines(LastBlock(w), train, val, lambda rows: rows, 20, lambda: done.append(1))
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-5)
    assert len(done) == len(list(train.in_order(20))) > 1
    assert all(p.grad is None for p in w.model.parameters())


def test_the_projection_keeps_inner_products():
    """Up to a few times 1/sqrt(PROJECTED) of the lengths, and the same for the same seed."""
    size = 5 * influence.PROJECTED
    project, operations = random_projection(size, seed=3)
    a = torch.randn(20, size, generator=torch.Generator().manual_seed(0))
    a[1:] += a[0]
    before, after = a @ a.T, project(a) @ project(a).T
    lengths = before.diag().sqrt()
    errors = (after - before) / (lengths[:, None] * lengths)
    assert errors.square().mean().sqrt() < 2 / influence.PROJECTED**0.5
    assert errors.mean().abs() < 2 / influence.PROJECTED**0.5
    assert operations == pytest.approx(2 * influence.PROJECTED * size**0.5, rel=0.05)
    assert torch.equal(random_projection(size, seed=3)[0](a), project(a))
    assert not torch.equal(random_projection(size, seed=4)[0](a), project(a))
