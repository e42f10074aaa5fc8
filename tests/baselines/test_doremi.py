"""bilevel/baselines/doremi.py: weights of sources by a direct loop, and on a task where it is known what is left to
learn."""

import copy
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from run_helpers import make_data, settings, train
from score_helpers import EOS, SHAPE, make_samples, model
from torch.nn import functional

import train_bilevel
from bilevel.baselines.doremi import RATE, SMOOTHING, DomainWeights, doremi_score
from bilevel.baselines.scores import Scoring, weights_of
from bilevel.data.samples import Samples
from bilevel.data.stream import BatchStream
from bilevel.data.tokenise import IGNORE
from bilevel.model.torch_copy import TorchCopy
from bilevel.settings.fields import Settings
from bilevel.step.schedule import schedule

GIVEN = {"train_data": ["-"], "val_data": [], "global_batch_size": 16, "micro_batch_tokens": 40, "lr_y": 1e-2}
GIVEN |= {"method": "doremi", "model_config": {"model_type": "gpt2"} | SHAPE}


def make_scoring(sizes: dict[str, int], epochs: float) -> Scoring:
    """Sources of so many samples, each of one kind (tests/score_helpers.py)."""
    parts = [make_samples(size, kind, number) for number, (kind, size) in enumerate(sizes.items())]
    samples = Samples([Path(f"{kind}.json") for kind in sizes], [part.table for part in parts], [0] * len(parts))
    return Scoring(Settings(**GIVEN, score_epochs=epochs), samples, None,
                   lambda: (TorchCopy(model().train()), None), EOS)  # fmt: skip


def losses(y: torch.nn.Module, rows: list, numbers: list[int]) -> torch.Tensor:
    """Mean cross-entropies of the supervised tokens of rows, from full logits."""
    found = []
    for ids, labels in (rows[i] for i in numbers):
        logits = y(input_ids=torch.tensor([ids])).logits[0]
        found.append(functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=IGNORE))
    return torch.stack(found)


def test_weights_are_those_of_a_direct_loop():
    s = make_scoring({"random": 20, "empty": 28}, 2.0)
    rows = [(row["input_ids"], row["labels"]) for row in s.train.tokens]
    sizes, p, total = [20, 28], [0.5, 0.5], [0.0, 0.0]
    reference = None
    for proxy in (False, True):
        y, stream = copy.deepcopy(model()).train(), BatchStream(48, 16, 0)
        optimizer = torch.optim.AdamW(y.parameters(), weight_decay=0.0)
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 1e-2 * schedule(step, 6, s.settings.warmup_ratio, "cosine")
            numbers = next(stream).tolist()
            found = losses(y, rows, numbers)
            factors = [p[i >= 20] * 48 / sizes[i >= 20] if proxy else 1.0 for i in numbers]
            (torch.tensor(factors) * found).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if proxy:
                apart = {
                    i: max(0.0, loss - float(reference[i])) for i, loss in zip(numbers, found.tolist(), strict=True)
                }
                grown = []
                for source in (0, 1):
                    excess = [each for i, each in apart.items() if (i >= 20) == source]
                    grown.append(p[source] * math.exp(RATE * sum(excess) / max(1, len(excess))))
                p = [(1 - SMOOTHING) * each / sum(grown) + SMOOTHING / 2 for each in grown]
                total = [a + b for a, b in zip(total, p, strict=True)]
        if not proxy:
            with torch.no_grad():
                reference = losses(y.eval(), rows, list(range(48)))
    found = doremi_score(s)
    expected = torch.tensor([total[i >= 20] / 6 * 48 / sizes[i >= 20] for i in range(48)])
    torch.testing.assert_close(found.float(), expected, rtol=2e-4, atol=2e-5)
    assert abs(float(found[0]) - 1) > 0.1 and float(found.mean()) == pytest.approx(1)
    shares = weights_of(found, s.settings, s.train).p
    assert shares.tolist() == pytest.approx([each / 6 for each in total], rel=2e-4)


def test_what_can_be_learned_gets_the_weight_and_noise_does_not():
    """The reference learns what digits ask for; random responses it cannot learn, so there is no excess."""
    weights = weights_of(doremi_score(s := make_scoring({"clean": 64, "random": 64}, 4.0)), s.settings, s.train)
    assert weights.p[0] > 0.8


def test_a_source_that_is_not_in_the_batch_has_no_excess():
    weights = DomainWeights(torch.tensor([0, 0, 1, 2]), 3)
    weights.update(torch.tensor([0, 1]), torch.tensor([-5.0, 1.0]))
    grown = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(weights.mean, (1 - SMOOTHING) * grown + SMOOTHING / 3)
    assert weights.coefficients(torch.arange(4)).mean() == pytest.approx(1)


@pytest.mark.usefixtures("no_old_log")
def test_a_run_ends_in_shares_and_one_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = make_data(tmp_path / "few", 16)
    train(data, tmp_path / "run", method="doremi", val_data=[], max_steps=None, epochs=1.0)
    weights = pd.read_csv(tmp_path / "run" / "weights.csv")
    assert weights["weight"].sum() == pytest.approx(1) and (weights["weight"] > 0).all() and len(weights) == 2
    train(data, tmp_path / "fixed", method="fixed", x_init=str(tmp_path / "run"), max_steps=2)
    capsys.readouterr()
    one = settings(
        data, tmp_path / "one", method="doremi", weights="sample", train_data=[str(data / "train_clean.json")]
    )
    assert train_bilevel.main(one) == 2
    assert "method=doremi weighs sources against each other" in capsys.readouterr().err
