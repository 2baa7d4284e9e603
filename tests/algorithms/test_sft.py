"""sft: what counts, accumulation and padding, held-out data, training that works, stops and resumes to the bit."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from loops import Killed, descent, rows, run_in, tiny_network, weights
from safetensors.torch import load_file

from minirlhf import InputError
from minirlhf.algorithms import sft
from minirlhf.algorithms.sft import SFTConfig, batches, held_out_loss, microbatches, sft_loss, train
from minirlhf.algorithms.training import cosine_lr
from minirlhf.data.batches import Batch, Data, collate, examples_from, token_stream
from minirlhf.data.records import Demonstration, Text
from minirlhf.model.gpt import GPT

CONTEXT = 64
DEMONSTRATIONS = [
    Demonstration("Customer: My order hasn't arrived.\nAgent:", " Please check your tracking."),
    Demonstration("Customer: Broken!\nAgent:", " I'm sorry to hear that. We will refund the second payment."),
    Demonstration("Customer: The lamp I bought is broken!\nAgent:", " Sorry."),
    Demonstration("", " Hello."),
    Demonstration("Hi", " Send us a photo of the damage."),
    Demonstration("Customer: I was charged twice.\nAgent:", " I apologise."),
    Demonstration("Customer: Refund my kettle.\nAgent:", " That must be annoying. We will."),
]
TEXTS = [Text(f"{d.prompt}{d.response}") for d in DEMONSTRATIONS] * 3


@pytest.fixture
def tiny(tiny_tokenizer):
    """Make a model of one layer, whose tokens differ in what they lose."""

    return lambda seed=0: tiny_network(tiny_tokenizer, CONTEXT, seed)


@pytest.fixture
def batch(tiny_tokenizer) -> Batch:
    """Seven demonstrations of different lengths."""
    examples, _ = examples_from(tiny_tokenizer, DEMONSTRATIONS, CONTEXT)
    return collate(examples, tiny_tokenizer.eot)


def cross_entropy(model: GPT, tokens: list[int], first: int) -> torch.Tensor:
    """Σ -log softmax(logits)[token] over tokens[first:], one row without padding, one token after the other."""
    logits = model.logits(model(torch.tensor([tokens[:-1]])))[0]
    return sum(F.cross_entropy(logits[t - 1], torch.tensor(tokens[t])) for t in range(first, len(tokens)))


def gradient(model: GPT, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# --- what counts ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_the_responses_alone(tiny, batch, tiny_tokenizer):
    model = tiny()
    by_hand = 0.0
    for one in DEMONSTRATIONS:
        prompt = tiny_tokenizer.encode(one.prompt) or [tiny_tokenizer.eot]
        response = [*tiny_tokenizer.encode(one.response), tiny_tokenizer.eot]
        by_hand = by_hand + cross_entropy(model, prompt + response, first=len(prompt))
    loss = sft_loss(model, batch)
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient(model, loss), gradient(model, by_hand), rtol=1e-4, atol=1e-4)


def test_what_counts_changes_the_loss(tiny, batch):
    model = tiny()
    everything = batch._replace(response_mask=batch.mask)
    assert everything.counted > batch.counted
    assert sft_loss(model, everything) > sft_loss(model, batch) + 1.0
    prompts = batch._replace(response_mask=batch.mask & ~batch.response_mask)
    torch.testing.assert_close(sft_loss(model, everything), sft_loss(model, batch) + sft_loss(model, prompts))


def test_the_first_token_of_a_row_is_predicted_by_nothing(tiny, batch):
    with_first = batch.response_mask.clone()
    with_first[:, 0] = True
    assert batch._replace(response_mask=with_first).counted == batch.counted
    assert sft_loss(tiny(), batch._replace(response_mask=with_first)) == sft_loss(tiny(), batch)


def test_padding_changes_neither_loss_nor_gradient(tiny, batch):
    model = tiny()
    loss = sft_loss(model, batch)
    expected = gradient(model, loss)
    for fill in (0, 7):
        padded = Batch(*(F.pad(part, (0, 5)) for part in batch))
        padded = padded._replace(tokens=torch.where(padded.mask, padded.tokens, fill))
        again = sft_loss(model, padded)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(gradient(model, again), expected, rtol=1e-4, atol=1e-4)
        assert padded.counted == batch.counted


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 100])
def test_microbatches_are_the_batch_cut_to_its_width(batch, size):
    pieces = microbatches(batch, size)
    assert [len(piece.tokens) for piece in pieces] == [min(size or 7, 7 - i) for i in range(0, 7, size or 7)]
    start = 0
    for piece in pieces:
        height, width = piece.tokens.shape
        assert piece.mask[:, -1].any()  # no column is padding in every row
        for part, whole in zip(piece, batch):
            assert torch.equal(part, whole[start : start + height, :width])
        assert not batch.mask[start : start + height, width:].any()  # and no token was lost
        start += height


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 100])
def test_accumulated_gradients_are_those_of_one_big_batch(tiny, batch, tmp_path, monkeypatch, size):
    # With plain gradient descent, the step is the gradient.
    monkeypatch.setattr(sft, "adamw", descent)
    by_hand = tiny()
    expected = gradient(by_hand, sft_loss(by_hand, batch) / int(batch.response_mask.sum()))
    model = tiny()
    config = SFTConfig(steps=1, microbatch_size=size, lr=1.0, warmup_steps=0, max_grad_norm=1e6)
    metrics = train(
        model,
        Data(lambda step: microbatches(batch, config.microbatch_size), []),
        config,
        run_in(tmp_path / "run", 1, "train_sft.py"),
    )
    torch.testing.assert_close(weights(by_hand) - weights(model), expected, rtol=0, atol=1e-6)
    assert metrics["loss"] == pytest.approx(sft_loss(by_hand, batch).item() / batch.counted, rel=1e-5)
    assert metrics["tokens"] == int(batch.response_mask.sum())


def test_gradients_are_scaled_down_to_their_greatest_norm(tiny, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "adamw", descent)
    model = tiny()
    before = weights(model)
    config = SFTConfig(steps=1, lr=1.0, warmup_steps=0, max_grad_norm=0.01)
    metrics = train(
        model,
        Data(lambda step: microbatches(batch, config.microbatch_size), []),
        config,
        run_in(tmp_path / "run", 1, "train_sft.py"),
    )
    assert (weights(model) - before).norm() == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] > 0.1  # what is logged is the norm before


# --- data -------------------------------------------------------------------------------------------------------------


def batches_of(*args, **options):
    """`batches`, of which a step's one microbatch is the batch."""
    data = batches(*args, **options)

    def batch_at(step):
        (batch,) = data.at(step)
        return batch

    return batch_at, data.held_out


