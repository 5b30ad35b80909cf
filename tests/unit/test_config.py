import json
import subprocess
import sys

import pytest
import yaml
from pydantic import ValidationError

from manta.config import Config
from manta.dataset_config import HFDatasetConfig, LintConfig, template_fields
from manta.errors import ConfigError

GUIDE = {
    "hf_model_id": "Qwen/Qwen3-8B",
    "max_steps": 10000,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 5e-5,
    "min_learning_rate": 1e-6,
    "weight_decay": 0.01,
    "warmup_ratio": 0.03,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch_fused",
    "lora_rank": 32,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "full_ft": False,
    "early_stopping_patience": 3,
    "early_stopping_threshold": 0.001,
    "max_seq_length": 2048,
    "logging_steps": 10,
    "save_steps": 100,
    "eval_steps": 100,
    "save_total_limit": 2,
    "max_eval_samples": 640,
    "seed": 16257,
    "dataloader_num_workers": 4,
    "use_liger_kernel": False,
    "use_wandb": False,
    "results_dir": "results",
    "max_failures": 2,
    "torch_timeout_s": 7200,
    "placement_strategy": "SPREAD",
    "fsdp_cpu_offload": False,
    "trust_remote_code": False,
    "num_workers": None,
    "device": "auto",
    "warmup_steps": None,
    "objective": "sft",
}
GUIDE_DATA = {
    "dataset_name": "cognitivecomputations/dolphin",
    "dataset_config": None,
    "split": "train",
    "train_split_ratio": 0.9,
    "val_test_split_ratio": 0.5,
    "input_template": "### Instruction:\n{instruction}\n### Input:\n{input}\n### Response:\n",
    "output_template": "{output}",
    "field_mapping": {},
    "num_proc": 8,
}

# One other valid value per setting; together they name every setting, so that a new one must take a side.
SHAPING = {
    "metric_for_best": "rougeL",
    "validation_samples": 7,
    "validation_max_tokens": 7,
    "hf_model_id": "Qwen/Qwen3-0.6B",
    "dtype": "bfloat16",
    "use_liger_kernel": True,
    "torch_compile": True,
    "objective": "cpt",
    "max_steps": 9,
    "num_train_epochs": 1.5,
    "max_seq_length": 512,
    "overlong_policy": "drop",
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-7,
    "weight_decay": 0.5,
    "warmup_ratio": 0.5,
    "warmup_steps": 7,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "seed": 1,
    "full_ft": True,
    "lora_rank": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "eval_steps": 7,
    "max_eval_samples": 7,
    "early_stopping_patience": 7,
    "early_stopping_threshold": 0.5,
    "nominal_workers": 3,
    "chat_template": "qwen3",
    "chat_template_kwargs": {"enable_thinking": False},
    "packing": True,
}
SHAPING_DATA = {
    "dataset_name": "other",
    "dataset_config": "subset",
    "split": "test",
    "train_split_ratio": 0.5,
    "val_test_split_ratio": 0.1,
    "input_template": "{input}",
    "output_template": "{answer}",
    "field_mapping": {"input": "context"},
    "format": "template",
    "chat": True,
    "train_on": "last",
    "weight": 0.5,
    "mixture": ({"dataset_name": "other", "weight": 2},),
}
ELSEWHERE = {
    "validation_resources": {"CPU": 2.0},
    "trust_remote_code": True,
    "attn_implementation": "eager",
    "gradient_checkpointing": "none",
    "fused_loss": "off",
    "resume_from_checkpoint": False,
    "stop_at_step": 5,
    "per_device_eval_batch_size": 7,
    "logging_steps": 7,
    "save_steps": 7,
    "save_total_limit": 7,
    "async_save": False,
    "step_copies": "every",
    "spare_workers": False,
    "data_dir": "elsewhere",
    "dataloader_num_workers": 0,
    "device": "cpu",
    "num_workers": 3,
    "resources_per_worker": {"CPU": 2.0},
    "placement_strategy": "PACK",
    "ray_address": "auto",
    "sharding_strategy": "NO_SHARD",
    "fsdp_cpu_offload": True,
    "max_failures": 7,
    "max_node_losses": 7,
    "resize_check_s": 7.0,
    "step_timeout_s": 7,
    "out_of_memory": "stop",
    "non_finite": "skip",
    "torch_timeout_s": 7,
    "results_dir": "elsewhere",
    "run_name": "mine",
    "logging_dir": "elsewhere",
    "report_to": "wandb",
    "use_wandb": True,
    "notify": "env:WEBHOOK",
    "metrics_port": 9464,
    "metrics_host": "0.0.0.0",
    "bad_rows_limit": 0.5,
    "lint": LintConfig(duplicates="off"),
}


