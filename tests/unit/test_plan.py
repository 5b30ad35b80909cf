"""Plans are made from shapes: the numbers are those of the model and the data, and nothing is loaded or started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from manta import accelerators, architecture, fit, workload
from manta.cli import main
from manta.config import Config
from manta.errors import ConfigError
from manta.plan import RAY, plan
from running import small_config
from tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    small_config(folder)
    return folder


def flags(folder: Path, **settings: Any) -> list[str]:
    given = {
        "hf_model_id": folder / "base",
        "hfdc_dataset_name": folder / "rows.jsonl",
        "hfdc_input_template": "Question: {question}\\nAnswer: ",
        "hfdc_output_template": "{answer}",
        "max_seq_length": 96,
        "device": "cpu",
        "data_dir": folder / "prepared",
        "results_dir": folder / "results",
        **settings,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def planned(folder: Path, *more: str, **settings: Any) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["plan", *flags(folder, **settings), "--json", *more])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_parameters_and_checkpoints_are_the_models_own(folder):
    network = AutoModelForCausalLM.from_pretrained(folder / "base")
    size = sum(each.numel() for each in network.parameters())
    before = files(folder)
    full = planned(folder, full_ft="true", max_steps=20, save_steps=5, save_total_limit=2)
    assert full["parameters"] == full["trainable"] == size
    assert full["disk"]["checkpoint"] == 12 * size and full["disk"]["run"] == 4 * 12 * size
    lora = planned(folder, lora_rank=4, lora_target_modules="q_proj,v_proj", max_steps=20)
    layer = network.model.layers[0].self_attn
    each = sum(4 * (proj.in_features + proj.out_features) for proj in (layer.q_proj, layer.v_proj))
    assert lora["trainable"] == each * network.config.num_hidden_layers
    assert lora["memory"]["adapters"] == 4 * lora["trainable"]
    assert files(folder) == before  # a plan leaves nothing


def test_the_total_is_the_sum_of_its_parts(folder):
    found = planned(folder, dtype="float32")
    assert found["fits"] and not found["remedies"]
    parts = {name: size for name, size in found["memory"].items() if name != "total"}
    assert sum(parts.values()) == found["memory"]["total"] <= found["place"]["room"]
    assert parts["framework"] > 50 * parts["weights"] > 0
    assert found["chosen"]["layout"] == "joined" and found["chosen"]["gradient_checkpointing"] == "none"


def test_steps_and_tokens_come_from_a_sample_and_exactly_from_prepared_data(folder, tmp_path):
    from manta.preparation import prepare_only

    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    sampled = planned(folder, data_dir=tmp_path, **settings)["work"]
    assert sampled["from"] == "sampled"
    config = small_config(folder, data_dir=str(tmp_path), **settings, num_workers=1)
    prepare_only(config)
    work = workload.of(config.model_copy(update={"nominal_workers": 1}))
    lengths = work.lengths
    assert work.source == "prepared" and work.sequences == len(lengths)
    assert work.steps == round(2 * len(lengths) / 4)
    assert work.tokens == pytest.approx(2 * lengths.sum(), rel=0.05)
    assert sampled["mean_tokens"] == pytest.approx(float(lengths.mean()), rel=0.1)  # all rows are in the sample
    assert lengths.mean() <= work.seen <= lengths.max()


def test_data_that_is_elsewhere_is_not_fetched(folder, monkeypatch):
    monkeypatch.setattr(workload.prepare, "locate", lambda config: (workload.Prepared(folder / "none"), {}))
    data = Config().hf_dataset_config.model_copy(update={"dataset_name": "some/where"})
    work = workload.of(Config(max_seq_length=128, hf_dataset_config=data, max_steps=7, nominal_workers=2))
    assert work.source == "assumed" and work.steps == 7
    assert work.tokens_per_step == 2 * 4 * 2 * 128


def test_what_does_not_fit_says_what_would(folder, tmp_path, monkeypatch):
    tiny_model(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    settings = {"full_ft": True, "num_workers": 1, "gradient_checkpointing": "auto", "spare_workers": False}
    config = small_config(
        folder, hf_model_id=str(tmp_path), per_device_train_batch_size=8, max_seq_length=512, **settings
    )
    needed = plan(config)
    assert needed["fits"] and needed["chosen"]["gradient_checkpointing"] == "none"
    parts = needed["memory"]
    monkeypatch.setattr(fit, "free_bytes", lambda placement: RAY + parts["runtime"] + parts["weights"])
    found = plan(config)
    assert found["fits"] is False and found["memory"]["total"] > found["place"]["room"]
    assert found["chosen"]["gradient_checkpointing"] == "full"
    assert found["memory"]["activations"] < parts["activations"]
    changes = {each["change"]: each["needs"] for each in found["remedies"]}
    smaller = changes["--per_device_train_batch_size 1 --gradient_accumulation_steps 16"]
    again = plan(config.model_copy(update={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}))
    assert smaller < found["memory"]["total"] and smaller == pytest.approx(again["memory"]["total"], rel=0.05)
    assert "--max_seq_length 256" in changes
    assert all(needs < found["memory"]["total"] for needs in changes.values())


def test_accelerators_are_compared_by_their_published_figures(folder):
    rows = planned(folder, "--accelerators", "H100,l40s", "--mfu", "0.5")["accelerators"]
    assert [row["name"] for row in rows] == ["H100", "L40S"]
    assert rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"] == pytest.approx(989 / 362, rel=0.01)
    assert all(row["fits"] and row["dtype"] == "bfloat16" for row in rows)
    half = planned(folder, "--accelerators", "H100", "--mfu", "0.25")["accelerators"][0]
    assert half["hours"] == pytest.approx(2 * rows[0]["hours"], rel=0.01)


def test_operations_of_a_token_follow_the_model(folder):
    config = small_config(folder, full_ft=True)
    bare = architecture.skeleton(config)
    text = bare.config
    matrices = sum(each.numel() for each in bare.parameters() if each.ndim == 2)  # tied: the table is the output, too
    attention = text.num_hidden_layers * text.hidden_size * 96
    full = workload.flops_per_token(config, bare, 96, "none")
    assert full == 6 * matrices + 6 * attention
    lora = config.model_copy(update={"full_ft": False})
    assert workload.flops_per_token(lora, bare, 96, "none") == 4 * matrices + 6 * attention
    assert workload.flops_per_token(config, bare, 96, "full") / full == pytest.approx(8 / 6, rel=0.05)


def test_a_device_is_known_by_what_cuda_and_ray_call_it():
    def name(device: str, gib: float) -> str | None:
        found = accelerators.of_device(device, int(gib * 2**30))
        return next((known for known, each in accelerators.ACCELERATORS.items() if each is found), None)

    assert name("NVIDIA H100 80GB HBM3", 79.6) == "H100"
    assert name("NVIDIA A100-SXM4-40GB", 39.4) == "A100-40G"
    assert name("NVIDIA A100-SXM4-80GB", 79.2) == "A100-80G"
    assert name("NVIDIA A10G", 22.5) == "A10G" and name("NVIDIA L4", 22.0) == "L4"
    assert name("NVIDIA L40S", 44.5) == "L40S" and name("Tesla T4", 15) is None
    assert name("NVIDIA H100 PCIe", 79.6) == "H100-PCIe" and name("NVIDIA GeForce RTX 4090", 23.5) == "RTX-4090"
    assert name("A100-80G", 0) == "A100-80G"  # Ray says no memory
    with pytest.raises(ConfigError, match="Did you mean A100-80G"):
        accelerators.find("A100-80")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--accelerators", "H1000"], "Did you mean H100"),
        (["--accelerators", ","], "names none"),
        (["--mfu", "2"], "--mfu"),
        (["--hf_model_id", "./nowhere"], "nowhere"),
        (["--hfdc_dataset_name", "./none.jsonl"], "none.jsonl"),
        (["--hfdc_input_template", "{questio}"], "Did you mean question?"),
        (["--max_seq_length", "4096"], "512 positions"),
        (["--lora_target_modules", "qkv"], "qkv"),
        (["--device", "cuda"], "no GPU"),
        (["--max_steps", "many"], "max_steps"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(folder, more, said):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = files(folder)
    done = CliRunner().invoke(main, ["plan", *flags(folder), *more])
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output
    assert files(folder) == before


def test_the_table_says_what_people_ask(folder):
    done = CliRunner().invoke(main, ["plan", *flags(folder), "--accelerators", "H100"])
    assert done.exit_code == 0, done.output
    for part in ("parameters", "activations", "It fits.", "a sample of the data", "Disk:", "H100", "total"):
        assert part in done.output, done.output
