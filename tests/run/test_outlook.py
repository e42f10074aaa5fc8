"""What a dry run says a run will take: steps, memory, disk and time."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from families import DENSE, EXPERTS
from run_helpers import TINY, dump, settings
from tokenizer_kinds import gpt2_tokenizer

import train_bilevel
from bilevel.memory.plan import plan
from bilevel.run import outlook, pace
from bilevel.settings.fields import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), gpt2_tokenizer()
    shape = transformers.AutoConfig.for_model(**TINY | {"vocab_size": len(tokenizer)})
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch):
    """Each kind of pass is measured once and not for seconds: no test here judges a time that was measured."""
    monkeypatch.setattr(pace, "ROUNDS", (1, 1))
    monkeypatch.setattr(pace, "LONG", 0.0)


@pytest.fixture
def dry(data: Path, tmp_path: Path, folder: Path, capsys):
    """dry(words, setting=value): the exit code of a dry run, its comment lines, and its errors."""

    def run(*words: str, **changes) -> tuple[int, str, str]:
        changes = {"model_config": None, "model_name_or_path": str(folder)} | changes
        code = train_bilevel.main([*settings(data, tmp_path / "r", **changes), "--dry_run", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_new_model_has_steps_and_records(dry, data: Path):
    code, said, _ = dry(model_config=TINY, model_name_or_path=None)
    first, second, machine, *_ = said.splitlines()
    assert code == 0 and "# memory and time: those of a new, small model are told after its first step" in said
    assert first == "# 6 steps of 16 training and 16 validation records: each of 192 training records is read 0.5 times"
    records = [json.loads(file.read_text()) for file in data.glob("train_*.json")]
    texts = [r["instruction"] + r["input"] + r["output"] for each in records for r in each]
    about = int(re.fullmatch(r"# records: train 192, val 96, test 16; about (\d+) tokens each", second)[1])
    assert 0.8 < about / (sum(map(len, texts)) / len(texts) / 4) < 2  # the prompt around them counts, too
    assert re.fullmatch(
        r"# this machine: .+, \d+ cores; .+ [MG]B of .+ GB of memory are free, and .+ GB of .+", machine
    )


def test_epochs_become_steps(dry):
    _, said, _ = dry(model_config=TINY, model_name_or_path=None, max_steps=None, epochs=2)
    assert said.startswith(
        "# 24 steps of 16 training and 16 validation records: each of 192 training records is read 2 "
    )


def test_pieces_of_texts_are_counted(dry, tmp_path: Path):
    """40 texts of 90,000 characters, in pieces of 128 tokens: about 7,000 samples."""
    dump(tmp_path / "t" / "a.json", [{"text": "the quick " * 9000}] * 20)
    dump(tmp_path / "t" / "b.json", [{"text": "the quick " * 9000}] * 20)
    texts = {"train_data": [str(tmp_path / "t" / "*.json")], "max_steps": None, "epochs": 1}
    _, said, _ = dry(model_config=TINY, model_name_or_path=None, **texts)
    steps, samples = re.match(
        r"# about (\d+) steps of 16 .* each of ([\d,]+) training samples is read 1 times", said
    ).groups()
    assert int(samples.replace(",", "")) == round(900_000 / 4 / 128 * 2) * 2 and abs(int(steps) * 16 - 7031) < 16
    assert "records: train 40, val 96, test 16, which are cut into samples of max_length; about 128 tokens each" in said


def test_a_model_on_this_cpu_has_memory_disk_and_time(dry, tmp_path: Path):
    code, said, _ = dry()
    memory = re.search(r"^# memory: about (.+) of (.+) on 1 CPU process, which fits$", said, re.M)
    assert code == 0 and memory and re.search(r"^# disk: [\d.]+ [MG]B$", said, re.M)
    line = r"^# time: about .+: .+ for 6 steps of .+, .+ for 3 evaluations on .+ \(by one block .+\)$"
    assert re.search(line, said, re.M)
    assert "GPU" not in said and "# as by default" not in said and not (tmp_path / "r").exists()


def test_all_settings_and_the_plan_are_asked_for(dry):
    _, said, _ = dry("-v")
    assert "# as by default" in said and "# memory plan (GB = 1e9 bytes) for 1 CPU process: " in said
    assert "fits the " in said and "per GPU" not in said and "CUDA" not in said


def test_a_run_that_does_not_fit_this_machine_is_refused(dry, monkeypatch):
    free = SimpleNamespace(available=10**6, total=2 * 10**6)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    code, said, error = dry()
    assert code == 2 and "IT DOES NOT FIT" in said and "gradient_checkpointing true: saves" in said
    assert error == "error: the run does not fit; the lines above name what would help\n"


def test_a_disk_that_is_too_small_is_named(dry, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert "MORE THAN THE 0 MB THAT ARE FREE" in dry()[1]


def test_a_check_before_several_processes_says_nothing(dry, data: Path, monkeypatch):
    """The run itself says it again."""
    own = ("--train_data", str(data / "train_*.json"))
    assert dry(*own)[2].startswith("note: not given beside train_data")
    monkeypatch.setenv("BILEVEL_FILES_ONLY", "1")
    assert dry(*own, gpu_memory_gib=1e-3) == (0, "", "")
    assert dry(train_data=["nowhere.json"])[0] == 2


def test_a_plan_for_a_gpu_has_no_time(dry):
    _, said, _ = dry(gpu_memory_gib=24)
    assert re.search(r"^# memory: about .+ of 25.8 GB on 1 GPU, which fits$", said, re.M)
    assert "# time: not estimated, which needs one process on the machine of the run" in said


def test_time_is_that_of_all_tokens_of_all_passes(dry, monkeypatch):
    """6 steps of 16 rows for u and w each, and of 16 validation rows; 3 evaluations of u and w on 16 records."""
    monkeypatch.setattr(pace, "measure", lambda *given: pace.Pace(training=1.0, reading=0.1))
    monkeypatch.setattr(outlook._Part, "of", lambda sources, longest: outlook._Part(16 * len(sources), 16, 10))
    steps, test = 6 * (2 * 16 + 16) * 10, 3 * 2 * 16 * 10 * 0.1
    assert (steps, test) == (48 * 60, 96)
    assert "# time: about 50 min: 48 min for 6 steps of 8 min, 96 s for 3 evaluations on the test" in dry()[1]
    assert 6 * (2 * 16 + 2 * 16) * 10 == 64 * 60 and "time: about 1 h 06 min: 1 h 04 min for 6" in dry(order=2)[1]


# ----------------------------------------------------------------------------------------------------------------------
# the pace


def shape_of(numbers: dict) -> transformers.PretrainedConfig:
    return transformers.AutoConfig.for_model(**numbers)


@pytest.mark.parametrize(
    "numbers",
    [
        TINY | {"n_layer": 5},
        {"model_type": "llama", "num_hidden_layers": 5} | {k: v for k, v in DENSE.items() if k != "num_hidden_layers"},
        {"model_type": "gemma2", "head_dim": 16, "num_key_value_heads": 2} | DENSE | {"num_hidden_layers": 5},
        {"model_type": "qwen3_moe"} | EXPERTS | {"num_hidden_layers": 5},
    ],
    ids=["gpt2", "llama", "gemma2", "qwen3_moe"],
)
def test_what_is_measured_are_the_first_blocks_of_the_model(numbers: dict):
    given = Settings(train_data=["a"], val_data=["b"], model_config=numbers, max_length=32)
    short = pace._model(given, shape_of(numbers), 2)
    whole = transformers.AutoModelForCausalLM.from_config(shape_of(numbers))
    sizes = {name: p.shape for name, p in whole.named_parameters() if not re.search(r"\.[234]\.", name)}
    assert {name: p.shape for name, p in short.named_parameters()} == sizes
    assert pace.measure(given, shape_of(numbers), "fp32", 16).training > 0


def test_blocks_count_as_often_as_the_model_has_them(monkeypatch):
    """One block takes 3 s forward and backward and 1 s forward; everything else 5 s and 2 s; 64 tokens."""
    monkeypatch.setattr(pace, "_seconds", lambda s, shape, blocks, *rest: (5 + 3 * blocks, 2 + blocks))
    given = Settings(train_data=["a"], val_data=["b"], model_config=TINY, max_length=32, micro_batch_tokens=64)
    found = pace.measure(given, shape_of(TINY | {"n_layer": 7}), "fp32", 16)
    assert found == pace.Pace((5 + 7 * 3) / 64, (2 + 7) / 64)


def test_blocks_too_large_for_this_machine_are_not_made(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**5))
    given = Settings(train_data=["a"], val_data=["b"], model_config=TINY, max_length=32)
    assert pace.measure(given, shape_of(TINY), "fp32", 16) is None


def test_with_adapters_only_they_train():
    given = Settings(train_data=["a"], val_data=["b"], model_config=TINY, max_length=32, lora_rank=2)
    names = [name for name, p in pace._model(given, shape_of(TINY), 2).named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# the plan on a CPU


def test_on_a_cpu_a_process_has_no_cuda_and_its_memory_is_the_hosts():
    given = Settings(train_data=["a"], val_data=["b"], model_config=TINY, max_length=32)
    gpu = plan(given, shape_of(TINY), 2, "fp32")
    cpu = plan(given, shape_of(TINY), 2, "fp32", cpu_memory=1e9)
    assert gpu.total - cpu.total == pytest.approx(1.5e9 - 0.7e9) and cpu.fits and gpu.fits is None
    assert cpu.host["processes"] == 2 * cpu.total and cpu.host.keys() == gpu.host.keys()
    assert not plan(given, shape_of(TINY), 2, "fp32", cpu_memory=1e6).fits
