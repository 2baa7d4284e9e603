"""What people see of PPO while it trains: the gold judge's score, a few samples, the per-token breakdown."""

from dataclasses import dataclass

from minirlhf.algorithms.experience import Step
from minirlhf.algorithms.ppo import Networks, PPOConfig
from minirlhf.algorithms.rewards import Reward, score
from minirlhf.algorithms.training import is_due
from minirlhf.commands.explain import breakdown, show_explained
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.run.folder import Run


@dataclass(frozen=True)
class Watch:
    """Called by `ppo.train` after each step's updates; changes no weight."""

    networks: Networks
    tokenizer: Tokenizer
    config: PPOConfig
    run: Run
    gold: Reward | None = None
    """A judge that is logged and never optimised."""
    explain: int = 0
    """Responses to break down per token, at the first rollout and wherever samples are shown."""

    def __call__(self, seen: Step) -> dict[str, float | None]:
        """Show samples and breakdown where they are due; the gold judge's mean score, to be logged."""
        n, is_shown = len(seen.responses), is_due(seen.step, self.config.sample_every, self.config.steps)
        if is_shown:
            self.run.samples(
                seen.step,
                [
                    {"prompt": seen.prompts[i], "response": seen.responses[i], "reward": float(seen.scores[i])}
                    for i in evenly_spaced(n, 3)
                ],
            )
        if self.explain and (is_shown or seen.step == 0):
            rows = evenly_spaced(n, self.explain)
            show_explained(self.run, breakdown(seen, rows, self.networks, self.tokenizer, self.config))
        gold = None if self.gold is None else float(score(self.gold, seen.prompts, seen.responses).mean())
        return {"gold": gold}


def evenly_spaced(n: int, count: int) -> list[int]:
    """At most `count` of n rows, evenly spaced."""
    return [i * n // min(n, count) for i in range(min(n, count))]