@pytest.mark.parametrize("records", [DEMONSTRATIONS, TEXTS, TEXTS[:1]], ids=["demonstrations", "texts", "one text"])
def test_the_batch_of_a_step_depends_on_seed_and_step_alone(tiny_tokenizer, records):
    config = SFTConfig(batch_size=2, block=6, held_out=0.2)
    batch_at, _ = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=3)
    in_order = [batch_at(step) for step in range(8)]
    again, _ = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=3)
    for step in (7, 2, 5, 0):
        assert all(torch.equal(a, b) for a, b in zip(again(step), in_order[step]))
    other, _ = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=4)
    assert any(a.shape != b.shape or not torch.equal(a, b) for s in range(8) for a, b in zip(other(s), in_order[s]))
    assert len({str(one.tokens.tolist()) for one in in_order}) > 2


def sequences(parts):
    return {tuple(tokens[mask].tolist()) for part in parts for tokens, mask in zip(part.tokens, part.mask)}


def test_held_out_demonstrations_are_never_trained_on(tiny_tokenizer):
    records = [Demonstration(f"Question {i}:", f" answer {i}" + "!" * (i % 5)) for i in range(40)]
    records += [Demonstration(f"Question {i}:", " another") for i in range(0, 40, 2)]  # the same prompts again
    config = SFTConfig(batch_size=5, held_out=0.25)
    batch_at, held_out = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=1)
    trained = sequences(batch_at(step) for step in range(40))
    kept = sequences(held_out)
    assert not trained & kept
    assert len(kept) == 15
    examples, _ = examples_from(tiny_tokenizer, records, CONTEXT)
    assert trained | kept == {tuple(example.tokens) for example in examples}
    question = tiny_tokenizer.encode(":")[-1]
    prompts = [{tokens[: tokens.index(question) + 1] for tokens in part} for part in (trained, kept)]
    assert not prompts[0] & prompts[1]
    everything, nothing = batches_of(
        records, tiny_tokenizer, CONTEXT, dataclasses.replace(config, held_out=0.0), seed=1
    )
    assert nothing == []
    assert len(sequences(everything(step) for step in range(12))) == 60


