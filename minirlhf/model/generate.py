"""Sampling from a policy: what PPO's rollouts, the evaluation and `python -m minirlhf.generate` go through."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import upload
from minirlhf.kernels import graphs
from minirlhf.model.decoding import Decoder, check_context, decoder_for
from minirlhf.model.gpt import GPT
from minirlhf.model.sampler import DoneFlags, Sampler
from minirlhf.model.sampling import Sampling
from minirlhf.seeds import mix

CHECK_EVERY = {"cpu": 1, "cuda": 8}  # steps between two checks of who is done
Watch = Callable[[int, list[int]], bool]


class Generation(NamedTuple):
    """Responses as they were sampled, right-padded with end-of-text."""

    responses: Int[Tensor, "B R"]
    mask: Bool[Tensor, "B R"]  # True up to and including the end-of-text token that was sampled
    logprobs: Float[Tensor, "B R"]  # of the token sampled, under the temperature and nothing else; 0 at padding
    truncated: Bool[Tensor, " B"]  # True where the limit came before end-of-text, or before what `watch` waits for
    entropy: Float[Tensor, "B R"] | None = None  # of the distribution that logprobs are of; 0 at padding
    rows: Sequence[list[int]] = ()  # the tokens of each response, on the host, which has read them


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eot: int,
    max_new_tokens: int | Sequence[int],
    seed: int | Sequence[int],
    sampling: Sampling | None = None,
    *,
    entropy: bool = False,
    watch: Watch | None = None,
) -> Generation:
    """Sample one response to each prompt.

    The log-probs are the policy's own at the sampling temperature, log softmax(logits / T) of the token sampled: what
    PPO's ratio divides by. (At temperature 0 the token is the most likely one and T = 1 is used.) They describe the
    distribution sampled from only when nothing is cut away from it and nothing penalised, which is why PPO takes no
    option but the temperature.

    What a row is answered depends on its prompt, limit and seed; not, but for rounding, on the rows beside it. Where
    our own kernels have packed the weights (`decoding.packing_of`), not even rounding depends on them.

    Args:
        model: the policy, which samples with its kernel and dtype (`GPT.run_with`).
        prompts: B lists of token ids, of any lengths.
        eot: id of end-of-text, which ends a response and belongs to it.
        max_new_tokens: the limit, one for all or one per row.
        seed: one per row; or one for all, of which row i gets mix(seed, i).
        sampling: temperature, penalties, what is cut away.
        entropy: whether to return it, too.
        watch: called after each token with the row and its response so far; True ends the response there.

    Returns:
        `Generation`, with R the longest response.

    Raises:
        InputError: a prompt and its limit exceed the context; or logits are NaN.
    """
    sampling = Sampling() if sampling is None else sampling
    device, B = model.wte.weight.device, len(prompts)
    limits = [max_new_tokens] * B if isinstance(max_new_tokens, int) else list(max_new_tokens)
    seeds = [mix(seed, row) for row in range(B)] if isinstance(seed, int) else list(seed)
    if not B == len(limits) == len(seeds):
        raise ValueError(f"{B} prompts want as many limits and seeds, got {len(limits)} and {len(seeds)}")
    check_context(model, prompts, limits)

    # Those of like length side by side. Row i of the sampler answers prompt live[i], later only those not done.
    live, R = sorted(range(B), key=lambda row: len(prompts[row])), max(limits)
    ordered = [prompts[row] for row in live]
    watched = _Watched(watch, live)

    with decoder_for(model) as decoder:
        decoder.begin(model, ordered, [len(prompts[row]) + limits[row] for row in live])
        sampler = Sampler(
            ordered, [limits[row] for row in live], [seeds[row] for row in live], live, eot, sampling,
            model.config.vocab_size, kernel=model.kernel, capacity=decoder.capacity, columns=decoder.rounded(R),
            entropy=entropy, device=device, keep=decoder.keep,
            dtype=torch.float64 if model.wte.weight.dtype == torch.float64 else torch.float32,
        )  # fmt: skip
        captured, flags = graphs.can_capture(device, model.kernel), DoneFlags()
        if captured:
            decoder.captured.at((*decoder.addresses(), *sampler.addresses()))
        for t in range(R):
            _step(decoder, sampler, eot if t < sampling.min_new_tokens else None, captured)
            if watch is not None:
                watched.call(sampler, decoder.rows, live, t)
            if t + 1 == R:
                break
            if (t + 1) % CHECK_EVERY[device.type] == 0:
                going = flags.read(sampler.done[: decoder.rows])
                if going is not None and not any(going):
                    break
                if going is not None and decoder.too_wide_for(sum(going)):
                    live = [live[i] for i in _close_ranks(decoder, sampler, going)]
                flags.start(sampler.done[: decoder.rows])
    return _collect(sampler, limits, eot, watched.stopped)


def _step(decoder: Decoder, sampler: Sampler, forbid: int | None, captured: bool) -> None:
    """One more token in each row; where steps are captured, all that runs on the device is one CUDA graph."""
    if not captured:
        sampler.pick(decoder.step(sampler.tokens[: decoder.rows]), forbid)
        return
    width, reach = decoder.width, decoder.reach

    def step() -> None:
        sampler.pick(decoder.logits(sampler.tokens[:width], reach), forbid)

    decoder.captured((width, reach, sampler.sampling, forbid, sampler.kernel, sampler.eot), step)
    decoder.steps += 1


class _Watched:
    """Responses that somebody watches while they grow, and the lengths at which these were ended."""

    def __init__(self, watch: Watch | None, live: Sequence[int]):
        self.watch, self.stopped = watch, {}
        self.responses: dict[int, list[int]] = {row: [] for row in live} if watch is not None else {}

    def call(self, sampler: Sampler, rows: int, live: Sequence[int], t: int) -> None:
        """Show every row that goes on its new token; end it if that is wanted."""
        for i, (token, over) in enumerate(zip(sampler.tokens[:rows].tolist(), sampler.done[:rows].tolist())):
            response = self.responses.get(live[i])
            if response is None:
                continue
            response.append(token)
            if self.watch(live[i], list(response)):
                self.stopped[live[i]], over = t + 1, True
                sampler.done[i] = True
            if over:
                del self.responses[live[i]]


def _close_ranks(decoder: Decoder, sampler: Sampler, going: Sequence[bool]) -> list[int]:
    """Whoever goes on stays, and the last rows fill the gaps: which row came to each place."""
    n, device = sum(going), sampler.tokens.device
    last = (i for i in range(n, len(going)) if going[i])
    places = [i if going[i] else next(last) for i in range(n)]
    moved = [i for i, source in enumerate(places) if i != source]
    to, source = (upload(torch.tensor(x).long(), device) for x in (moved, [places[i] for i in moved]))
    decoder.move(to, source, n)
    sampler.move(to, source, n)
    return places


def _collect(sampler: Sampler, limits: Sequence[int], eot: int, stopped: dict[int, int]) -> Generation:
    """The responses out of the tables. What was sampled is read at once, and whether all of it are numbers."""
    B, R, device = len(limits), max(limits), sampler.tokens.device
    broken = sampler.logprobs[:B].isnan().any().long()
    *tokens, broken = torch.cat((sampler.sampled[:B, :R].flatten(), broken[None])).tolist()
    if broken:
        raise InputError(
            "the model's logits are not numbers (NaN): its weights are damaged, or its training diverged; use an "
            "earlier checkpoint or another model"
        )
    rows, truncated = [], []
    for row in range(B):  # which may have been computed beyond its end
        own = tokens[row * R : row * R + stopped.get(row, limits[row])]
        ended = eot in own
        rows.append(own[: own.index(eot) + 1] if ended else own)
        truncated.append(not ended and row not in stopped)
    R = max(map(len, rows))
    mask = upload(torch.arange(R) < torch.tensor([len(row) for row in rows])[:, None], device)
    responses = upload(torch.tensor([[*row, *[eot] * (R - len(row))] for row in rows]), device)
    logprobs = torch.where(mask, sampler.logprobs[:B, :R], 0.0)
    entropy = None if sampler.entropy is None else torch.where(mask, sampler.entropy[:B, :R], 0.0)
    return Generation(responses, mask, logprobs, upload(torch.tensor(truncated), device), entropy, rows)


# --- texts ------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """One response as it was drawn."""

    tokens: list[int]  # with end-of-text, where it was drawn
    logprobs: list[float]


def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eot: int,
    max_new_tokens: int,
    seed: int,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    watch: Watch | None = None,
) -> list[Drawn]:
    """`generate` in batches, whose size changes nothing but rounding: prompt i is answered with mix(seed, i)."""
    responses = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        seeds = [mix(seed, start + row) for row in range(len(batch))]
        drawn = generate(model, batch, eot, max_new_tokens, seeds, sampling, watch=watch)
        for tokens, logprobs in zip(drawn.rows, drawn.logprobs.tolist()):
            responses.append(Drawn(tokens, logprobs[: len(tokens)]))
    return responses


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    sampling: Sampling | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Responses to texts as token ids (end-of-text included where it was drawn)."""
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    drawn = sample(model, tokens, tokenizer.eot, max_new_tokens, seed, sampling, batch_size)
    return [response.tokens for response in drawn]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one is end-of-text, which also begins every document of pre-training."""
    return tokenizer.encode(prompt) or [tokenizer.eot]
