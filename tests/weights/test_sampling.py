"""sampling=weighted: its expectations, over all outcomes of the coins, are what uniform sampling computes."""

import dataclasses
import itertools
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from launch_helpers import end, start
from run_helpers import make_data, settings, train
from step_helpers import NU, cut, plain_loss, sample_weights, source_weights, tiny_model
from tokenizer_kinds import tokenizer_of

import train_bilevel
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser
from bilevel.model.torch_copy import TorchCopy
from bilevel.settings.fields import Settings
from bilevel.step.f2sa import penalty_step
from bilevel.step.gradient import add_gradient
from bilevel.weights.learned import SampleWeights, SourceWeights
from bilevel.weights.sampling import chances, choose

X = SourceWeights | SampleWeights
IDS = torch.tensor([3, 7, 8, 12, 20])
FLOOR = 0.2
RUN = Settings(
    train_data=["-"], val_data=["-"], model_name_or_path="-", sampling="weighted", sampling_floor=FLOOR, seed=3
)


def uneven_sources() -> SourceWeights:
    x = source_weights()
    x.x = torch.tensor([0.01, 0.24, 0.75], dtype=torch.float64).log()  # c 0.03, 0.72 and 2.25
    return x


def uneven_samples() -> SampleWeights:
    x = sample_weights()
    x.x[IDS] = torch.tensor([-9.0, -0.7, -1.5, 5.0, 0.2])
    x.refresh()
    return x


def outcomes(x: X) -> list[tuple[float, torch.Tensor, torch.Tensor]]:
    """Probability, samples and counts of every outcome of the coins for IDS."""
    pi = chances(x.coefficients(IDS), FLOOR)
    assert pi.min() == FLOOR and (pi == 1).any() and ((pi > FLOOR) & (pi < 1)).any()
    found = []
    for coins in itertools.product((True, False), repeat=len(IDS)):
        computed = torch.tensor(coins)
        if probability := math.prod(torch.where(computed, pi, 1 - pi).tolist()):
            found.append((probability, IDS[computed], 1 / pi[computed]))
    assert sum(probability for probability, *_ in found) == pytest.approx(1)
    return found


@pytest.mark.parametrize("make", [uneven_sources, uneven_samples])
def test_the_expected_gradient_of_a_batch_is_that_of_the_whole_batch(make):
    x, model = make(), tiny_model()
    c = x.coefficients(IDS).float()
    loss = torch.stack([plain_loss(model, i) for i in IDS.tolist()])
    expected = torch.autograd.grad((c * loss).mean(), list(model.parameters()))
    copy, found = TorchCopy(tiny_model()), [torch.zeros_like(p) for p in model.parameters()]
    for probability, ids, counts in outcomes(x):
        if len(ids):
            batch = cut(ids.tolist(), 2, counts, len(IDS))
            add_gradient(copy, batch, x.coefficients, 0, last=True)
            for total, p in zip(found, copy.model.parameters(), strict=True):
                total += probability * p.grad
            copy.discard()
    for total, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-7)


def test_the_expected_sums_of_gaps_are_those_of_the_whole_batch():
    gap = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = uneven_sources()
    whole.accumulate(IDS, gap[IDS])
    sums, seen = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for probability, ids, counts in outcomes(whole):
        x = uneven_sources()
        x.accumulate(ids, gap[ids], counts)
        sums += probability * x.gap_sum
        seen += probability * x.seen
    torch.testing.assert_close(sums, whole.gap_sum)
    torch.testing.assert_close(seen, whole.seen)


@pytest.mark.parametrize("make", [uneven_sources, uneven_samples])
def test_a_sample_that_counts_twice_is_two(make):
    gap = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once, twice = make(), make()
    once.accumulate(IDS, gap[IDS], torch.tensor([2.0, 1, 1, 1, 3], dtype=torch.float64))
    for ids in (IDS, IDS[:1], IDS[-1:], IDS[-1:]):
        twice.accumulate(ids, gap[ids])
    for slope in (False, True):
        for mine, reference in zip(once.gradient(slope), twice.gradient(slope), strict=True):
            torch.testing.assert_close(mine, reference)
    twice.load_state_dict(once.state_dict())
    torch.testing.assert_close(twice.gradient()[1], once.gradient()[1])


@pytest.mark.parametrize("make", [uneven_sources, uneven_samples])
def test_each_sample_is_computed_as_often_as_its_chance_says(make):
    x, steps, seen = make(), 4000, torch.zeros(24)
    for step in range(steps):
        ids, counts = choose(IDS, x, RUN, step)
        seen[ids] += 1
        torch.testing.assert_close(counts, 1 / chances(x.coefficients(ids), FLOOR))
    pi = chances(x.coefficients(IDS), FLOOR)
    assert ((seen[IDS] / steps - pi).abs() <= 4 * (pi * (1 - pi) / steps).sqrt()).all()
    again, _ = choose(IDS, x, RUN, 7)
    assert torch.equal(again, choose(IDS, x, RUN, 7)[0])


