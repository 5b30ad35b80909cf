"""The streaming merge against PEFT's own `merge_and_unload` in float32, cast once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    Qwen3MoeConfig,
)

from manta import merge, tensors
from manta.errors import UserError
from tiny import tiny_model

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
ALL = [*SOME, "k_proj", "o_proj", "gate_proj", "up_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of several families, in bfloat16 and several files each."""
    folder = tmp_path_factory.mktemp("bases")
    head = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 96}
    experts = {**head, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    made = {
        "tied": Path(tiny_model(folder / "tied")),
        "untied": Path(tiny_model(folder / "untied", tie_word_embeddings=False, attention_bias=True)),
        "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        "qwen3_moe": Qwen3MoeConfig(**experts),
        "mixtral": MixtralConfig(**head, num_local_experts=4),
    }
    for name, made_as in made.items():
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_pretrained(made_as)
            if isinstance(made_as, Path)
            else AutoModelForCausalLM.from_config(made_as)
        )
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="50KB")
        (folder / name / "model.safetensors").unlink(missing_ok=True)
    return {name: folder / name for name in made}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter_of(base: Path, folder: Path, **settings: Any) -> Path:
    """A LoRA adapter in PEFT's format whose every tensor is far from its beginning."""
    torch.manual_seed(1)
    tuned = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    draw = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=draw) * 0.1
            parameter.data = parameter.data * 0.5 + noise
    tuned.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, output: Path, size: str = "60KB") -> Path:
    output.mkdir()
    merge.merge_adapter(base, adapter, output, size)
    return output


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(1, 33).reshape(2, 16)).logits


