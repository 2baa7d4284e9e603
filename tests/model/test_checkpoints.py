"""checkpoints: Hugging Face's files in and out, against transformers; in parts; from the hub; what cannot be loaded."""

import contextlib
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import HELPERS, python_path
from safetensors.torch import load_file, save_file
from test_gpt import CONFIG, EOT, rough, tokens_of
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from minirlhf import InputError
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.model.checkpoints import GPT2, INDEX, find_model, load_model, save_model
from minirlhf.model.generate import generate
from minirlhf.model.gpt import GPT, GPTConfig, ScalarModel, last_token, named_weights
from minirlhf.model.sampling import Sampling
from minirlhf.run.folder import load_run

ROOT = Path(__file__).resolve().parents[2]


def hf_config(**changes):
    shape = {"vocab_size": 61, "n_positions": 24, "n_layer": 3, "n_head": 4, "n_embd": 32}
    return GPT2Config(**{**shape, "bos_token_id": EOT, "eos_token_id": EOT, **changes})


@pytest.fixture(scope="module")
def gpt():
    return rough(GPT(CONFIG))


@pytest.fixture(scope="module")
def scalar():
    return rough(ScalarModel(CONFIG), seed=1)


@pytest.fixture
def saved(gpt, tmp_path):
    """A folder with a language model, to be damaged."""
    save_model(gpt, tmp_path / "run", EOT)
    return tmp_path / "run"


@pytest.fixture
def parts(tmp_path):
    """A GPT-2 in several files, as transformers writes what is large: the model, and its folder."""
    theirs = rough(GPT2LMHeadModel(hf_config()))
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    return theirs, tmp_path / "parts"


# --- against transformers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_theirs_loads_into_ours(tmp_path):
    theirs = rough(GPT2LMHeadModel(hf_config()))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = tokens_of(3, 24)
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_theirs_without_a_head_loads_too(tmp_path):
    theirs = rough(GPT2Model(hf_config()))  # OpenAI's own files lack the "transformer." prefix, as these do
    theirs.save_pretrained(tmp_path)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    tokens = tokens_of(2, 10)
    torch.testing.assert_close(load_model(tmp_path)(tokens), theirs(tokens).last_hidden_state, rtol=0, atol=1e-4)


