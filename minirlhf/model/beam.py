"""Beam search: the most likely responses that a search of a given width finds.

Token for token and score for score it is what transformers finds (`generate(num_beams=…, do_sample=False)`), so that a
run gives the same responses there. Prompts that are done leave; those left are computed side by side.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minirlhf import InputError
from minirlhf.model.decoding import check_context, decoder_for
from minirlhf.model.gpt import GPT
from minirlhf.model.sampling import adjust, tokens_seen

NEVER = -1e9  # the score of what is not there: small enough to lose, and no infinity, whose differences are NaN
CHECK_EVERY = {"cpu": 1, "cuda": 8}  # steps between two checks of which prompts are done


class Beams(NamedTuple):
    """The N best responses to each prompt, best first, right-padded with end-of-text."""

    responses: Int[Tensor, "B N R"]
    mask: Bool[Tensor, "B N R"]  # True up to and including end-of-text
    scores: Float[Tensor, "B N"]  # Σ log π / length^penalty


@torch.no_grad()
def beam_search(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    eot: int,
    max_new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    returned: int = 1,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> Beams:
    """Keep the K most likely beginnings, extend each by every token, keep the K best again, until none can win.

        score(y) = Σ_t log π(y_t | x, y_<t) / |y|^penalty

    One beam is greedy search.

    Source: Graves 2012, "Sequence Transduction with Recurrent Neural Networks", algorithm 1; Sutskever et al. 2014,
    section 3.2; the division by the length, Wu et al. 2016, section 7. Differs: Wu et al. divide by ((5 + |y|)/6)^α.

    Args:
        model: the policy.
        prompts: B lists of token ids, of any lengths.
        eot: id of end-of-text, which ends a response and counts in its length.
        max_new_tokens: the limit; a response that reaches it is scored as it stands.
        beams: K.
        length_penalty: 0 compares sums of log-probs, 1 their means; higher prefers longer responses.
        returned: N ≤ K.
        min_new_tokens: no end-of-text before so many tokens.
        repetition_penalty: see `sampling.adjust`; of log-probs, which are never above 0, it makes multiples.
        early_stopping: True ends a prompt's search with K finished responses; False when the best beginning, taken at
            its present length, is worse than all of these; "never" when it is so at the length that suits it best.

    Returns:
        `Beams`, with R the longest response.

    Raises:
        InputError: a prompt and the limit exceed the context, or N exceeds K.
    """
    if not 1 <= returned <= beams:
        raise InputError(f"{returned} of {beams} beams cannot be returned; give 1 <= returned <= beams")
    device, K, R, V = model.wte.weight.device, beams, max_new_tokens, model.config.vocab_size
    check_context(model, prompts, [R] * len(prompts))
    live = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # which prompt each row of the tables is of
    ordered = [prompts[i] for i in live]
    seen = tokens_seen(ordered, V, device) if repetition_penalty != 1 else None
    search = _Search(len(prompts), K, R, eot, length_penalty, early_stopping, device)
    result: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * len(prompts)

    with decoder_for(model) as decoder:
        logits = decoder.start(model, ordered, [len(prompt) + R for prompt in ordered], copies=K)  # (B, V)
        for t in range(R):
            # Penalties are of log-probs; one beam is compared with nothing, and they are of logits, as in sampling.
            logp = logits.float() if K == 1 else torch.log_softmax(logits.float(), dim=-1)
            logp = adjust(logp, repetition_penalty, seen, eot if t < min_new_tokens else None)
            logp = torch.log_softmax(logp, dim=-1) if K == 1 else logp
            parent, token = search.extend(logp.repeat_interleave(K, dim=0) if t == 0 else logp, t)  # (B, K)
            if t + 1 == R:
                break

            rows = torch.arange(len(live), device=device)[:, None]  # (B, 1)
            source = (rows if t == 0 else rows * K + parent).expand(-1, K)  # (B, K), rows of the decoder
            if (t + 1) % CHECK_EVERY[device.type] == 0 and not all(going := search.open.tolist()):
                for i, goes_on in enumerate(going):
                    if not goes_on:
                        result[live[i]] = search.finished[i], search.lengths[i], search.scores[i]
                live = [live[i] for i, goes_on in enumerate(going) if goes_on]
                if not live:
                    break
                source, token = source[search.open], token[search.open]
                search.drop_closed()
            if seen is not None:
                seen = seen[source.flatten()].scatter(1, token.flatten()[:, None], True)
            decoder.move(torch.arange(source.numel(), device=device), source.flatten(), source.numel())
            logits = decoder.step(token.flatten())
    for i, prompt in enumerate(live):
        result[prompt] = search.finished[i], search.lengths[i], search.scores[i]

    finished, lengths, scores = (torch.stack(part)[:, :returned] for part in zip(*result))
    mask = torch.arange(R, device=device) < lengths[:, :, None]  # (B, N, R)
    longest = int(lengths.max())
    return Beams(torch.where(mask, finished, eot)[:, :, :longest], mask[:, :, :longest], scores)


class _Search:
    """Of each prompt, the K most likely beginnings, and the K best responses that are finished."""

    def __init__(
        self, B: int, K: int, R: int, eot: int, length_penalty: float, early_stopping: Any, device: torch.device
    ):
        self.K, self.R, self.eot, self.length_penalty, self.early_stopping = K, R, eot, length_penalty, early_stopping
        # The beginnings, which all start alike: the first is extended, the others are not there yet.
        self.running = torch.full((B, K, R), eot, device=device)
        self.sums = torch.full((B, K), NEVER, device=device)
        self.sums[:, 0] = 0.0
        # What is finished so far, best first.
        self.finished = torch.full_like(self.running, eot)
        self.lengths = torch.zeros(B, K, dtype=torch.long, device=device)
        self.scores = torch.full_like(self.sums, NEVER)
        self.there = torch.zeros(B, K, dtype=torch.bool, device=device)
        self.open = torch.ones(B, dtype=torch.bool, device=device)  # a beginning may still beat what is finished

    def extend(self, logp: Float[Tensor, "BK V"], t: int) -> tuple[Int[Tensor, "B n"], Int[Tensor, "B n"]]:
        """Extend every beginning by every token; return whose and which those that go on are."""
        K, V = self.K, logp.shape[-1]
        rows = torch.arange(len(self.open), device=logp.device)[:, None]  # (B, 1)
        totals = (self.sums[:, :, None] + logp.view(-1, K, V)).flatten(1)  # (B, K·V)
        # One in K may end, so that of twice as many K go on. A single beam takes the best, whatever it is.
        best, where = totals.topk(2 * K if K > 1 else 1)  # (B, 2K)
        parent, token = where // V, where % V
        texts = self.running[rows, parent]  # (B, 2K, R)
        texts[:, :, t] = token
        ends = (token == self.eot) | (t + 1 == self.R)

        # Finished: those among the K best that end here, unless the prompt's search is over.
        counts = ends & self.open[:, None]
        counts[:, K:] = False
        merged = torch.cat((self.scores, torch.where(counts, best / (t + 1) ** self.length_penalty, NEVER)), dim=1)
        self.scores, chosen = merged.topk(K)
        self.finished = torch.cat((self.finished, texts), dim=1)[rows, chosen]
        self.lengths = torch.cat((self.lengths, torch.full_like(token, t + 1)), dim=1)[rows, chosen]
        self.there = torch.cat((self.there, counts), dim=1)[rows, chosen]
        if t + 1 == self.R:
            return parent, token

        # Running: the K best of those that go on.
        self.sums, chosen = (best + ends * NEVER).topk(K)
        self.running = texts[rows, chosen]
        hoped = self.R if self.early_stopping == "never" and self.length_penalty > 0 else t + 1
        worst = torch.where(self.there, self.scores.amin(-1, keepdim=True), NEVER).amin(-1)
        self.open = self.open & (self.sums[:, 0] / hoped**self.length_penalty > worst)
        if self.early_stopping is True:
            self.open = self.open & ~self.there.all(-1)
        return parent[rows, chosen], token[rows, chosen]

    def drop_closed(self) -> None:
        """Forget the prompts whose search is over."""
        for name in ("running", "sums", "finished", "lengths", "scores", "there"):
            setattr(self, name, getattr(self, name)[self.open])
        self.open = self.open[self.open]