KINDS = {
    "plain": ("tied", {"target_modules": ALL}),
    "rslora": ("tied", {"target_modules": SOME, "use_rslora": True}),
    "patterns": ("tied", {"target_modules": SOME, **PATTERNS}),
    "regex": ("tied", {"target_modules": r".*layers\.1\..*(q|up)_proj"}),
    "layers": ("tied", {"target_modules": SOME, "layers_to_transform": [1]}),
    "all-linear": ("untied", {"target_modules": "all-linear"}),
    "dora": ("untied", {"target_modules": ALL, "use_dora": True}),
    "embeddings": ("untied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "dora of embeddings": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "modules_to_save": ("untied", {"target_modules": SOME, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "modules_to_save of tied": ("tied", {"target_modules": SOME, "modules_to_save": ["lm_head"]}),
    "bias all": ("untied", {"target_modules": SOME, "bias": "all"}),
    "bias lora_only": ("untied", {"target_modules": SOME, "bias": "lora_only"}),
    "lora_bias": ("untied", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "Conv1D": ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True}),
    "Conv1D, dora": ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True, "use_dora": True}),
    "fused experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "fused experts, rslora": ("qwen3_moe", {"target_parameters": EXPERTS, "target_modules": [], "use_rslora": True}),
    "fused experts, saved": ("qwen3_moe", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "fused experts, renamed": ("mixtral", {"target_modules": ["v_proj"], "target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_equals_pefts_merge_in_float32_cast_once(bases, tmp_path, kind):
    name, settings = KINDS[kind]
    base = bases[name]
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    tuned = PeftModel.from_pretrained(load(base), adapter)
    wanted, untouched = logits(tuned), logits(load(base))
    reference = tuned.merge_and_unload().state_dict()
    out = merged(base, adapter, tmp_path / "out")
    stored, ours = tensors.read(out), load(out)
    before = tensors.read(base)
    assert {each: stored[each].dtype for each in before} == {each: t.dtype for each, t in before.items()}
    state = ours.state_dict()
    assert state.keys() == reference.keys()
    unequal = [each for each in reference if not torch.equal(state[each], reference[each].bfloat16().float())]
    assert unequal == []
    gap = (logits(ours) - wanted).abs().median()  # not the largest: a rounded router may choose another expert
    assert gap < 0.02 * wanted.abs().max()
    assert (untouched - wanted).abs().median() > 2 * gap
    assert len(list(out.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_is_untied_where_peft_would_change_both_ends(bases, tmp_path, target):
    """PEFT's own merge adds to the shared weight, so that its merged model is not the model that was trained."""
    adapter = adapter_of(bases["tied"], tmp_path / "adapter", target_modules=["q_proj", target])
    tuned = PeftModel.from_pretrained(load(bases["tied"]), adapter)
    wanted = logits(tuned)
    out = merged(bases["tied"], adapter, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    gap = (logits(load(out)) - wanted).abs().max()
    assert gap < 0.05 * wanted.abs().max()
    assert (logits(tuned.merge_and_unload()) - wanted).abs().max() > 5 * gap


def test_a_base_that_was_saved_without_its_head_has_other_names(bases, tmp_path):
    """Files of the base class lack the `model.` prefix; they keep their names."""
    AutoModel.from_pretrained(bases["tied"], dtype=torch.float32).save_pretrained(tmp_path / "headless")
    assert "layers.0.self_attn.q_proj.weight" in tensors.read(tmp_path / "headless")
    adapter = adapter_of(bases["tied"], tmp_path / "adapter", target_modules=ALL)
    out = merged(tmp_path / "headless", adapter, tmp_path / "out")
    assert tensors.read(out).keys() == tensors.read(tmp_path / "headless").keys()
    reference = PeftModel.from_pretrained(load(bases["tied"]), adapter).merge_and_unload().state_dict()
    state = load(out).state_dict()
    assert all(torch.equal(state[name], reference[name]) for name in reference)


def test_an_adapter_in_bfloat16_is_added_in_float32(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = adapter_of(bases["tied"], tmp_path / "adapter", target_modules=SOME)
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    reference = PeftModel.from_pretrained(load(bases["tied"]), adapter).merge_and_unload().state_dict()
    state = load(merged(bases["tied"], adapter, tmp_path / "out")).state_dict()
    assert all(torch.equal(state[name], reference[name].bfloat16().float()) for name in reference)


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("tied", {"target_modules": SOME, "init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ("tied", {"target_modules": SOME, "trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ("tied", {"target_modules": SOME, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "tying"),
        ("tied", {"target_modules": SOME, "lora_bias": True}, "has a bias"),
        ("tied", {"target_modules": SOME, "layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ("tied", {"target_modules": SOME, "alora_invocation_tokens": [1]}, "ALoraLinearVariant"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name_before_a_byte_is_written(bases, tmp_path, name, settings, named):
    adapter = adapter_of(bases[name], tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match=named) as refusal:
        merged(bases[name], adapter, tmp_path / "out")
    assert "--no_merge" in str(refusal.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_other_adapters_and_bases_are_refused(bases, tmp_path):
    from peft import LoHaConfig

    get_peft_model(load(bases["tied"]), LoHaConfig(target_modules=SOME)).save_pretrained(tmp_path / "loha")
    with pytest.raises(UserError, match="peft_type LOHA"):
        merged(bases["tied"], tmp_path / "loha", tmp_path / "one")
    adapter = adapter_of(bases["tied"], tmp_path / "adapter", target_modules=SOME)
    with pytest.raises(UserError, match="does not fit the base"):
        merged(bases["gpt2"], adapter, tmp_path / "two")
    wider = Path(tiny_model(tmp_path / "wider", hidden_size=32))
    with pytest.raises(UserError, match="does not fit the base"):
        merged(wider, adapter, tmp_path / "three")
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match=r"quantized \(gptq\)"):
        merged(wider, adapter, tmp_path / "four")


def test_every_weight_is_cast_to_the_bases_precision_under_the_hubs_names(bases, tmp_path):
    """A checkpoint has the names of the library's parameters: fused experts; the hub's files have each expert."""
    from safetensors.torch import save_file

    for name in ("qwen3_moe", "tied"):
        tuned = {each: tensor + 0.01 for each, tensor in load(bases[name]).state_dict().items()}
        trained = tmp_path / name / "trained"
        trained.mkdir(parents=True)
        save_file(tuned, trained / "model.safetensors")
        (tmp_path / name / "out").mkdir()
        merge.write_full(bases[name], trained, tmp_path / name / "out", "60KB")
        stored = tensors.read(tmp_path / name / "out")
        assert stored.keys() == tensors.read(bases[name]).keys()
        assert {each.dtype for each in stored.values()} == {"BF16"}
        state = load(tmp_path / name / "out").state_dict()
        assert all(torch.equal(state[each], tuned[each].bfloat16().float()) for each in tuned)
    save_file({each: tuned[each] for each in list(tuned)[:-2]}, trained / "model.safetensors")
    with pytest.raises(UserError, match="lacks"):
        merge.write_full(bases[name], trained, tmp_path / name / "out")
