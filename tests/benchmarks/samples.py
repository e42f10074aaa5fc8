"""Samples as long as Alpaca's, for benchmarks that must run where Alpaca is not: made of random tokens, or read.

alpaca_lengths.csv has a row for every fourth of 4,000 records of Alpaca (tatsu-lab/alpaca, alpaca_data.json; Taori et
al. 2023) in order of length: tokens of the prompt with its headings, and of the response with EOS, by a byte-level BPE
of 8,192 tokens trained on those records, cut at 512. Mean 97 tokens, 66 of them in the response; 5 in 100 have more
than 207.
"""

from pathlib import Path

import datasets
import numpy as np

from bilevel.data.samples import TOKEN_FEATURES, Samples, load_samples
from bilevel.data.sources import file_source, find_sources
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.model.loading import load_tokenizer
from bilevel.settings.fields import Settings

LENGTHS = Path(__file__).with_name("alpaca_lengths.csv")


def alpaca_lengths() -> np.ndarray:
    """(1000, 2) tokens of prompt and response."""
    return np.loadtxt(LENGTHS, delimiter=",", skiprows=1, dtype=int)


def random_samples(files: list[str], lengths: np.ndarray, vocabulary: int, seed: int) -> Samples:
    """Sources of these names, each with samples of these lengths (n, 2) and tokens drawn from the seed."""
    random = np.random.default_rng(seed)
    tables = []
    for _ in files:
        rows = []
        for index, (prompt, response) in enumerate(lengths):
            ids = random.integers(1, vocabulary, prompt + response).tolist()
            labels = [IGNORE] * prompt + ids[prompt:]
            rows.append({"index": index, "is_noisy": None, "input_ids": ids, "labels": labels})
        tables.append(datasets.Dataset.from_list(rows, features=TOKEN_FEATURES))
    return Samples([Path(file) for file in files], tables, [0] * len(files))


def train_and_validation(data: Path | None, shape: dict) -> tuple[Samples, Samples]:
    """Two training sources and validation samples: those of a folder that process.py wrote, or random ones."""
    if data is None:
        lengths = alpaca_lengths()
        vocabulary = shape["vocab_size"]
        names = ["train_clean.json", "train_noisy.json"]
        return random_samples(names, lengths, vocabulary, 0), random_samples(["val.json"], lengths, vocabulary, 1)
    files = find_sources([str(data / "train_*.json")])
    settings = Settings(train_data=["-"], val_data=["-"], model_config=shape)
    tokeniser = Tokeniser(load_tokenizer(settings, files), settings.max_length, settings.loss_on)
    return load_samples(files, tokeniser), load_samples([file_source(data / "val.json")], tokeniser)
