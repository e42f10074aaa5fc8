"""Generation of answers in batches: greedy, or drawn at a temperature."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
import transformers

from bilevel.data.tokenise import Prompt
from bilevel.model.response_end import stop_tokens


@dataclasses.dataclass
class Generated:
    """The token ids after a prompt, without the stop token; whether a stop token came, or it was cut off."""

    ids: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


@torch.no_grad()
def generate(
    model: transformers.PreTrainedModel,
    prompts: list[Prompt],
    max_new_tokens: int,
    batch_size: int,
    done: Callable[[int], object] = lambda count: None,
    temperature: float = 0.0,
    seeds: list[int] | None = None,
) -> list[Generated]:
    """What the model writes after each prompt: the likeliest tokens, or tokens drawn at a temperature above 0.

    Generation stops at the tokens of the model's own generation_config, as it will for the model's users. An answer is
    shorter than max_new_tokens, too, if the model has no positions left. Answers do not depend on batch_size: each
    prompt has a generator of random numbers of its own, from its entry in seeds. done is called with the number of
    prompts finished. Sets the model to evaluation mode; draws no random numbers from the generators of torch.
    """
    device, positions = next(model.parameters()).device, getattr(model.config, "max_position_embeddings", None)
    stops = set(stop_tokens(model.generation_config))
    model.eval()
    longest = math.inf if positions is None else positions
    rooms = [max(0, min(max_new_tokens, longest - len(prompt.ids))) for prompt in prompts]
    answers = [Generated() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (rooms[i], -len(prompts[i].ids)))
    for room, group in itertools.groupby(order, key=lambda i: rooms[i]):
        places = [i for i in group if room and prompts[i].ids]
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            sampler = Sampler(temperature, [seeds[i] for i in part], device) if temperature else None
            new = _generate(model, [prompts[i].ids for i in part], room, sorted(stops), device, sampler)
            for i, ids in zip(part, new.tolist(), strict=True):
                answers[i].ids = list(itertools.takewhile(lambda token: token not in stops, ids))
                answers[i].ended = len(answers[i].ids) < len(ids)
            done(len(part))
    return answers


class Sampler(transformers.LogitsProcessor):
    """Adds Gumbel noise to the logits (B, V) / temperature, so that the largest is a draw from their softmax.

    Each row has a generator of its own.
    """

    def __init__(self, temperature: float, seeds: list[int], device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature
        for row, generator in zip(scores, self.generators, strict=True):
            row -= torch.empty_like(row).exponential_(generator=generator).log_()
        return scores


def _generate(
    model: transformers.PreTrainedModel,
    prompts: list[list[int]],
    room: int,
    stops: list[int],
    device: torch.device,
    sampler: Sampler | None,
) -> torch.Tensor:
    """New tokens (B, at most room); prompts are padded on the left."""
    width, pad = max(map(len, prompts)), stops[0] if stops else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    config = transformers.GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=stops or None, pad_token_id=pad, use_cache=True
    )
    processors = transformers.LogitsProcessorList([sampler] if sampler else [])
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()  # or it fills in its values
    try:
        found = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
        return found[:, width:]
    finally:
        model.generation_config = own
