import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from manta import __main__, heap
from manta.cli import config_from_flags, main
from manta.config import Config
from manta.dataset_config import HFDatasetConfig, LintConfig
from manta.errors import ConfigError

VERBS = ("train", "prepare", "plan", "convert", "evaluate", "report", "demo", "serve", "chat", "launch")


def flags(*arguments: str) -> Config:
    """The config that `manta train` makes of these arguments."""
    context = main.commands["train"].make_context("train", list(arguments))
    return config_from_flags(context.params)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_nothing_heavy_and_is_quick(verb):
    program = (
        "import sys\n"
        "from manta.cli import main\n"
        f"try: main({[verb] if verb else []!r} + ['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets') if name in sys.modules])"
    )
    ours, bare = [], []
    for _ in range(4):  # the quickest of four, in turns: other processes may be using the machine
        for seconds, code in ((ours, program), (bare, "import click, pydantic, upath, yaml")):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - start)
            if seconds is ours:
                assert done.stdout.splitlines()[-1] == "[]"
                assert "Usage:" in done.stdout
    assert min(ours) < 8 * min(bare)  # `import torch` alone takes some 20


def test_every_setting_has_a_flag_with_its_help():
    text = CliRunner().invoke(main, ["train", "--help"], terminal_width=400).output
    for name, field in Config.model_fields.items():
        if name != "hf_dataset_config":
            assert f"--{name}" in text
            assert str(field.description)[:30] in text
    for name in HFDatasetConfig.model_fields:
        assert f"--hfdc_{name}" in text


def test_the_guides_flags_work_verbatim():
    config = flags(
        *("--hf_model_id", "meta-llama/Llama-3-8B", "--full_ft"),
        *("--hfdc_dataset_name", "databricks/databricks-dolly-15k"),
        *("--hfdc_input_template", "Q: {instruction}\\n", "--hfdc_output_template", "A: {response}"),
        *("--hfdc_field_mapping", '{"instruction": "instruction", "response": "response"}', "--hfdc_num_proc", "4"),
        *("--per_device_train_batch_size", "1", "--learning_rate", "2e-4"),
    )
    assert config.hf_model_id == "meta-llama/Llama-3-8B" and config.full_ft
    assert config.hf_dataset_config.input_template == "Q: {instruction}\n"
    assert config.hf_dataset_config.field_mapping["response"] == "response"
    assert config.hf_dataset_config.num_proc == 4
    assert (config.per_device_train_batch_size, config.learning_rate) == (1, 2e-4)


def test_settings_that_are_more_than_a_word_are_given_as_json():
    config = flags(
        *("--lint", '{"duplicates": "off", "truncated_above": 0.5}'),
        *("--chat_template_kwargs", '{"enable_thinking": false}'),
        *("--hfdc_mixture", '[{"dataset_name": "a", "weight": 0.5}, {"dataset_name": "b"}]'),
        *("--packing", "--hfdc_chat", "--hfdc_split", "all", "--bad_rows_limit", "0.2"),
    )
    assert config.lint == LintConfig(duplicates="off", truncated_above=0.5)
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert [(part.dataset_name, part.weight, part.split) for part in config.hf_dataset_config.parts()] == [
        ("a", 0.5, "all"),
        ("b", 1.0, "all"),
    ]
    assert config.packing and config.hf_dataset_config.chat
    assert config.bad_rows_limit == 0.2


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--lint", "duplicates=off"), ("--hfdc_mixture", "a.jsonl,b.jsonl"), ("--chat_template_kwargs", "{x: 1}")],
)
def test_a_setting_that_is_not_json_is_refused_by_name(flag, value):
    output = refused("train", flag, value)
    assert flag.removeprefix("--").removeprefix("hfdc_") in output and "is not JSON" in output


def test_a_data_flag_alone_keeps_the_other_data_defaults():
    data = flags("--hfdc_dataset_name", "x/y").hf_dataset_config
    assert data == HFDatasetConfig(dataset_name="x/y")
    assert flags("--hfdc_num_proc", "3").hf_dataset_config == HFDatasetConfig(num_proc=3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--full_ft"], True), (["--full_ft", "True"], True), (["--full_ft", "False"], False), ([], False)],
)
def test_a_switch_takes_a_value_or_none(arguments, expected):
    assert flags(*arguments).full_ft is expected


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 0.01\nmax_steps: 7\nhf_dataset_config: {dataset_name: a/b, split: all}\n")
    config = flags("--config", str(recipe), "--max_steps", "9", "--hfdc_split", "part")
    assert (config.learning_rate, config.max_steps, config.lora_rank) == (0.01, 9, 32)
    assert (config.hf_dataset_config.dataset_name, config.hf_dataset_config.split) == ("a/b", "part")


def test_an_unknown_flag_names_the_nearest():
    assert "--learning_rate" in refused("train", "--learning_rat", "1")
    assert "--hfdc_dataset_name" in refused("train", "--hfdc_dataset_nam", "x")


def test_a_wrong_value_names_the_setting_and_leaves_no_traceback():
    output = refused("train", "--max_steps", "many")
    assert "max_steps" in output and "many" in output and "Traceback" not in output


def test_evaluate_and_convert_take_the_guides_full_ft(tmp_path):
    for verb in ("evaluate", "convert"):
        output = refused(verb, "--full_ft", "--checkpoints_dir", str(tmp_path))
        assert "No run" in output


def test_convert_asks_which_run_is_meant(tmp_path):
    assert "not a run" in refused("convert", "--run", str(tmp_path))


def test_a_script_of_the_guide_passes_its_arguments(monkeypatch, capsys):
    monkeypatch.setenv(heap.TUNABLES, "glibc.malloc.perturb=0")  # or this process begins again
    monkeypatch.setattr(sys, "argv", ["ray_train_sft.py", "--max_steps", "0"])
    with pytest.raises(SystemExit) as stop:
        __main__.main("train")
    assert stop.value.code == 2 and "max_steps" in capsys.readouterr().err


def test_config_errors_are_value_errors():
    with pytest.raises(ConfigError):
        flags("--seed", "-1")
    with pytest.raises(ValueError, match="seed"):
        flags("--seed", "-1")


def test_resume_takes_the_runs_own_settings_and_flags_win(tmp_path):
    from manta.cli import config_from_flags
    from manta.errors import UserError
    from manta.runs import Run, of

    run = Run(tmp_path / "results" / "mine")
    started = Config(learning_rate=1e-3, num_workers="1:4", nominal_workers=4, run_name="mine")
    run.start(started.model_copy(update={"results_dir": "moved/away"}), tmp_path)
    config = config_from_flags({"max_failures": "7", "config": None}, resumed=str(run.path))
    assert of(config).path == run.path
    assert config.learning_rate == 1e-3 and config.num_workers == "1:4" and config.max_failures == 7
    with pytest.raises(UserError, match="not a run"):
        config_from_flags({}, resumed=str(tmp_path))
    with pytest.raises(UserError, match="leave out --config"):
        config_from_flags({"config": "recipe.yaml"}, resumed=str(run.path))
