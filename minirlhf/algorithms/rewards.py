"""What scores a response: a trained reward model, a Python function, a text classifier, or the gold judge.

All of them are one protocol, `reward(prompts, responses, texts) -> B numbers`, and one spelling on the command line:

    gold                     the judge of the embedded world
    pkg.module:function      any Python function of (prompts, responses, texts)
    hf:DIR                   a text classifier in Hugging Face's format: the log-odds of its positive label
    runs/rm                  a reward model trained with train_rm.py
    mean:A,B,…  worst:A,B,…  several of these (no comma in a name) as one: their mean, or the lowest, each response

To score a file:

    python -m minirlhf.rewards runs/rm pairs.jsonl --out scores.jsonl
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minirlhf import InputError
from minirlhf.algorithms.losses import running_moments
from minirlhf.data import helpdesk
from minirlhf.data.batches import Example, collate, tokens_of
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.devices import upload
from minirlhf.model.gpt import last_token
from minirlhf.run.folder import load_run, require_same_tokenizer

FORMS = "gold, pkg.module:function, hf:DIR (a text classifier), the folder of a reward model, or mean:A,B or worst:A,B"


@runtime_checkable
class Reward(Protocol):
    """What scores responses. Call it through `score`, which checks what comes back."""

    name: str

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str]
    ) -> Float[Tensor, " B"] | Sequence[float]:
        """One number for each response, higher = better; texts[i] = prompts[i] + responses[i]."""
        ...


def score(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Float[Tensor, " B"]:
    """Score B responses and check the scores: (B,), float32, on the CPU.

    Raises:
        InputError: the reward returned something else than B finite numbers. (What it raises itself passes through.)
    """
    who = f"reward function {reward.name}"
    returned = reward(prompts, responses, [prompt + response for prompt, response in zip(prompts, responses)])
    try:
        scores = torch.as_tensor(returned).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        what = f"returned {type(returned).__name__}, expected {len(prompts)} numbers"
        raise InputError(f"{who} {what}; return a list or a tensor, one number per response") from error
    if scores.shape != (len(prompts),):
        what = f"returned shape {tuple(scores.shape)}, expected ({len(prompts)},)"
        raise InputError(f"{who} {what}; return one number per response")
    wrong = (~scores.isfinite()).nonzero().flatten().tolist()
    if wrong:
        value = "NaN" if scores[wrong[0]].isnan() else str(float(scores[wrong[0]]))
        text = json.dumps(responses[wrong[0]][:80], ensure_ascii=False)
        raise InputError(f"{who} returned {value} for response {wrong[0]}: {text}; return finite numbers")
    return scores


def shape_scores(
    scores: Float[Tensor, " B"],
    truncated: Bool[Tensor, " B"],
    numbers: dict[str, float],
    normalise: bool = False,
    clip: float = 0.0,
    missing_eot_penalty: float = 0.0,
) -> Float[Tensor, " B"]:
    """Scores as PPO sees them, in units of the score or, normalised, of its deviation.

    Args:
        scores: as the reward gave them.
        truncated: which responses were cut at the limit.
        numbers: count, mean and sum of squared deviations of all scores so far; moved on if `normalise`.
        normalise: to mean 0 and deviation 1 over all rollouts so far.
        clip: cut to ±this; 0 = no limit.
        missing_eot_penalty: taken from a truncated response.
    """
    if normalise:
        names = ("score_count", "score_mean", "score_m2")
        count, mean, m2 = running_moments(*(numbers[name] for name in names), scores)
        numbers |= dict(zip(names, (count, mean, m2)))
        scores = (scores - mean) / (math.sqrt(m2 / count) + 1e-8)
    if clip:
        scores = scores.clamp(-clip, clip)
    return scores - missing_eot_penalty * truncated.float()


class RewardModelScorer:
    """A reward model's score of prompt and response: its output at the response's last token.

    A response that ended is scored at its end-of-text, one cut at the limit at its last word: nothing is appended to
    it. A plain string counts as a whole response and gets its end-of-text here.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", batch_size: int = 64):
        self.name, self.batch_size = str(folder), batch_size
        self.model, self.tokenizer = load_run(folder, scalar=True, device=device)

    def example(self, prompt: str, response: str) -> Example:
        """The tokens to score: those a `TokenText` carries, or those of the string and end-of-text."""
        before, after = tokens_of(self.tokenizer, prompt, response)
        return Example([*before, *after], len(before))

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str] = ()
    ) -> Float[Tensor, " B"]:
        examples = [self.example(prompt, response) for prompt, response in zip(prompts, responses)]
        context, device = self.model.config.n_positions, self.model.score.weight.device
        longest = max((len(example.tokens) for example in examples), default=0)
        if longest > context:
            raise InputError(
                f"a prompt and its response have {longest} tokens, but the reward model {self.name} reads {context}; "
                "shorten them, or train it with a longer context"
            )
        order, scores = [], []
        for rows in _batches([len(example.tokens) for example in examples], self.batch_size):
            batch = collate([examples[i] for i in rows], self.tokenizer.eot)
            tokens = upload(batch.tokens, device)  # (B, T)
            # Padding stands on the right, where causal attention cannot see it: the trunk needs no mask.
            scores.append(last_token(self.model(tokens), batch.mask).float())
            order += rows
        in_order = torch.zeros(len(examples))
        if scores:
            in_order[order] = torch.cat(scores).cpu()
        return in_order