def with_data(**settings):
    return Config.from_dict({"hf_dataset_config": settings})


@pytest.mark.parametrize(("name", "value"), GUIDE.items())
def test_the_guides_default_holds(name, value):
    assert getattr(Config(), name) == value


@pytest.mark.parametrize(("name", "value"), GUIDE_DATA.items())
def test_the_guides_default_for_data_holds(name, value):
    assert getattr(Config().hf_dataset_config, name) == value


def test_every_setting_has_one_line_of_help():
    for model in (Config, HFDatasetConfig, LintConfig):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert "\n" not in field.description, name
            assert len(field.description) <= 120, name


def test_every_setting_survives_to_dict_and_from_dict():
    changed = {**SHAPING, **ELSEWHERE, "objective": "sft", "hf_dataset_config": SHAPING_DATA}
    for config in (Config(), Config.from_dict(changed)):
        values = config.to_dict()
        assert Config.from_dict(values) == config
        assert json.loads(json.dumps(values)) == values
        assert yaml.safe_load(config.dump()) == values


def test_the_dumped_yaml_loads_back(tmp_path):
    config = with_data(input_template="Frage: „{input}“\n\t", output_template="\\alpha {output}")
    (tmp_path / "config.yaml").write_text(config.dump(), encoding="utf-8")
    assert Config.load(tmp_path / "config.yaml") == config


def test_from_dict_leaves_its_argument_unaltered():
    values = Config.from_dict({"max_steps": 3, "hf_dataset_config": SHAPING_DATA}).to_dict()
    before = json.dumps(values)
    Config.from_dict(values)
    assert json.dumps(values) == before


def test_a_config_does_not_change_with_the_dict_it_came_from():
    mapping = {"input": "context"}
    config = with_data(field_mapping=mapping)
    mapping["input"] = "other"
    assert config.hf_dataset_config.field_mapping == {"input": "context"}


def test_a_config_is_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.max_steps = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.hf_dataset_config.split = "test"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rte", "learning_rate"),
        ("max-seq-length", "max_seq_length"),
        ("hfdc_split", "hf_dataset_config.split"),
        ("dataset_name", "hf_dataset_config.dataset_name"),
    ],
)
def test_an_unknown_setting_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=rf"Unknown setting {key}. Did you mean {nearest}\?"):
        Config.from_dict({key: 1})


def test_an_unknown_setting_of_the_data_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown setting hf_dataset_config.splt. Did you mean .*split\?"):
        with_data(splt="train")


def test_a_setting_like_none_points_to_the_list():
    with pytest.raises(ConfigError, match=r"Unknown setting qqqq. `manta train --help`"):
        Config.from_dict({"qqqq": 1})