def test_held_out_texts_are_never_trained_on(tiny_tokenizer):
    records = [Text(chr(ord("A") + i) * 12) for i in range(20)]  # each text of a letter of its own
    config = SFTConfig(batch_size=8, block=5, held_out=0.2)
    batch_at, held_out = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=1)

    def letters(parts):
        return set("".join(tiny_tokenizer.decode(row.tolist()) for part in parts for row in part.tokens))

    kept = letters(held_out)
    assert len(kept) == 4
    assert letters(batch_at(step) for step in range(60)) == {chr(ord("A") + i) for i in range(20)} - kept


def test_of_one_long_text_the_end_is_held_out(tiny_tokenizer):
    text = "".join(f"{i} " for i in range(400))
    stream = token_stream(tiny_tokenizer, [text])
    config = SFTConfig(batch_size=4, block=7, held_out=0.1)
    batch_at, held_out = batches_of([Text(text)], tiny_tokenizer, CONTEXT, config, seed=0)
    n = int(0.1 * len(stream))
    beginning, end = stream[:-n].tolist(), stream[-n:]
    windows = torch.cat([part.tokens for part in held_out])
    assert torch.equal(windows.flatten(), end[: n // 8 * 8])
    assert [len(part.tokens) for part in held_out][:-1] == [4] * (len(windows) // 4)
    found = {tuple(beginning[i : i + 8]) for i in range(len(beginning) - 7)}
    for step in range(50):
        assert all(tuple(row) in found for row in batch_at(step).tokens.tolist())
    _, nothing = batches_of([Text(text)], tiny_tokenizer, CONTEXT, dataclasses.replace(config, held_out=0.0), seed=0)
    assert nothing == []


@pytest.mark.parametrize("records", [TEXTS, TEXTS[1:2]], ids=["texts", "one text"])
def test_in_pre_training_everything_counts_but_the_first_token(tiny, tiny_tokenizer, records):
    config = SFTConfig(batch_size=3, block=4, held_out=0.3)
    batch_at, held_out = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=0)
    model = tiny()
    assert held_out
    for part in (batch_at(0), held_out[0]):
        assert part.tokens.shape[1] <= 5
        assert torch.equal(part.response_mask[:, 1:], part.mask[:, 1:]) and not part.response_mask[:, 0].any()
        rows_now = [row[mask].tolist() for row, mask in zip(part.tokens, part.mask)]
        by_hand = sum(cross_entropy(model, row, first=1) for row in rows_now)
        torch.testing.assert_close(sft_loss(model, part), by_hand, rtol=1e-5, atol=1e-4)
        assert part.counted == sum(len(row) - 1 for row in rows_now)


@pytest.mark.parametrize("block", [0, 5, 500])
def test_texts_stay_apart_and_each_of_their_tokens_is_predicted_once(tiny, tiny_tokenizer, block):
    records = [Text(f"{i}: " + "a lamp " * i) for i in range(1, 18)]
    eot, limit = tiny_tokenizer.eot, min(block or 20, 20)
    whole = [[eot, *tiny_tokenizer.encode(record.text), eot] for record in records]
    assert max(map(len, whole)) > 21 > min(map(len, whole))
    expected = [tuple(w[i : i + limit + 1]) for w in whole for i in range(0, len(w) - 1, limit)]
    config = SFTConfig(batch_size=1, block=block, held_out=0.0)  # batches of one leave no remainder out of an epoch
    batch_at, _ = batches_of(records, tiny_tokenizer, 20, config, seed=0)
    epoch = [tuple(batch_at(step).tokens[0].tolist()) for step in range(len(expected))]
    assert sorted(epoch) == sorted(expected)
    assert sum(batch_at(step).counted for step in range(len(expected))) == sum(len(w) - 1 for w in whole)


def test_windows_are_never_wider_than_the_context(tiny, tiny_tokenizer):
    text = [Text("We will refund the lamp. " * 60)]
    for block, width in ((0, 21), (500, 21), (7, 8)):  # twenty are read, twenty predicted
        batch_at, _ = batches_of(text, tiny_tokenizer, 20, SFTConfig(batch_size=2, block=block), seed=0)
        assert batch_at(0).tokens.shape == (2, width)
    wide, _ = batches_of(text, tiny_tokenizer, CONTEXT, SFTConfig(batch_size=2), seed=0)
    sft_loss(tiny(), wide(0))  # fits the model


@pytest.mark.parametrize("length", [5, 64])  # 64 tokens make no window of 65, once a part of them is held out
def test_too_little_text_is_refused(tiny_tokenizer, length):
    records = [Text("!" * length, source="book.txt")]
    with pytest.raises(InputError) as caught:
        batches(records, tiny_tokenizer, CONTEXT, SFTConfig(held_out=0.1), seed=0)
    message = str(caught.value)
    assert message.startswith("book.txt: ") and "fewer than one sequence of 65" in message and "--block" in message


@pytest.mark.parametrize("records", [DEMONSTRATIONS, TEXTS, TEXTS[1:2]], ids=["demonstrations", "texts", "one text"])
def test_held_out_batches_are_no_larger_than_a_microbatch(tiny_tokenizer, records):
    config = SFTConfig(batch_size=6, microbatch_size=2, block=4, held_out=0.5)
    _, held_out = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=0)
    assert len(held_out) > 1
    assert max(len(part.tokens) for part in held_out) == 2


def test_records_that_are_cut_are_counted(tiny_tokenizer, capsys):
    records = [*DEMONSTRATIONS, Demonstration("Q", "no end in sight " * 40)]
    config = SFTConfig(batch_size=8, held_out=0.0)
    batch_at, _ = batches_of(records, tiny_tokenizer, CONTEXT, config, seed=0)
    assert f"1 of 8 records exceed {CONTEXT} tokens and were cut" in " ".join(capsys.readouterr().out.split())
    assert batch_at(0).tokens.shape == (8, CONTEXT)
    batches_of(DEMONSTRATIONS, tiny_tokenizer, CONTEXT, config, seed=0)
    assert "cut" not in capsys.readouterr().out


def test_the_held_out_loss_is_the_mean_over_all_tokens(tiny, tiny_tokenizer):
    model = tiny()
    examples, _ = examples_from(tiny_tokenizer, DEMONSTRATIONS, CONTEXT)
    total = sum(cross_entropy(model, e.tokens, e.start).item() for e in examples)
    mean = total / sum(len(e.tokens) - e.start for e in examples)
    for size in (1, 3, 7):  # batches with more and with fewer tokens weigh accordingly
        parts = [collate(examples[i : i + size], tiny_tokenizer.eot) for i in range(0, 7, size)]
        assert held_out_loss(model, parts) == pytest.approx(mean, rel=1e-5)


# --- training ---------------------------------------------------------------------------------------------------------

CONFIG = SFTConfig(steps=7, batch_size=3, lr=1e-2, warmup_steps=2, held_out=0.2, eval_every=3, block=10)


def train_tiny(folder, model, tokenizer, records=DEMONSTRATIONS, config=CONFIG, **kwargs):
    data = batches(records, tokenizer, CONTEXT, config, seed=5)
    return train(model, data, config, run_in(folder, config.steps, "train_sft.py", **kwargs))


@pytest.mark.parametrize("records", [DEMONSTRATIONS, TEXTS], ids=["demonstrations", "texts"])
def test_training_takes_two_nats_off_the_loss(tiny, tiny_tokenizer, tmp_path, records):
    config = SFTConfig(steps=50, batch_size=8, lr=2e-2, warmup_steps=5, held_out=0.0, block=16)
    metrics = train_tiny(tmp_path / "run", tiny(), tiny_tokenizer, records, config)
    logged = rows(tmp_path / "run")
    assert metrics["loss"] < logged[0]["loss"] - 2.0
    assert [row["step"] for row in logged] == list(range(50))
    assert [row["lr"] for row in logged] == [cosine_lr(step, 50, 2e-2, 5) for step in range(50)]
    assert not any("held_out_loss" in row for row in logged)


def test_held_out_loss_and_perplexity_come_when_they_should(tiny, tiny_tokenizer, tmp_path):
    model = tiny()
    metrics = train_tiny(tmp_path / "run", model, tiny_tokenizer)
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if "held_out_loss" in row] == [2, 5, 6]  # and at the end
    _, held_out = batches(DEMONSTRATIONS, tiny_tokenizer, CONTEXT, CONFIG, seed=5)
    assert metrics["held_out_loss"] == pytest.approx(held_out_loss(model, held_out), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["held_out_loss"]))


