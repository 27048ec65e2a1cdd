"""The model `unmask` of lm-evaluation-harness: real tasks of the real package, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import string
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import unmask
from tests.helpers import SMALL, tiny_policy
from tests.oracles import elbo_dp
from tests.test_api import table
from unmask.cli import main
from unmask.errors import ConfigError, DataError, ModelError
from unmask.models import TinyModelConfig, build_tiny

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-evaluation-harness is not installed: make test-all installs it, or pip install 'unmask[lm-eval]'",
)
if importlib.util.find_spec("lm_eval") is not None:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from unmask.harness import UnmaskLM, cut

QUESTIONS = {"2+3?": "2+3=5\n#### 5", "4+4?": "4+4=8\n#### 8"}
ALPHABET = "".join(sorted(set("Question: \nAnswer:0123456789+=?#|xyz")))

GENERATION = """
task: own_gsm8k
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/rows.jsonl, test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
output_type: generate_until
test_split: test
fewshot_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: " {{{{answer}}}}"
generation_kwargs:
  until: ["Question:", "</s>"]
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
"""

CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["2+3=5\\n#### 5", "4+4=8\\n#### 8", "xyz"]
doc_to_target: "{{{{gold}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An embedded model that has learned both answers."""
    folder = tmp_path_factory.mktemp("harness")
    build_tiny(TinyModelConfig(alphabet=ALPHABET, hidden_size=32, num_layers=2, max_length=80), seed=0).save(
        folder / "base"
    )
    rows = [{"prompt": f"Question: {q}\nAnswer:", "completion": f" {a}"} for q, a in QUESTIONS.items()]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"path": str(folder / "base")},
        "data": {"file": str(folder / "sft.jsonl"), "batch_size": 8, "gen_length": 16},
        "trainer": {"num_batches": 80},
        "optimizer": {"lr": 1e-2},
    }
    unmask.sft(recipe, output=folder / "run")
    return str(folder / "run")


@pytest.fixture
def tasks(tmp_path):
    """A folder with three rows in GSM8K's format, the last with a wrong reference, and two tasks on them."""
    rows = [{"question": q, "answer": a, "gold": n} for n, (q, a) in enumerate(QUESTIONS.items())]
    rows.append({"question": "4+4?", "answer": "4+4=9\n#### 9", "gold": 2})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generation", GENERATION), ("choice", CHOICE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path))
    return tmp_path


def evaluate(model, tasks, name, *, batch_size=2, **settings):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"pretrained": model, **settings}
    options = {"task_manager": manager, "batch_size": batch_size, "device": "cuda:0", "bootstrap_iters": 0}
    return simple_evaluate("unmask", arguments, tasks=[name], **options)


def requests(kind, *rows, task="t"):
    return [Instance(kind, {}, row, n, metadata=(task, n, 1)) for n, row in enumerate(rows)]


@needs_harness
def test_a_gsm8k_task_is_generated_and_judged(model, tasks):
    results = evaluate(model, tasks, "own_gsm8k", gen_length=16, num_steps=8, block_length=8)
    assert results["results"]["own_gsm8k"]["exact_match,none"] == pytest.approx(2 / 3)
    samples = results["samples"]["own_gsm8k"]
    expected = [" 2+3=5\n#### 5", " 4+4=8\n#### 8", " 4+4=8\n#### 8"]
    assert [sample["resps"][0][0] for sample in samples] == expected
    assert results["config"]["sampler_settings"] == {"gen_length": 16, "num_steps": 8, "block_length": 8}


@needs_harness
def test_a_choice_is_the_one_with_the_largest_bound(model, tasks):
    results = evaluate(model, tasks, "own_choice", num_masks=16, seed=3)
    row = results["results"]["own_choice"]
    assert row["acc,none"] == row["exact_match,none"] == pytest.approx(2 / 3)
    prompt, choices = "Question: 2+3?\nAnswer:", [" 2+3=5\n#### 5", " 4+4=8\n#### 8", " xyz"]
    bounds = unmask.elbo(model, [prompt] * 3, choices, num_masks=16, seed=3).tolist()
    first = [response[0] for response in results["samples"]["own_choice"][0]["resps"]]
    assert [value for value, _ in first] == pytest.approx(bounds, abs=1e-5)
    assert [greedy for _, greedy in first] == [True, False, False]