def test_where_all_count_alike_nothing_is_left_out():
    for x in (SourceWeights(torch.arange(24) % 3, torch.full((3,), 1 / 3), 1.0, "adam"), sample_weights()):
        ids, counts = choose(IDS, x, RUN, 0)
        assert torch.equal(ids, IDS) and (counts == 1).all()
    ids, counts = choose(IDS, uneven_sources(), dataclasses.replace(RUN, sampling="uniform"), 0)
    assert torch.equal(ids, IDS) and (counts == 1).all()


def test_a_step_of_which_nothing_is_computed_descends_validation_alone(write):
    texts = [{"instruction": "count", "output": "one two three"}] * 3
    samples = load_samples([file_source(write("a.json", texts))], Tokeniser(tokenizer_of("gpt2"), 60, "response"))
    nothing = dataclasses.replace(samples.batch(torch.zeros(0, dtype=torch.int64), 4096), drawn=2)
    model = tiny_model()
    model.resize_token_embeddings(len(tokenizer_of("gpt2")))
    u, w, reference = (TorchCopy(m) for m in (model, *(tiny_model() for _ in "wr")))
    for copy in (w, reference):
        copy.model.resize_token_embeddings(len(tokenizer_of("gpt2")))
        copy.model.load_state_dict(model.state_dict())
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = uneven_samples()
    start, trusted = x.x.clone(), samples.batch(torch.arange(3), 4096)
    result = penalty_step(u, w, x, nothing, trusted, NU, 1e-3, 0)
    assert math.isnan(result.loss_w) and not len(result.gaps) and result.grad_norm_u == 0
    x.step(0.1)
    assert torch.equal(x.x, start)
    assert all(torch.equal(p, before[name]) for name, p in u.model.named_parameters())
    (NU * reference.losses(trusted.micro_batches[0], 0).mean()).backward()
    reference.step(1e-3, 1.0)
    for mine, theirs in zip(w.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["source", "sample"])
def test_a_run_leaves_out_more_and_more_and_goes_on_exactly(tmp_path: Path, weights: str):
    data = make_data(tmp_path / "data")
    changes = {"weights": weights, "sampling": "weighted", "max_steps": 40, "lr_x": 0.5, "save_every": 7}
    whole = train(data, tmp_path / "whole", **changes)
    share = whole["computed"].dropna()
    assert share.iloc[0] == 1 and 0.3 < share.tail(8).mean() < 0.9
    assert whole["weight/train_noisy"].dropna().iloc[-1] < 0.4

    stopped = tmp_path / "stopped"
    before = train_bilevel.one_step

    def until_the_ninth(run):
        if run.step == 9:
            raise KeyboardInterrupt
        return before(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_bilevel, "one_step", until_the_ninth)
        with pytest.raises(KeyboardInterrupt):
            train_bilevel.main(settings(data, stopped, **changes))
    train(data, stopped, **changes)
    assert (stopped / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert (stopped / "weights.csv").read_bytes() == (tmp_path / "whole" / "weights.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"method": "align"}, {"lisa_layers": 1, "lisa_interval": 4}])
def test_batches_of_one_sample_run_to_their_end(tmp_path: Path, changes: dict):
    """The noisy source weighs little from the start, so that of the first batch, too, nothing is computed."""
    start = tmp_path / "start.csv"
    start.write_text("source,weight\ntrain_clean,0.99\ntrain_noisy,0.01\n")
    rows = train(
        make_data(tmp_path / "data"), tmp_path / "one", sampling="weighted", sampling_floor=0.05, max_steps=40,
        global_batch_size=1, lr_x=1.0, x_optimizer="adam", upper_every=4, x_init=str(start), seed=2, **changes,
    )  # fmt: skip
    assert {0.0, 1.0} == set(rows["computed"].dropna()) and rows["computed"][1] == 0
    assert rows.loc[rows["computed"] == 0, "loss_w"].isna().all() and rows["val_loss_w"].iloc[1:].notna().all()


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_compute_what_one_does(tmp_path: Path):
    """Two drawn samples a step, so that often one process or both have none."""
    data = make_data(tmp_path / "data")
    changes = {"sampling": "weighted", "sampling_floor": "0.05", "global_batch_size": "2", "lr_x": "1"}
    rows = []
    for name, stage in (("one", None), ("two", 3)):
        code, said = end(start(tmp_path, data, name, stage, **changes))
        assert code == 0, said
        rows.append(pd.read_csv(tmp_path / "outputs" / name / "metrics.csv"))
    assert {0, 0.5, 1} == set(rows[0]["computed"].dropna())
    # Differences are in standard deviations of gaps, which are small differences of losses themselves.
    evidence = [name for name in rows[0] if name.startswith(("difference/", "interval/", "evidence/"))]
    pd.testing.assert_frame_equal(*(each[evidence] for each in rows), rtol=0.05, atol=0.05)
    pd.testing.assert_frame_equal(*(each.drop(columns=evidence) for each in rows), rtol=1e-4, atol=1e-6)