def test_a_setting_that_is_no_word_is_refused():
    with pytest.raises(ConfigError, match="Unknown setting 1"):
        Config.from_dict({1: 2})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("max_steps", "many"),
        ("max_steps", 1.5),
        ("max_steps", None),
        ("learning_rate", 0),
        ("learning_rate", -1e-5),
        ("learning_rate", float("nan")),
        ("weight_decay", float("nan")),
        ("warmup_ratio", 1.01),
        ("lora_dropout", 1.0),
        ("lora_rank", 0),
        ("lora_target_modules", ""),
        ("max_seq_length", 1),
        ("num_train_epochs", 0),
        ("seed", -1),
        ("full_ft", "perhaps"),
        ("dtype", "float16"),
        ("device", "tpu"),
        ("objective", "dpo"),
        ("overlong_policy", "wrap"),
        ("lr_scheduler_type", "polynomial"),
        ("sharding_strategy", "full_shard"),
        ("placement_strategy", "SPREAD_OUT"),
        ("num_workers", 0),
        ("nominal_workers", 0),
        ("resources_per_worker", "{not json"),
        ("resources_per_worker", {"CPU": "many"}),
        ("hf_model_id", ""),
        ("run_name", "../elsewhere"),
        ("run_name", ".hidden"),
        ("run_name", "a/b"),
        ("chat_template_kwargs", "{thinking: no}"),
        ("chat_template_kwargs", ["enable_thinking"]),
        ("packing", "perhaps"),
        ("bad_rows_limit", 1.1),
        ("bad_rows_limit", -0.1),
        ("lint", "off"),
        ("lint", {"duplicate": "off"}),
        ("lint", {"duplicates": "ignore"}),
        ("lint", {"truncated_above": 2}),
        ("hf_dataset_config", None),
        ("hf_dataset_config", "dolphin"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name}"):
        Config.from_dict({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_split_ratio", 0),
        ("train_split_ratio", 1.1),
        ("val_test_split_ratio", -0.1),
        ("val_test_split_ratio", 1.1),
        ("num_proc", 0),
        ("dataset_name", ""),
        ("output_template", ""),
        ("input_template", "{unclosed"),
        ("input_template", "{}"),
        ("input_template", "{0}"),
        ("input_template", "{a.b}"),
        ("input_template", "{a[0]}"),
        ("input_template", "{a!r}"),
        ("input_template", "{a:>9}"),
        ("input_template", "{two words}"),
        ("field_mapping", "{'input': 'context'}"),
        ("field_mapping", '["input"]'),
        ("field_mapping", {"input": 3}),
        ("format", "sharegpt"),
        ("train_on", "first"),
        ("weight", 0),
        ("weight", float("inf")),
        ("mixture", "[a.jsonl]"),
        ("mixture", '{"dataset_name": "a"}'),
        ("mixture", ["a.jsonl"]),
    ],
)
def test_a_wrong_value_of_the_data_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^hf_dataset_config.{name}"):
        with_data(**{name: value})


def test_every_wrong_setting_has_its_own_line():
    with pytest.raises(ConfigError) as raised:
        Config.from_dict({"max_steps": 0, "lora_rank": 0, "hf_dataset_config": {"num_proc": 0}})
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["max_steps", "lora_rank", "hf_dataset_config.num_proc"]


def test_a_learning_rate_below_its_end_is_refused():
    with pytest.raises(ConfigError, match="min_learning_rate 1e-06 is above learning_rate 1e-07"):
        Config.from_dict({"learning_rate": 1e-7})


def test_full_ft_false_in_words_is_false():
    assert Config.from_dict({"full_ft": "False"}).full_ft is False
    assert Config.from_dict({"full_ft": "true"}).full_ft is True


def test_backslash_n_from_a_shell_is_a_newline():
    data = with_data(input_template=r"Q: {q}\n\tA: ", output_template=r"{a}\n").hf_dataset_config
    assert data.input_template == "Q: {q}\n\tA: "
    assert data.output_template == "{a}\n"


def test_the_default_template_holds_real_newlines():
    assert "\\" not in Config().hf_dataset_config.input_template


def test_template_fields_come_in_order_and_doubled_braces_are_text():
    assert template_fields("{{json}} {b} {a} {b}") == ("b", "a", "b")
    assert with_data(output_template='{{"x": {output}}}').hf_dataset_config.output_template == '{{"x": {output}}}'


def test_a_field_mapping_may_be_json():
    assert with_data(field_mapping='{"input": "context"}').hf_dataset_config.field_mapping == {"input": "context"}


def test_a_field_mapping_that_is_not_json_says_how_to_write_it():
    with pytest.raises(ConfigError, match=r"field_mapping: is not JSON .*single quotes, with double quotes within"):
        with_data(field_mapping="input=context")