@needs_harness
@pytest.mark.slow
def test_the_command_runs_the_task_as_a_process(model, tasks):
    arguments = f"pretrained={model},gen_length=16"
    line = ["--model", "unmask", "--model_args", arguments, "--tasks", "own_gsm8k", "--include_path", str(tasks)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "unmask", "lm_eval", *line, "--output_path", str(tasks / "out"), "--batch_size", "4"],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "0.6667" in done.stdout
    (file,) = (tasks / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["own_gsm8k"]["exact_match,none"] == pytest.approx(2 / 3)
    line[3] = f"pretrained={model},gen_lenght=16"
    done = subprocess.run(
        [sys.executable, "-m", "unmask", "lm_eval", *line], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 2 and "sampler.gen_lenght" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@needs_harness
@pytest.mark.parametrize("code", ["import unmask, lm_eval.models", "import lm_eval.models, unmask"])
def test_the_registry_knows_the_model_whatever_is_imported_first(code):
    code += "\nfrom lm_eval.api.registry import model_registry as r\nassert 'hf' in r and 'unmask' in r"
    code += "\nimport sys\nassert 'torch' not in sys.modules or 'unmask.harness' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_the_package_the_command_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm_eval", "--model", "unmask"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'unmask[lm-eval]'" in error and error.count("\n") == 1


# ---- likelihoods


@needs_harness
def test_likelihoods_are_those_of_elbo_and_estimate_the_exact_bound(model):
    rows = [("2+3?", "5"), ("4", "+4=")]
    exact = torch.stack([elbo_dp(table(*row, policy=unmask.load(model + "/model")).double()) for row in rows])
    draws = []
    for seed in range(12):
        lm = UnmaskLM(model, num_masks=32, seed=seed, batch_size=64)
        found = lm.loglikelihood(requests("loglikelihood", *rows))
        expected = unmask.elbo(model, *zip(*rows, strict=True), num_masks=32, seed=seed)
        assert [value for value, _ in found] == expected.tolist()
        draws.append(expected)
    values = torch.stack(draws)
    assert ((values.mean(0) - exact).abs() <= 4 * values.std(0) / 12**0.5 + 1e-5).all()
    assert values.std(0)[1] > 1e-3  # two masked tokens may be any two


@needs_harness
def test_greedy_is_what_the_sampler_writes(tmp_path):
    letters = "0123456789|" + string.ascii_letters  # so many that random texts hold few special tokens
    tiny_policy(dtype=torch.float32, config=replace(SMALL, alphabet=letters)).save(tmp_path)
    lm = UnmaskLM(str(tmp_path), num_masks=2, batch_size=5)
    contexts = [f"{n}|" for n in range(40)]
    for length in (1, 5):
        written = unmask.sample(str(tmp_path), contexts, gen_length=length)
        rows = [(context, text) for context, text in zip(contexts, written, strict=True) if len(text) == length]
        found = lm.loglikelihood(requests("loglikelihood", *rows))
        assert len(rows) > 4 and all(greedy for _, greedy in found)
        others = [(context, text[:-1] + ("1" if text[-1] == "2" else "2")) for context, text in rows]
        assert not any(greedy for _, greedy in lm.loglikelihood(requests("loglikelihood", *others)))
    assert unmask.sample(str(tmp_path), contexts, gen_length=5, num_steps=1) != written  # the steps matter


@needs_harness
def test_rolling_likelihoods_add_up_over_parts_that_fit(model):
    lm = UnmaskLM(model, num_masks=4, batch_size=16)
    long = "2+3=5 " * 40
    parts = lm.parts(long)
    assert "".join(parts) == long and len(parts) >= 4
    assert all(len(part) < 80 for part in parts) and all(part.startswith(" ") for part in parts[1:])
    assert len(lm.parts("5" * 200)) >= 3 and "".join(lm.parts("5" * 200)) == "5" * 200
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("4+4",), (long,), ("",)))
    texts = ["4+4", *parts]
    expected = unmask.elbo(model, ["<|eos|>"] * len(texts), texts, num_masks=4).tolist()
    assert found == [expected[0], pytest.approx(sum(expected[1:])), 0.0]
    assert lm.loglikelihood(requests("loglikelihood", ("", "4+4")))[0][0] == pytest.approx(expected[0])


# ---- completions