def test_bf16_trains_to_about_the_same(tiny, tiny_tokenizer, tmp_path):
    data = batches(DEMONSTRATIONS, tiny_tokenizer, CONTEXT, CONFIG, seed=5)
    found = []
    for dtype in ("fp32", "bf16"):
        model = tiny()
        model.run_with(dtype=dtype)
        found.append(train(model, data, CONFIG, run_in(tmp_path / dtype, CONFIG.steps)))
    full, half = found
    assert full["loss"] != half["loss"]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.05)


@pytest.mark.parametrize("records", [DEMONSTRATIONS, TEXTS], ids=["demonstrations", "texts"])
def test_the_same_seed_twice_gives_the_same_bits(tiny, tiny_tokenizer, tmp_path, records):
    one, two = tiny(), tiny()
    train_tiny(tmp_path / "one", one, tiny_tokenizer, records)
    torch.rand(3)  # the global generator plays no part
    train_tiny(tmp_path / "two", two, tiny_tokenizer, records)
    assert torch.equal(weights(one), weights(two))
    assert rows(tmp_path / "one") == rows(tmp_path / "two")
    assert not torch.equal(weights(one), weights(tiny()))


@pytest.mark.parametrize("dies_at", [1, 4, 6])
@pytest.mark.parametrize("records", [DEMONSTRATIONS, TEXTS], ids=["demonstrations", "texts"])
def test_a_killed_run_resumes_to_the_same_bits(tiny, tiny_tokenizer, tmp_path, records, dies_at):
    whole, killed, resumed = (
        tiny(),
        tiny(),
        tiny(seed=9),
    )  # what resumes starts from the checkpoint, not from its weights
    train_tiny(tmp_path / "whole", whole, tiny_tokenizer, records)
    with pytest.raises(Killed):
        train_tiny(tmp_path / "killed", killed, tiny_tokenizer, records, dies_at=dies_at)
    if dies_at < 2:  # before the first checkpoint
        resumed = tiny()
    train_tiny(tmp_path / "killed", resumed, tiny_tokenizer, records, resume=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(tiny, tiny_tokenizer, tmp_path, monkeypatch):
    whole = tiny()
    train_tiny(tmp_path / "whole", whole, tiny_tokenizer)
    original, calls = sft.sft_loss, []

    def nan_at_step_five(model, batch):
        calls.append(torch.is_grad_enabled())
        return original(model, batch) * (math.nan if sum(calls) == 6 else 1.0)

    monkeypatch.setattr(sft, "sft_loss", nan_at_step_five)
    model, out = tiny(), tmp_path / "run"
    with pytest.raises(InputError) as caught:
        train_tiny(out, model, tiny_tokenizer)
    message = str(caught.value)
    assert "loss became nan at step 5 of train_sft.py" in message
    assert f"the checkpoint of step 4 is kept in {out / 'state'}" in message
    assert all(p.isfinite().all() for p in model.parameters())  # the step was not taken
    kept = load_file(out / "state" / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 3, 4]

    monkeypatch.undo()
    resumed = tiny(seed=9)
    train_tiny(out, resumed, tiny_tokenizer, resume=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_gradient_that_is_not_a_number_stops_too_and_leaves_nothing_behind(tiny, tiny_tokenizer, tmp_path):
    model = tiny()
    before = weights(model)
    model.wte.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(InputError, match=r"gradient became \w+ at step 0 .*no checkpoint had been written yet"):
        train_tiny(tmp_path / "run", model, tiny_tokenizer)
    assert torch.equal(weights(model), before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("microbatch_size", -1), ("lr", 0.0), ("lr", -1e-3), ("lr", math.nan),
        ("lr", math.inf), ("warmup_steps", -1), ("weight_decay", -0.1), ("max_grad_norm", 0.0), ("block", -1),
        ("held_out", -0.1), ("held_out", 1.5), ("held_out", math.nan), ("eval_every", 0),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(field, value):
    with pytest.raises(InputError) as caught:
        SFTConfig(**{field: value})
    assert str(caught.value).startswith(f"--{field.replace('_', '-')} must ")
    assert str(caught.value).endswith(f"got {value}")