class PythonReward:
    """Any Python function of (prompts, responses, texts), three lists of strings, that returns B numbers.

    It is imported from the current directory or from what is installed.
    """

    def __init__(self, spec: str):
        self.name = spec
        self.function = _import(spec)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str]) -> Any:
        return self.function(list(prompts), list(responses), list(texts))  # whatever it is, `score` checks it


class TextClassifier:
    """The log-odds that a text classifier gives its positive label: the sentiment way of rewarding.

        score = log p_+ - log(1 - p_+) = z_+ - log Σ_{i ≠ +} exp z_i          z: logits; of two labels, z_+ - z_-

    The positive label is the one whose name in the config's `id2label` contains POSITIVE or, of two labels, ends in 1
    (LABEL_1, "1"). A classifier with a single output is a regression, and its output is the score. Prompt and response
    are read together, with the classifier's own tokenizer.
    Source: the reward of Ziegler et al. 2019, section 3.1.1, for their sentiment task.
    """

    def __init__(self, spec: str, device: torch.device | str = "cpu", batch_size: int = 64):
        self.name, self.device, self.batch_size = spec, device, batch_size
        folder = Path(spec.removeprefix("hf:"))
        if not folder.is_dir():
            raise InputError(f"{spec}: no such folder; give hf:DIR, a text classifier downloaded to DIR")
        try:
            from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging
        except ImportError as error:
            raise InputError(f"{spec} needs transformers; pip install 'minirlhf[hf]'") from error
        logging.disable_progress_bar()  # the bar of a loading model would stand among our own lines
        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise InputError(
                f"{spec}: not a text classifier with config.json, model.safetensors and a tokenizer ({why}); "
                "save it again with save_pretrained"
            ) from error
        self.model = self.model.to(device).eval()
        config = self.model.config
        self.positive = _positive_label(spec, [config.id2label[i] for i in range(config.num_labels)])
        positions = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.context = min(positions, self.tokenizer.model_max_length)
        if self.tokenizer.pad_token_id is None or getattr(config, "pad_token_id", None) is None:
            self.batch_size = 1  # nothing to pad with, so one text at a time

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str]) -> Float[Tensor, " B"]:
        ids = [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        for i, row in enumerate(ids):
            if not 0 < len(row) <= self.context:
                raise InputError(f"text {i} has {len(row)} tokens, but {self.name} reads 1 to {self.context}; cut it")
        scores = torch.zeros(len(ids), device=self.device)
        for rows in _batches([len(row) for row in ids], self.batch_size):
            batch = self.tokenizer.pad(
                {"input_ids": [ids[i] for i in rows]}, padding=len(rows) > 1, padding_side="right", return_tensors="pt"
            )
            logits = self.model(**batch.to(self.device)).logits.float()  # (B, labels)
            if logits.shape[-1] == 1:
                scores[rows] = logits[:, 0]
            else:
                others = [i for i in range(logits.shape[-1]) if i != self.positive]
                scores[rows] = logits[:, self.positive] - logits[:, others].logsumexp(-1)
        return scores


class GoldJudge:
    """The judge of the embedded world: what people there really want, which no training sees."""

    name = "gold"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str] = ()) -> list[float]:
        return helpdesk.gold(prompts, responses)