@torch.no_grad()
def test_ours_opens_in_theirs(gpt, saved):
    theirs, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert isinstance(theirs, GPT2LMHeadModel)
    assert not any(report.values())  # nothing missing, unexpected or mismatched
    tokens = tokens_of(3, 24)
    torch.testing.assert_close(theirs.eval()(tokens).logits, gpt.logits(gpt(tokens)), rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == EOT
    assert theirs.dtype == torch.float32


@torch.no_grad()
def test_left_padding_is_as_theirs(gpt, saved):
    theirs = AutoModelForCausalLM.from_pretrained(saved).eval()
    tokens = tokens_of(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    want = theirs(tokens, attention_mask=mask.long(), position_ids=positions).logits
    torch.testing.assert_close(gpt.logits(gpt(tokens, mask))[mask], want[mask], rtol=0, atol=1e-4)


@torch.no_grad()
def test_their_scalar_model_loads_into_ours(tmp_path):
    theirs = rough(GPT2ForSequenceClassification(hf_config(num_labels=1)))
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, scalar=True)
    for length in (1, 7, 24):
        tokens = tokens_of(1, length, seed=length)
        torch.testing.assert_close(ours(tokens)[:, -1], theirs(tokens).logits[:, 0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_our_scalar_model_opens_in_theirs(scalar, tmp_path):
    save_model(scalar, tmp_path, EOT)
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, GPT2ForSequenceClassification)
    assert not any(report.values())
    for length in (1, 7, 24):
        tokens = tokens_of(1, length, seed=length)
        tokens[:, -1] = EOT  # the whole sequence counts, its end-of-text too
        torch.testing.assert_close(theirs.eval()(tokens).logits[:, 0], scalar(tokens)[:, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_scalar", [False, True])
def test_saved_and_loaded_is_the_same_to_the_bit(gpt, scalar, is_scalar, tmp_path):
    model = scalar if is_scalar else gpt
    save_model(model, tmp_path / "deep" / "run", EOT)
    again = load_model(tmp_path / "deep" / "run", scalar=is_scalar)
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name
    assert sorted(p.name for p in (tmp_path / "deep" / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_half_precision_files_load_as_float32(gpt, saved):
    weights = {name: tensor.half() for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors")
    again = load_model(saved)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(again.wte.weight, gpt.wte.weight.half().float())


# --- a run's folder in transformers -----------------------------------------------------------------------------------

TEXT = (
    "Straße, naïve café — “quoted”, 3,14 € and 1 000 000! I'm sure they'll say we've won.\n\n\n"
    "Съешь же ещё этих мягких французских булок, да выпей чаю.\tТаб.\n"
    "敏捷的棕色狐狸跳过了懒狗。いろはにほへと ちりぬるを。다람쥐 헌 쳇바퀴에 타고파.\n"
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣. דג סקרן שט בים. ऋषियों को सताने वाले दुष्ट राक्षसों।\n"
    "Zażółć gęślą jaźń; Đề nghị; e\u0301 = é; 👩‍👩‍👧‍👦🏳️‍🌈🇩🇪  \r\n \u00a0\u3000\u200b end\x00\x7f   "
)


@pytest.fixture(scope="module", params=[300, 320, 397])
def pair(request, tmp_path_factory):
    """Folders of a policy and of a reward model with a trained tokenizer; 320 alone is a multiple of 64."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizer = Tokenizer.train([TEXT] * 3, request.param)
    assert tokenizer.vocab_size == request.param
    config = GPTConfig(tokenizer.vocab_size, n_positions=48, n_layer=2, n_head=2, n_embd=32)
    for name, kind in (("policy", GPT), ("rm", ScalarModel)):
        model = rough(kind(config), seed=request.param)
        save_model(model, folder / name, tokenizer.eot)
        tokenizer.save(folder / name)
    return folder


@torch.no_grad()
def test_greedy_generation_is_theirs(pair):
    ours, tokenizer = load_run(pair / "policy")
    theirs = AutoModelForCausalLM.from_pretrained(pair / "policy").eval()
    auto = AutoTokenizer.from_pretrained(pair / "policy")
    prompts = [TEXT[start : start + 9] for start in range(0, 240, 12)]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    limits = [48 - len(row) for row in ids]
    drawn = generate(ours, ids, tokenizer.eot, limits, 0, Sampling(temperature=0.0))
    for prompt, row, limit, response, mask in zip(prompts, ids, limits, drawn.responses, drawn.mask):
        batch = auto(prompt, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == row
        with_prompt = theirs.generate(**batch, do_sample=False, max_new_tokens=limit, pad_token_id=tokenizer.eot)
        assert with_prompt[0, len(row) :].tolist() == response[mask].tolist()
    assert drawn.responses.unique().numel() > 20


@torch.no_grad()
def test_the_reward_models_scores_are_theirs(pair):
    ours, tokenizer = load_run(pair / "rm", scalar=True)
    theirs = AutoModelForSequenceClassification.from_pretrained(pair / "rm").eval()
    rows = [[*tokenizer.encode(TEXT[start : start + 20])[:40], tokenizer.eot] for start in range(0, 240, 25)]
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=tokenizer.eot)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    scores = last_token(ours(tokens, mask), mask)
    assert scores.std() > 0.1
    for row, score in zip(rows, scores):
        torch.testing.assert_close(theirs(torch.tensor([row])).logits[0, 0], score, rtol=0, atol=1e-4)
    # A batch of theirs needs a padding token, which must not be one of the text's.
    theirs.config.pad_token_id = next(i for i in range(tokenizer.vocab_size) if i not in tokens)
    padded = tokens.masked_fill(~mask, theirs.config.pad_token_id)
    got = theirs(padded, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(got, scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("older", [False, True])
def test_token_ids_are_theirs_both_ways(pair, tmp_path, older):
    """Their files read by us, ours by them; `older` = vocab.json and merges.txt in place of tokenizer.json."""
    folder = pair / "policy"
    theirs = AutoTokenizer.from_pretrained(folder)
    if older:
        shutil.copy(folder / "config.json", tmp_path)
        theirs.backend_tokenizer.model.save(str(tmp_path))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "merges.txt", "vocab.json"]
        folder, theirs = tmp_path, AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(folder)
    assert ours == Tokenizer.load(pair / "policy")
    long = TEXT * 20 + TEXT[::-1] + "".join(map(chr, (*range(0x3000), *range(0x1F300, 0x1F700))))
    ids = ours.encode(long)
    assert theirs(long)["input_ids"] == ids
    assert theirs.decode(ids) == ours.decode(ids) == long


# --- in parts ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_the_whole(parts, dtype):
    theirs, folder = parts
    theirs.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    tokens = tokens_of(3, 24)
    ours = load_model(folder)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    theirs = theirs.float()
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)
    theirs.save_pretrained(folder)  # one file beside the parts' index: transformers, too, reads the one
    for part in folder.glob("model-*"):
        part.unlink()
    assert torch.equal(load_model(folder).wte.weight, ours.wte.weight)


def read_index(folder):
    return json.loads((folder / INDEX).read_text())


def set_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({**read_index(folder), "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": null}', "no weight_map"),
        ('{"weight_map": {"transformer.wte.weight": 3}}', "no weight_map"),
        ('{"weight_map": {"transformer.wte.weight": "../model.safetensors"}}', "no weight_map"),
        ('{"weight_map": {"transformer.wte.weight": ""}}', "no weight_map"),
        ('{"weight_map": {}}', "tensor transformer.wte.weight is missing"),
    ],
)
def test_a_broken_index(parts, content, what):
    _, folder = parts
    (folder / INDEX).write_text(content)
    refused(folder, INDEX, what)


def test_a_part_that_is_missing_or_cut_off(parts):
    _, folder = parts
    part = sorted(folder.glob("model-*"))[2]
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    refused(folder, part.name, "cut off or damaged")
    part.unlink()
    refused(folder, f"{part} is missing, but {INDEX} lists it")


def test_a_tensor_that_its_part_does_not_hold(parts):
    _, folder = parts
    places = read_index(folder)["weight_map"]
    one, *_, other = sorted(set(places.values()))
    name = next(name for name, place in places.items() if place == one)
    set_index(folder, places | {name: other})
    refused(folder, f"{folder / other}: tensor {name} is not in it")
    del places[name]
    set_index(folder, places)
    refused(folder, f"{folder / INDEX}: tensor {name} is missing")


def test_a_part_of_another_shape(parts):
    _, folder = parts
    place = read_index(folder)["weight_map"]["transformer.h.1.mlp.c_fc.weight"]
    tensors = load_file(folder / place)
    for wrong in (torch.zeros(32, 64), torch.zeros(32), torch.zeros(32, 128, 1)):
        save_file(tensors | {"transformer.h.1.mlp.c_fc.weight": wrong}, folder / place)
        refused(
            folder, f"{folder / place}: transformer.h.1.mlp.c_fc.weight has shape", "config.json asks for (128, 32)"
        )
    save_file(tensors | {"transformer.h.1.mlp.c_fc.weight": torch.zeros(32, 128, dtype=torch.int8)}, folder / place)
    refused(folder, f"{folder / place}: transformer.h.1.mlp.c_fc.weight is stored as torch.int8")


@pytest.mark.parametrize("wide", [1, 3])
def test_loading_holds_one_model_and_a_tensor_more(tmp_path, wide):
    """Whether in one file or in parts, whether the file is as wide as the model or half of it."""
    script = """
import sys, torch
from implementations import peak_extra_bytes
from minirlhf.model.checkpoints import load_model
load_model(sys.argv[1] + "/small")
extra, model = peak_extra_bytes(lambda: load_model(sys.argv[1] + "/large"))
print(extra, sum(p.numel() for p in model.parameters()) * 4)
"""
    save_model(GPT(CONFIG), tmp_path / "small", EOT)
    config = {"vocab_size": 8000, "n_layer": 6, "n_embd": 384}
    theirs = GPT2LMHeadModel(hf_config(**config)).to(torch.float32 if wide == 1 else torch.bfloat16)
    theirs.save_pretrained(tmp_path / "large", max_shard_size="1GB" if wide == 1 else "10MB")
    environment = os.environ | python_path(ROOT, HELPERS, HELPERS.parent)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    extra, size = map(int, done.stdout.split())
    assert size <= extra < 1.6 * size


# --- the rows that pad the vocabulary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_padding_rows_are_not_in_the_file_and_come_back_as_zeros(kind, tmp_path):
    model = rough(kind(CONFIG))
    trunk = model if kind is GPT else model.trunk
    with torch.no_grad():
        trunk.wte.weight[CONFIG.vocab_size :] = 7.0
    save_model(model, tmp_path, EOT)
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].shape == (61, 32)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 61
    again = load_model(tmp_path, scalar=kind is ScalarModel)
    wte = (again if kind is GPT else again.trunk).wte.weight
    assert wte.shape == (64, 32)
    assert (wte[61:] == 0).all()
    assert all(
        torch.equal(a, b) for a, b in zip(named_weights(again).values(), named_weights(model).values(), strict=True)
    )


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, an empty working directory, and no network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache, name, folder):
    """A folder's files in the cache, where a download of `name` would have left them."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


@contextlib.contextmanager
def hub(repositories, monkeypatch):
    """A hub of our own on this machine, {name: folder}; which files it was asked for."""
    commit, asked = "89abcdef0123456789abcdef0123456789abcdef", []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models")
            name = next((name for name in repositories if path.startswith(f"/{name}/")), None)
            if name is None:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            kind, _, rest = path.removeprefix(f"/{name}/").partition("/")
            files = sorted(repositories[name].iterdir())
            if kind == "revision":
                return self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": []}).encode(), {})
            if kind == "tree":
                listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                return self.answer(200, json.dumps(listed).encode(), {})
            file = rest.removeprefix(f"{commit}/")
            if self.command == "GET":
                asked.append(file)
            content = (repositories[name] / file).read_bytes()
            return self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{file}"'})

        do_HEAD = do_GET

        def answer(self, status, content, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        here, form = f"http://127.0.0.1:{server.server_port}", "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", here + form)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def find_refused(name, *parts):
    """find_model must refuse the name in one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        find_model(name)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(name), "; ", *parts):
        assert part in message, message


def nowhere(*_, **__):
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize("name", [*GPT2, "somebody/a-gpt2.v1_x"])
def test_a_model_of_the_hub_is_downloaded_once(cache, tiny_run, monkeypatch, name):
    folder = cache.parent / "repository"
    shutil.copytree(tiny_run, folder)
    for other in ("README.md", "pytorch_model.bin", "tf_model.h5", "model.onnx", "generation_config.json"):
        (folder / other).write_text("large")
    with hub({name: folder}, monkeypatch) as asked:
        model, tokenizer = load_run(name)
        assert sorted(asked) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        load_run(Path(name))  # as some commands give it
        assert len(asked) == 4
    assert torch.equal(model.wte.weight, load_model(tiny_run).wte.weight)
    assert tokenizer == Tokenizer.load(tiny_run)
    for offline in (False, True):  # the hub is gone; then nobody even asks for it
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert find_model(name).is_relative_to(cache)
    assert not list(Path().iterdir())


def test_parts_and_the_older_tokenizer_come_from_the_hub_too(cache, parts, monkeypatch):
    _, folder = parts
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with hub({"a/b": folder}, monkeypatch) as asked:
        found = find_model("a/b")
    assert sorted(p.name for p in found.iterdir()) == sorted(
        p.name for p in folder.iterdir() if p.name != "generation_config.json"
    )
    assert sorted(set(asked)) == sorted(p.name for p in found.iterdir())
    assert torch.equal(load_model(found).wte.weight, load_model(folder).wte.weight)


def test_another_architecture_is_not_downloaded(cache, saved, monkeypatch):
    set_config(saved, model_type="llama")
    with hub({"a/llama": saved}, monkeypatch) as asked, pytest.raises(InputError) as caught:
        find_model("a/llama")
    assert asked == ["config.json"]
    assert "models--a--llama" in str(caught.value)
    assert "model_type is 'llama', but only 'gpt2' can be loaded; " in str(caught.value)


def test_a_repository_without_safetensors(cache, saved, monkeypatch):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with hub({"a/old": saved}, monkeypatch) as asked:
        find_refused("a/old", "no weights in safetensors format")
    assert asked == ["config.json"]


def test_a_name_that_the_hub_does_not_have(cache, saved, monkeypatch):
    with hub({"a/b": saved}, monkeypatch):
        find_refused("a/bb", "no such folder, and the hub has no such model for you; check the name")
    find_refused("a/b--c", "no such folder, and the hub has no such model for you; check the name")


@pytest.mark.parametrize("name", ["gpt2", "a/b"])
def test_no_network_and_nothing_cached(cache, monkeypatch, name):
    unreachable = "no such folder, and the hub cannot be reached, nor is all of it in its cache; connect to the network"
    find_refused(name, unreachable, "or give a local folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    find_refused(name, unreachable, "or give a local folder")


def test_a_download_that_breaks_off(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left\non device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    find_refused("gpt2", "cannot be downloaded (OSError: [Errno 28] No space left on device)")


def test_a_snapshot_of_which_only_a_part_was_downloaded(cache, saved, monkeypatch):
    with hub({"a/b": saved}, monkeypatch):
        found = find_model("a/b")
    (found / "model.safetensors").unlink()
    find_refused("a/b", "nor is all of it in its cache")


def test_huggingface_hub_is_not_installed(cache, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    find_refused("gpt2", "models of the hub need huggingface_hub", "pip install 'minirlhf[hf]'")
    assert find_model(saved) == saved


@pytest.mark.parametrize("name", ["gpt2", "a/b"])
def test_a_local_folder_wins(cache, saved, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    shutil.copytree(saved, name)
    for given in (name, Path(name), Path.cwd() / name):
        assert find_model(given) == Path(given)
        load_model(find_model(given))


@pytest.mark.parametrize(
    "name",
    ["sfft", "gpt3", "gpt2 ", "./gpt2", "gpt2/", "runs/sft", "mine/sft", "a/b/c", "/a/b", "../b", "~/b", "a/", "/b",
     "-a/b", "", "a b/c", "ä/b", "C:\\gpt2"],
)  # fmt: skip
def test_what_is_no_name_of_the_hub_never_goes_there(cache, monkeypatch, name):
    """A slip of the pen in a path, above all: `mine` is a folder here, without an `sft` in it."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    Path("mine").mkdir()
    assert find_model(name) == Path(name)
    if name:
        with pytest.raises(
            InputError, match="no such folder; name a run, or any folder in Hugging Face's GPT-2 format"
        ):
            load_run(name)


def test_a_cached_model_is_all_that_a_command_needs(cache, tiny_run):
    """In a process of its own, through the variables that huggingface_hub reads."""
    put(cache, "gpt2", tiny_run)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)} | python_path(ROOT)
    Path("data.jsonl").write_text("".join(f'{{"text": "book {i}"}}\n' for i in range(8)))
    command = [ROOT / "train_sft.py", "--data", "data.jsonl", "--init", "gpt2", "--out", "out", "--steps", "1"]
    command += ["--device", "cpu", "--kernel", "reference", "--batch-size", "2"]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_run("out")[0].config == load_model(tiny_run).config
    assert json.loads(Path("out/run.json").read_text())["arguments"]["init"] == "gpt2"


# --- what cannot be loaded --------------------------------------------------------------------------------------------


def refused(folder, *parts, scalar=False):
    """load_model must refuse the folder in one line that holds all `parts`."""
    with pytest.raises(InputError) as caught:
        load_model(folder, scalar=scalar)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in parts:
        assert part in message


def set_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folder(tmp_path):
    refused(tmp_path / "nothing", "no such folder")


def test_missing_config(saved):
    (saved / "config.json").unlink()
    refused(saved, "config.json is missing")


def test_missing_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors is missing")


@pytest.mark.parametrize("share", [0.0, 0.00005, 0.01, 0.5, 0.999])
def test_cut_off_weights(saved, share):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(saved, "model.safetensors", "cut off or damaged")


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth", "model.pkl"])
def test_a_pickle_instead_of_the_weights(saved, tmp_path, name):
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps({"wte.weight": Bomb(tmp_path / "exploded")}))
    refused(saved, name, "pickled weights are refused", "model.safetensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5, "torch", "torch legacy"])
def test_a_pickle_named_as_the_weights(saved, tmp_path, protocol):
    path, content = saved / "model.safetensors", {"wte.weight": Bomb(tmp_path / "exploded")}
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "torch")
    refused(saved, "model.safetensors", "damaged" if protocol == 0 else "holds a pickle")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", None])
def test_another_architecture(saved, kind):
    set_config(saved, model_type=kind)
    refused(saved, "config.json", f"model_type is {kind!r}")


@pytest.mark.parametrize("content", ["{", "[]", '"gpt2"', "", "null"])
def test_a_broken_config(saved, content):
    (saved / "config.json").write_text(content)
    refused(saved, "config.json")


def test_a_config_of_binary_bytes(saved):
    (saved / "config.json").write_bytes(b"\xff\xfe\x00{")
    refused(saved, "config.json", "not valid JSON")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 48}, "n_inner is 48"),
        ({"n_layer": "many"}, "the model's shape is not there"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"n_head": 5}, "n_head must divide n_embd"),
    ],
)
def test_another_gpt2(saved, changes, what):
    set_config(saved, **changes)
    refused(saved, "config.json", what)