def test_a_mapping_of_a_field_that_no_template_uses_is_refused():
    with pytest.raises(ConfigError, match=r"field_mapping maps \['inputs'\], which neither template uses"):
        with_data(field_mapping={"inputs": "context"})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"weight": 2}, r"mixture\[1\] has no dataset_name"),
        ({"dataset_name": "b", "train_split_ratio": 0.5}, r"mixture\[1\] sets \['train_split_ratio'\].* in common"),
        ({"dataset_name": "b", "mixture": []}, r"mixture\[1\] sets \['mixture'\]"),
        ({"dataset_name": "b", "weight": -1}, r"mixture\[1\]: weight: .*greater than 0"),
        ({"dataset_name": "b", "wieght": 2}, r"mixture\[1\]: wieght"),
        ({"dataset_name": "b", "input_template": "{a"}, r"mixture\[1\]: input_template"),
        ({"dataset_name": "b", "field_mapping": {"x": "y"}}, r"mixture\[1\]: field_mapping maps \['x'\]"),
    ],
)
def test_a_wrong_part_of_a_mixture_is_named_with_the_reason(part, reason):
    with pytest.raises(ConfigError, match=reason):
        with_data(mixture=[{"dataset_name": "a"}, part])


def test_the_parts_of_a_mixture_share_the_settings_they_do_not_set():
    data = with_data(
        split="all",
        output_template="{answer}",
        mixture='[{"dataset_name": "a", "weight": 2}, {"dataset_name": "b", "split": "dev", "format": "text"}]',
    ).hf_dataset_config
    assert [(part.dataset_name, part.split, part.weight, part.format) for part in data.parts()] == [
        ("a", "all", 2.0, "auto"),
        ("b", "dev", 1.0, "text"),
    ]
    assert [part.output_template for part in data.parts()] == ["{answer}", "{answer}"]
    assert [part.mixture for part in data.parts()] == [(), ()]


def test_a_dataset_alone_is_the_only_part():
    data = with_data(dataset_name="a").hf_dataset_config
    assert data.parts() == [data]


def test_only_templates_and_mappings_of_the_user_count_as_his_own():
    assert not with_data(dataset_name="a", chat=True).hf_dataset_config.has_own_templates()
    assert with_data(input_template="{q}").hf_dataset_config.has_own_templates()
    assert with_data(output_template="{a}").hf_dataset_config.has_own_templates()
    assert with_data(field_mapping={"input": "context"}).hf_dataset_config.has_own_templates()


def test_template_variables_and_lint_levels_may_be_json():
    config = Config.from_dict({"chat_template_kwargs": '{"enable_thinking": false}', "lint": '{"overlap": "error"}'})
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert config.lint == LintConfig(overlap="error")


def test_resources_may_be_json():
    assert Config.from_dict({"resources_per_worker": '{"CPU": 4}'}).resources_per_worker == {"CPU": 4.0}


def test_every_setting_is_on_one_side_of_the_fingerprint():
    assert {*SHAPING, *ELSEWHERE, "hf_dataset_config"} == set(Config.model_fields)
    assert {*SHAPING_DATA, "num_proc"} == set(HFDatasetConfig.model_fields)


@pytest.mark.parametrize("name", SHAPING)
def test_the_fingerprint_follows_a_setting_that_shapes_the_weights(name):
    changed = Config.from_dict({name: SHAPING[name]})
    assert changed.fingerprint() != Config().fingerprint()
    assert [line.split(":")[0] for line in Config().differences(changed)] == [name]


