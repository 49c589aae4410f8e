"""The command line: every kind of bad input is one line and exit status 2, and nothing is written;
plans, ledgers, tokenised shards and generated text from real runs."""

import json
import os
import pathlib

import pytest
from ledgers import done, header, write
from runs import train, write_config

from moejax import cli

# Setting, and what the one line has to say: the field, the value, the remedy.
BAD_SETTINGS = {
    "misspelt field": ("moe.num_expert=4", "moe.num_expert", "did you mean 'num_experts'?"),
    "misspelt block": ("optmi.learning_rate=1.0", "optmi", "did you mean 'optim'?"),
    "unknown router": ("router.name=remo", "router.name", "did you mean 'remoe'?"),
    "leaking router": ("router={'name': 'expert_choice'}", "router.name", "moe.allow_leak = True"),
    "rule without a bias": (
        "router={'name': 'hash', 'bias_rule': 'sign'}",
        "router.bias_rule",
        "no selection bias",
    ),
    "loss weight below zero": ("router.z_loss_weight=-1", "router.z_loss_weight", "below zero"),
    "unknown router option": ("router.bias_stp=1.0", "router.bias_stp", "'bias_step'"),
    "unknown dispatcher": ("moe.dispatch=block", "moe.dispatch", "did you mean 'blocks'?"),
    "wrong type": ("train.steps=many", "train.steps", "must be an integer"),
    "a number as flag": ("data.download=3", "data.download", "True or False"),
    "not finite": ("optim.learning_rate=1e999", "optim.learning_rate", "finite"),
    "top-k above experts": ("moe.top_k=5", "moe.top_k = 5", "moe.num_experts = 4"),
    "groups": ("router.num_groups=3", "router.num_groups = 3", "choose a divisor"),
    "heads": ("model.attention.num_heads=3", "model.attention.num_heads = 3", "choose a divisor"),
    "kv heads": ("model.attention.num_kv_heads=4", "num_kv_heads = 4", "choose a divisor"),
    "batch over mesh": ("mesh.data=3", "train.batch_size = 8", "choose a multiple"),
    "micro-batches": ("train.micro_batches=3", "train.micro_batches = 3", "choose a divisor"),
    "experts over mesh": ("mesh.expert=8", "mesh.expert = 8", "moe.num_experts = 4"),
    "mesh above devices": ("mesh.tensor=16", "mesh", "there are 8"),
    "missing corpus": ("data.path=/no/such/corpus", "data.path", "/no/such/corpus"),
    "missing tokenizer": ("data.tokenizer=/no/tokenizer.json", "data.tokenizer", "/no/tokenizer"),
    "vocabulary too small": ("model.vocab_size=100", "model.vocab_size", "257"),
    "budget below zero": ("budget.max_dollars=-1.0", "budget.max_dollars = -1.0", "above zero"),
    "price below zero": ("cost.price=-2.0", "cost.price = -2.0", "0 or above"),
    "unknown hardware": ("cost.hardware=h100", "cost.hardware = 'h100'", "h100_sxm"),
    "unknown region": ("cost.region=frnace", "cost.region", "france"),
    "no value": ("train.steps", "--config.train.steps", "--config.FIELD=VALUE"),
    "value as block": ("model.vocab_size.x=3", "model.vocab_size", "is a value"),
    "seed below zero": ("seed=-1", "seed = -1", "from 0 to below 2**32"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"))


def one_line(capsys) -> str:
    """What stands on standard error: exactly one line, and no traceback."""
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_writes_nothing(name, config, tmp_path, capsys):
    setting, field, remedy = BAD_SETTINGS[name]
    assert train(config, tmp_path / "run", setting) == 2
    line = one_line(capsys)
    assert field in line and remedy in line
    assert not (tmp_path / "run").exists()


CORPORA = {
    "empty file": (b"", "corpus.txt': holds no text"),
    "binary file": (bytes(range(256)) * 20, "corpus.txt': is binary"),
    "shorter than a sequence": (
        b"short",
        "train.seq_len = 32: the training text has only 5 tokens",
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_a_bad_corpus_is_named(name, config, tmp_path, capsys):
    content, reason = CORPORA[name]
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    assert train(config, tmp_path / "run", f"data.path={corpus}") == 2
    line = one_line(capsys)
    assert reason in line
    assert not (tmp_path / "run").exists()


def test_a_broken_tokenizer_file_is_named(config, tmp_path, capsys):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text('{"model": {"type": "BPE"')
    assert train(config, tmp_path / "run", f"data.tokenizer={tokenizer}") == 2
    assert str(tokenizer) in one_line(capsys)


def test_a_workdir_with_something_else_in_it_is_refused(config, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("my only copy")
    assert train(config, tmp_path) == 2
    assert "new or an empty folder" in one_line(capsys)
    assert (tmp_path / "thesis.txt").read_text() == "my only copy"


def test_a_workdir_that_is_a_file_is_refused(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(config, tmp_path / "file" / "run") == 2
    assert "is a file" in one_line(capsys)


def test_a_workdir_that_cannot_be_written_is_refused(config, capsys):
    # Root may write anywhere on a writable disk, so the kernel's own folder has to serve.
    assert train(config, pathlib.Path("/proc/run")) == 2
    assert "cannot be written" in one_line(capsys)


CONFIG_FILES = {
    "missing": (None, "no such file"),
    "syntax": ("def get_config(:\n", "SyntaxError at line 1"),
    "no function": ("x = 1\n", "no get_config()"),
    "raises": ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError at line 2"),
    "a dictionary": ("def get_config():\n    return {}\n", "ConfigDict"),
    "no blocks": (
        "import ml_collections as m\ndef get_config():\n    return m.ConfigDict({})\n", "model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_bad_config_file_is_one_line(name, tmp_path, capsys):
    text, reason = CONFIG_FILES[name]
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    assert train(path, tmp_path / "run") == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_usage_errors_exit_with_2(capsys):
    for arguments in ([], ["trian"], ["train"], ["train", "--config.seed=1"], ["ledger"]):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        assert exit_info.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


COMMANDS = (
    "train", "plan", "ledger", "tokenize", "generate", "bench", "import", "export", "evaluate",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, "--help"])
    assert exit_info.value.code == 0
    assert "usage: moejax" in capsys.readouterr().out


PLAN_FIELDS = [
    "params.total",
    "params.active.no_embedding",
    "params.active.with_head",
    "params.mtp",
    "params.active.with_embeddings",
    "flops_per_token.train",
    "flops_per_token.forward",
    "flops_per_token.train_full_attention",
    "kv_cache_bytes_per_token",
    "train_flops",
    "mfu",
    "peak_flops",
    "device_hours",
    "wall_days",
    "dollars.rental",
    "dollars.owned",
    "energy_kwh",
    "co2_kg",
    "memory_bytes_per_device",
]


def json_of(capsys, arguments: list[str]) -> dict:
    assert cli.main([*arguments, "--format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_of_a_config_has_the_contracts_fields(config, capsys):
    plan = json_of(capsys, ["plan", f"--config={config}", "--hardware=h100_sxm", "--devices=4"])
    for name in PLAN_FIELDS:
        value = plan
        for part in name.split("."):
            value = value[part]
    assert plan["devices"] == 4 and plan["hardware"] == "h100_sxm"
    assert plan["tokens"] == 6 * 8 * 32


def test_plan_of_a_published_model(capsys):
    flags = ["--model=mixtral_8x7b", "--tokens=1e12", "--mfu=0.4", "--price=2.0"]
    plan = json_of(capsys, ["plan", *flags])
    # Mistral AI's 46.7B, 12.9B active; dollars = FLOPs / (989.4e12 x 0.4) / 3600 x 2.
    assert plan["params"]["total"] == pytest.approx(46.70e9, rel=0.005)
    hours = plan["train_flops"] / (989.4e12 * 0.4) / 3600
    assert plan["dollars"]["rental"] == pytest.approx(2.0 * hours, rel=1e-6)


def test_plan_of_a_hugging_face_config(tmp_path, capsys):
    values = dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        num_local_experts=8, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e6,
        tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    flags = ["--tokens=1e12", "--mfu=0.4", "--price=2.0"]
    plan = json_of(capsys, ["plan", f"--hf-config={tmp_path / 'config.json'}", *flags])
    assert plan == json_of(capsys, ["plan", "--model=mixtral_8x7b", *flags])


BAD_PLANS = {
    "neither": ([], "--model"),
    "unknown model": (["--model=mixtral_8x7", "--tokens=1e9"], "mixtral_8x7b"),
    "no tokens": (["--model=mixtral_8x7b"], "--tokens"),
    "negative tokens": (["--model=mixtral_8x7b", "--tokens=-1"], "above zero"),
    "unknown chip": (["--model=mixtral_8x7b", "--tokens=1e9", "--hardware=h100_sx"], "h100_sxm"),
    "not a price": (["--model=mixtral_8x7b", "--tokens=1e9", "--price=nan"], "price"),
    "two models": (["--model=mixtral_8x7b", "--hf-config=config.json"], "either"),
    "no config.json": (["--hf-config=/no/config.json", "--tokens=1e9"], "/no/config.json"),
    "utilisation": (["--model=mixtral_8x7b", "--tokens=1e9", "--mfu=40"], "mfu"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_a_bad_plan_is_one_line(name, capsys):
    flags, reason = BAD_PLANS[name]
    assert cli.main(["plan", *flags]) == 2
    assert reason in one_line(capsys)


def test_ledger_of_a_folder_without_runs(tmp_path, capsys):
    assert cli.main(["ledger", str(tmp_path)]) == 2
    assert str(tmp_path) in one_line(capsys)


def test_a_ledger_of_a_newer_moejax(tmp_path, capsys):
    """Alone it is a mistake; among others it is named, on standard output too, and not added."""
    write(tmp_path / "new", header(version=99))
    assert cli.main(["ledger", str(tmp_path)]) == 2
    assert "newer moejax" in one_line(capsys)
    write(tmp_path / "old", header(), done(3600.0))
    found = json_of(capsys, ["ledger", str(tmp_path)])
    assert [run["dollars"] for run in found["runs"]] == [3.6]
    assert "newer moejax" in found["unreadable"][0]
    assert cli.main(["ledger", str(tmp_path)]) == 0
    assert "not counted: " in capsys.readouterr().out


LEDGER_FIELDS = [
    "id",
    "status",
    "stage",
    "device",
    "devices",
    "price",
    "seconds",
    "tokens",
    "model_flops",
    "device_hours",
    "dollars",
    "energy_kwh",
    "co2_kg",
    "mfu",
    "goodput",
]


def test_tokenize_train_ledger_and_generate(config, tmp_path, capsys):
    """Shards from a corpus, a run over them, its bill, and text from its checkpoint."""
    shards, workdir = tmp_path / "shards", tmp_path / "run"
    assert cli.main(["tokenize", f"--config={config}", f"--out={shards}"]) == 0
    assert (
        train(config, workdir, "data.source=shards", f"data.path={shards}", "cost.final=True") == 0
    )
    capsys.readouterr()
    bill = json_of(capsys, ["ledger", str(tmp_path)])
    (run,) = bill["runs"]
    assert [name for name in LEDGER_FIELDS if name not in run] == []
    assert {"source", "date"} <= run["price"].keys()
    total = bill["total"]
    assert total["headline"]["dollars"] == total["all_in"]["dollars"] > 0
    for groups in ("by_stage", "by_status"):
        (group,) = total[groups].values()
        assert group["dollars"] == total["all_in"]["dollars"]
    made_of = sum(part["dollars"] for part in total["made_of"].values())
    assert made_of == pytest.approx(total["all_in"]["dollars"])
    parts, difference = run["plan"]["parts"], run["plan"]["difference"]
    assert sum(p["dollars"] for p in parts.values()) == pytest.approx(difference["dollars"])
    arguments = ["generate", f"--workdir={workdir}", "--prompt=the router", "--tokens=8"]
    first, second = json_of(capsys, arguments), json_of(capsys, arguments)
    assert first == second and first["text"].startswith("the router")


def test_tokenize_refuses_a_folder_that_holds_something(config, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert cli.main(["tokenize", f"--config={config}", f"--out={tmp_path}"]) == 2
    assert str(tmp_path) in one_line(capsys)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "flag",
    [
        "--tokens=0", "--temperature=-1", "--seed=-1", "--top-k=-1", "--top-p=0", "--min-p=2",
        "--count=0",
    ],
)  # fmt: skip
def test_generate_checks_its_flags(flag, tmp_path, capsys):
    assert cli.main(["generate", f"--workdir={tmp_path}", flag]) == 2
    assert flag.split("=")[0] in one_line(capsys)


def test_generate_without_a_run(tmp_path, capsys):
    assert cli.main(["generate", f"--workdir={tmp_path}"]) == 2
    assert "no run is there" in one_line(capsys)


TINY = "--shapes=T8-D4-F4-E2-K1"
BAD_BENCHES = {
    "unknown suite": (["--suite=modle"], "--suite = 'modle'", "did you mean 'model'?"),
    "unknown shape": (["--shapes=fine_e31"], "--shapes = 'fine_e31'", "did you mean 'fine_e32'?"),
    "half a shape": (["--shapes=T8-D4"], "--shapes = 'T8-D4'", "write each of T, D, F, E, K"),
    "no shape": (["--shapes=fine_e8,"], "--shapes = 'fine_e8,'", "NAME,NAME"),
    "unknown load": (["--loads=balancd"], "--loads = 'balancd'", "did you mean 'balanced'?"),
    "a model's load": (["--loads=untrained"], "--loads = 'untrained'", "skewed"),
    "unknown dispatcher": (["--dispatch=block"], "--dispatch", "did you mean 'blocks'?"),
    "grouped on a CPU": ([TINY, "--dispatch=grouped"], "moe.dispatch = 'grouped'", "use 'blocks'"),
    "a kernel on a CPU": ([TINY, "--dispatch=grouped:pallas"], "'grouped'", "need a GPU"),
    "grouped model": (["--suite=model", "--dispatch=grouped"], "moe.dispatch", "need a GPU"),
    "unknown type": (["--dtype=float16"], "--dtype = 'float16'", "bfloat16"),
    "unknown peer": (["--against=tranformers"], "--against", "did you mean 'transformers'?"),
    "peer of attention": (["--suite=attention", "--against=transformers"], "--against", "moe"),
    "no time": (["--seconds=0"], "--seconds = 0.0", "above 0"),
    "no rounds": (["--repeats=0"], "--repeats = 0", "from 1"),
    "both": (["--seconds=1", "--repeats=3"], "--repeats = 3", "give one"),
    "seed": (["--seed=-1"], "--seed = -1", "from 0"),
    "parts of a model": (["--suite=model", "--profile"], "--profile", "--suite=moe"),
    "loads to replay": (["--suite=model", "--loads=recorded"], "--trace", "give both"),
    "a trace of a layer": (["--trace=x.json"], "--trace = 'x.json'", "--loads=recorded"),
    "loads of attention": (["--suite=attention", "--loads=worst"], "--loads", "leave"),
    "shapes of ceilings": (["--suite=ceilings", TINY], "--shapes", "leave the flag out"),
    "tuning on a CPU": (["--tune", TINY], "tuning", "this is cpu"),
    "tuning a model": (["--tune", "--suite=model"], "--tune", "by itself"),
}


@pytest.mark.parametrize("name", BAD_BENCHES)
def test_a_bad_benchmark_is_one_line_and_writes_nothing(name, tmp_path, capsys):
    flags, field, remedy = BAD_BENCHES[name]
    assert cli.main(["bench", *flags, f"--output={tmp_path / 'results'}"]) == 2
    line = one_line(capsys)
    assert field in line and remedy in line
    assert not (tmp_path / "results").exists()


def test_a_missing_peer_names_its_extra(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "--suite=model", "--against=transformers"]) == 2
    assert "pip install 'moejax[parity]'" in one_line(capsys)


def test_results_do_not_overwrite_what_is_not_theirs(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("my only copy")
    folders = {
        file: "is a file",
        file / "results": "is a file",
        tmp_path: "no earlier results.json",
        pathlib.Path("/proc/results"): "cannot be written",
    }
    for folder, reason in folders.items():
        assert cli.main(["bench", TINY, f"--output={folder}"]) == 2
        assert reason in one_line(capsys)
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "my only copy"