class Ensemble:
    """Several rewards as one, so that what only one of them overrates pays less.

        mean    r = 1/M Σ_m r_m          worst   r = min_m r_m

    Comparisons leave a constant per prompt free, and in the lowest of several such a constant would count: train the
    members with `--centring`, which pins it down.
    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", section 3.3 (mean and
    worst-case optimisation); Eisenstein et al. 2023, section 4.
    """

    def __init__(self, how: str, members: Sequence[Reward]):
        self.name = f"{how}:{','.join(member.name for member in members)}"
        self.how, self.members = how, list(members)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], texts: Sequence[str]) -> Float[Tensor, " B"]:
        scores = torch.stack([score(member, prompts, responses) for member in self.members])  # (M, B)
        return scores.mean(0) if self.how == "mean" else scores.amin(0)


def reward_models(reward: Reward | None) -> list[RewardModelScorer]:
    """The reward models among what scores: the reward itself, or members of an ensemble."""
    members = reward.members if isinstance(reward, Ensemble) else [reward]
    return [member for member in members if isinstance(member, RewardModelScorer)]


def require_context(reward: Reward, prompt: int, response: int) -> None:
    """Refuse a reward model that cannot read a prompt and a response of so many tokens."""
    for scorer in reward_models(reward):
        context = scorer.model.config.n_positions
        if prompt + response > context:
            raise InputError(
                f"{scorer.name}: this reward model reads {context} tokens, too few for a prompt of {prompt} and a "
                f"response of {response}; lower --response-tokens, shorten the prompts, or train it with a longer "
                "context"
            )


def load_reward(
    spec: str,
    device: torch.device | str = "cpu",
    *,
    policy_tokenizer: Tokenizer | None = None,
    policy_folder: str | Path | None = None,
    batch_size: int = 64,
) -> Reward:
    """The reward that a command line names.

    Args:
        spec: gold, pkg.module:function, hf:DIR, the folder of a reward model, or mean:A,B or worst:A,B of these.
        device: where models run.
        policy_tokenizer: of the policy whose tokens are to be scored; a reward model must have the same.
        policy_folder: the policy's, for the error message.
        batch_size: sequences a model reads at a time.

    Raises:
        InputError: `spec` names nothing, or nothing that can score.
    """
    if spec == "gold":
        return GoldJudge()
    if spec.startswith("hf:"):
        return TextClassifier(spec, device, batch_size)
    if spec.startswith(("mean:", "worst:")):
        how, _, members = spec.partition(":")
        if members.count(",") < 1 or not all(members.split(",")):
            raise InputError(f"{spec}: an ensemble has two members or more; write {how}:runs/rm-1,runs/rm-2")
        known = {"policy_tokenizer": policy_tokenizer, "policy_folder": policy_folder, "batch_size": batch_size}
        return Ensemble(how, [load_reward(member, device, **known) for member in members.split(",")])
    if ":" in spec and not Path(spec).exists():
        return PythonReward(spec)
    if not Path(spec).is_dir():
        raise InputError(f"no reward is named {spec!r}: there is no such folder; give {FORMS}")
    reward = RewardModelScorer(spec, device, batch_size)
    if policy_tokenizer is not None:
        require_same_tokenizer(policy_tokenizer, policy_folder or "the policy", reward.tokenizer, spec)
    return reward


def _import(spec: str) -> Callable[..., Any]:
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        cure = "write pkg.module:function, e.g. my_rewards:brevity for the function brevity in my_rewards.py"
        raise InputError(f"{spec!r} does not name a function; {cure}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but misses one of its own imports
        what = f"there is no module {error.name} in {Path.cwd()} or among the installed ones"
        raise InputError(f"{spec}: {what}; check the name") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "is no function" if hasattr(module, function_name) else "does not exist"
        raise InputError(f"{spec}: {function_name} {what} in {module_name}; check the name")
    return function


def _positive_label(spec: str, names: list[str]) -> int:
    if len(names) == 1:
        return 0
    named = [i for i, name in enumerate(names) if "POSITIVE" in str(name).upper()]
    if not named and len(names) == 2:
        named = [i for i, name in enumerate(names) if str(name).endswith("1")]
    if len(named) != 1:
        what = f"cannot tell which of the labels {', '.join(map(str, names))} is the positive one"
        raise InputError(f"{spec}: {what}; call it POSITIVE in the id2label of config.json")
    return named[0]


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of about equal length, so that little of what is computed is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