@pytest.mark.parametrize("name", SHAPING_DATA)
def test_the_fingerprint_follows_the_data(name):
    changed = with_data(**{name: SHAPING_DATA[name]})
    assert changed.fingerprint() != Config().fingerprint()
    assert [line.split(":")[0] for line in Config().differences(changed)] == [f"hf_dataset_config.{name}"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_fingerprint_ignores_where_and_on_what_a_run_goes_on(name):
    changed = Config.from_dict({name: ELSEWHERE[name]})
    assert getattr(changed, name) == ELSEWHERE[name] != getattr(Config(), name)
    assert changed.fingerprint() == Config().fingerprint()
    assert Config().differences(changed) == []


def test_the_fingerprint_ignores_how_many_processes_prepare():
    assert with_data(num_proc=1).fingerprint() == Config().fingerprint()


def test_a_difference_shows_both_values():
    assert Config().differences(Config(max_steps=3)) == ["max_steps: 10000 → 3"]


def test_no_validation_rows_or_no_eval_steps_mean_no_evaluation():
    assert Config().evaluates
    assert not Config(eval_steps=0).evaluates
    assert not with_data(train_split_ratio=1.0).evaluates


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "max_steps: 7\n"
        "learning_rate: 2e-4\n"
        "hf_dataset_config:\n"
        "  dataset_name: a.jsonl\n"
        '  input_template: "Q: {q}\\n"\n'
        '  output_template: "{a}"\n'
    )
    return path


def test_a_recipe_gives_its_settings_and_the_defaults(recipe):
    config = Config.load(recipe)
    assert (config.max_steps, config.learning_rate, config.lora_rank) == (7, 2e-4, 32)
    assert config.hf_dataset_config.input_template == "Q: {q}\n"
    assert config.hf_dataset_config.train_split_ratio == 0.9


def test_overrides_win_key_by_key_also_in_the_data(recipe):
    config = Config.load(recipe, {"max_steps": 9, "hf_dataset_config": {"dataset_name": "b.jsonl"}})
    assert (config.max_steps, config.learning_rate) == (9, 2e-4)
    assert config.hf_dataset_config.dataset_name == "b.jsonl"
    assert config.hf_dataset_config.input_template == "Q: {q}\n"
    assert config.hf_dataset_config.output_template == "{a}"


def test_a_setting_of_the_data_needs_no_dataset_name():
    config = with_data(split="test")
    assert config.hf_dataset_config.dataset_name == GUIDE_DATA["dataset_name"]
    assert config.hf_dataset_config.split == "test"


def test_loading_leaves_the_overrides_unaltered(recipe):
    overrides = {"hf_dataset_config": {"dataset_name": "b.jsonl"}}
    Config.load(recipe, overrides)
    assert overrides == {"hf_dataset_config": {"dataset_name": "b.jsonl"}}


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no recipe .*nowhere\.yaml"):
        Config.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"max_steps", b"a: [1,", b"\xff\xfe\x00", b"a: b: c"])
def test_a_recipe_that_is_not_settings_is_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml (must hold|cannot be read)"):
        Config.load(path)


def test_the_config_imports_no_heavy_library():
    heavy = ["torch", "ray", "transformers", "datasets", "peft", "accelerate", "numpy"]
    code = f"import sys, manta.config, manta.manifest, manta.runs; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "meant", "fewest_and_most"),
    [("3", 3, (3, 3)), ("1:4", "1:4", (1, 4)), ("2:2", 2, (2, 2)), (" 1 : 4", None, None), (None, None, None)],
)
def test_workers_are_a_number_or_a_range(given, meant, fewest_and_most):
    if given and meant is None:
        with pytest.raises(ConfigError, match=r"num_workers.*1:4"):
            Config.from_dict({"num_workers": given})
        return
    config = Config.from_dict({"num_workers": given})
    assert config.num_workers == meant and config.worker_range == fewest_and_most
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("wrong", ["0", "0:2", "4:1", "two", "1:", ":2", "1:2:3", -1, 1.5, True])
def test_other_workers_are_refused(wrong):
    with pytest.raises(ConfigError, match="num_workers"):
        Config.from_dict({"num_workers": wrong})


@pytest.mark.parametrize(
    "settings",
    [
        {"results_dir": "s3://user:hunter2@host/runs"},
        {"hf_dataset_config": {"dataset_name": "https://user:hunter2@host/rows.jsonl"}},
        {"hf_dataset_config": {"mixture": [{"dataset_name": "https://user:hunter2@host/rows.jsonl"}]}},
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(settings):
    with pytest.raises(ConfigError, match="holds a password") as caught:
        Config.from_dict(settings)
    assert "hunter2" not in str(caught.value)