@needs_harness
def test_completions_depend_on_no_batch_size_and_no_other_task(model):
    def generate(batch_size, *more):
        lm = UnmaskLM(model, temperature=8.0, gen_length=8, batch_size=batch_size)
        own = [("2", {"until": ["x"]})] * 6
        every = [*more, *requests("generate_until", *own)]
        return lm.generate_until(every)[len(more) :]

    first = generate(1)
    assert len(set(first)) > 1  # repeats of a prompt get noise of their own
    other = requests("generate_until", ("4+4", {"until": ["x"]}), task="other")
    assert generate(4) == generate(64, *other) == first
    assert not any("x" in text for text in first)


@needs_harness
def test_the_users_settings_go_before_the_tasks(model, caplog):
    def settings(asked, **given):
        return UnmaskLM(model, **given).decoder(asked)

    assert settings({}).gen_length == 256
    assert settings({"max_gen_toks": 32, "do_sample": True, "temperature": 0.7}).gen_length == 32
    assert settings({"do_sample": True, "temperature": 0.7}).temperature == 0.7
    assert settings({"do_sample": False, "temperature": 0.7, "top_p": 0.9}).temperature == 0
    assert settings({"max_gen_toks": 32, "temperature": 0.0}, gen_length=16, temperature=0.3).gen_length == 16
    assert settings({"temperature": 0.0}, temperature=0.3).temperature == 0.3
    assert settings({"top_p": 0.5, "do_sample": True}, sampler="dream").top_p == 0.5
    assert not caplog.records
    settings({"top_p": 0.5, "do_sample": True})
    assert "top_p = 0.5 of the task is not used" in caplog.text


@needs_harness
def test_a_completion_is_cut_before_the_first_stop_text():
    assert cut("a b\nc", ["\n", "b"]) == "a "
    assert cut("a b", ["x", ""]) == "a b" and cut("a b", []) == "a b"


@needs_harness
def test_a_chat_goes_through_the_models_template(model):
    lm = UnmaskLM(model)
    chat = [{"role": "user", "content": "2+3?"}]
    assert lm.apply_chat_template(chat) == "<|user|>2+3?<|eot|><|assistant|>"
    begun = [*chat, {"role": "assistant", "content": "5"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "<|user|>2+3?<|eot|><|assistant|>5"
    assert "add_generation_prompt" in lm.chat_template(True)
    with pytest.raises(ConfigError, match="one chat template"):
        lm.chat_template("rag")
    lm.policy.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        lm.apply_chat_template(chat)


# ---- real text, bad input


@needs_harness
def test_published_problems_run_through(data_dir, tmp_path):
    lines = (data_dir / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    prompts = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_length": 600}
    build_tiny(TinyModelConfig(alphabet="".join(sorted(set("".join(prompts)))), **sizes), seed=0).save(tmp_path)
    lm = UnmaskLM(str(tmp_path), num_steps=4, batch_size=2, num_masks=4)
    found = lm.generate_until(requests("generate_until", *[(prompt, {"max_gen_toks": 32}) for prompt in prompts]))
    assert len(found) == 3 and all(len(text) <= 32 for text in found)
    halves = [lm.parts(prompt) for prompt in prompts]
    rolled = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *[(prompt,) for prompt in prompts]))
    assert all(len(parts) == 1 for parts in halves) and all(value < -10 for value in rolled)


@needs_harness
@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"gen_lenght": 3}, ConfigError, "unknown key sampler.gen_lenght"),
    ({"sampler": "beam"}, ConfigError, "unknown sampler 'beam'"),
    ({"block_length": 5}, ConfigError, "must divide"), ({"num_masks": 3}, ConfigError, "num_masks = 3"),
    ({"coupled": "maybe"}, ConfigError, "coupled = 'maybe'"), ({"seed": "x"}, ConfigError, "seed = 'x'"),
    ({"batch_size": "auto"}, ConfigError, "batch_size = auto"), ({"device": "moon"}, ConfigError, "device = 'moon'"),
    ({"pretrained": "nowhere"}, ModelError, "no config.json there"),
])  # fmt: skip
def test_wrong_settings_are_refused_in_one_line(model, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        UnmaskLM(**{"pretrained": model, **settings})
    assert "\n" not in str(caught.value)


@needs_harness
def test_what_does_not_fit_or_cannot_be_read_is_refused(model, monkeypatch):
    lm = UnmaskLM(model, gen_length=64)
    for context, message in (("5" * 30, "exceeds the 80 positions"), ("é", "not in the model's vocabulary")):
        with pytest.raises(DataError, match=message):
            lm.generate_until(requests("generate_until", (context, {})))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes"):
        UnmaskLM(model)