def test_a_config_without_the_shape(saved):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    del config["n_embd"]
    path.write_text(json.dumps(config))
    refused(saved, "config.json", "n_embd")


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"n_embd": 64}, "wte.weight"), ({"n_positions": 48}, "wpe.weight"), ({"vocab_size": 62}, "wte.weight")],
)
def test_shapes_that_do_not_fit(saved, changes, name):
    set_config(saved, **changes)
    refused(saved, "model.safetensors", f"transformer.{name} has shape", "config.json asks for")


def test_a_tensor_too_few(saved):
    set_config(saved, n_layer=4)
    refused(saved, "model.safetensors", "transformer.h.3.", "is missing")


def test_language_model_and_reward_model_are_not_mixed_up(saved, scalar, tmp_path):
    refused(saved, "a language model, not a reward model", scalar=True)
    save_model(scalar, tmp_path / "rm", EOT)
    refused(tmp_path / "rm", "a reward model, not a language model")


def test_a_classifier_with_two_labels_is_refused(tmp_path):
    GPT2ForSequenceClassification(hf_config(num_labels=2)).save_pretrained(tmp_path)
    refused(tmp_path, "score.weight has shape (2, 32)", scalar=True)


def test_a_failed_save_leaves_the_old_files(gpt, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(weights, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("minirlhf.model.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(rough(GPT(CONFIG), seed=9), saved, EOT)
    assert all((saved / name).read_bytes() == content for name, content in before.items())
    assert torch.equal(load_model(saved).wte.weight, gpt.wte.weight)


def test_a_copied_folder_is_as_good(gpt, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    assert torch.equal(load_model(str(tmp_path / "copy")).wte.weight, gpt.wte.weight)
