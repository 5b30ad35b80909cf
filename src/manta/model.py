"""The model as each worker builds it. The only room that tells full fine-tuning from LoRA.

What is sharded is so at load: `from_pretrained(distributed_config=…)` makes every parameter a DTensor and each worker
reads only its own shards, so that host memory does not grow with the number of workers.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manta import architecture, attention, diagnosis, lora
from manta.config import Config
from manta.data.batches import Layout
from manta.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model"  # folder of a checkpoint that holds what was trained
_UNSHARDED = "Use --sharding_strategy NO_SHARD or --num_workers 1, and please report the model."


@dataclass(frozen=True)
class Placement:
    """Where this worker stands among the others."""

    device: torch.device
    world_size: int = 1
    nodes: int = 1
    dtype: torch.dtype = torch.float32  # of the forward and backward pass, the same on all


def compute_dtype(config: Config, native: bool, device: str = "cpu") -> torch.dtype:
    """Precision of the forward and backward pass: what was asked for, else bfloat16 where it is `native`.

    Raises UserError if it is asked for on a GPU that only imitates it, many times slower than float32.
    """
    if config.dtype == "bfloat16" and device == "cuda" and not native:
        raise UserError(
            "dtype bfloat16, but a GPU of this run has none (it came with compute capability 8.0, such as A100). "
            "Use --dtype float32, or leave it out: auto takes what the GPU has."
        )
    if config.dtype == "auto":
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def computes_bfloat16(device: str) -> bool:
    """Whether this machine multiplies bfloat16 in hardware: it is slower than float32 where it does not."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def attention_of(config: Config, device: str, bare: Any) -> str:
    """The attention implementation that `auto` stands for, for this model on this device."""
    if config.attn_implementation != "auto":
        return config.attn_implementation
    if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    return attention.DOCUMENTS if attention.serves(bare) else "sdpa"


def usual_layout(implementation: str, config: Config) -> Layout:
    """How samples become a batch, if the attention does what its name says."""
    knows = implementation == attention.DOCUMENTS or implementation.startswith("flash")
    return "joined" if knows else "packed" if config.packing else "padded"


def settle_layout(model: Any, config: Config, placement: Placement) -> Layout:
    """How samples become a batch. All ranks call it.

    An attention that knows documents gets all of a micro-batch in one row without padding. Whether it does know them is
    tried on the model itself; where it does not, `auto` goes back to the library's own and padding. Raises UserError if
    the user asked for what does not work.
    """
    implementation = model.config._attn_implementation
    layout = usual_layout(implementation, config)
    if layout == "padded":
        return layout
    problem = _seen_through(model, config, placement, layout)
    if problem is None:
        return layout
    if config.attn_implementation == "auto":
        base_of(model).set_attn_implementation("sdpa")
        if not config.packing:
            return "padded"
        problem = _seen_through(model, config, placement, "packed")
    if problem is None:
        return "packed"
    raise UserError(problem)


def build(config: Config, placement: Placement, weights: Path | None = None) -> Any:
    """The model to train, sharded over the workers unless NO_SHARD, with LoRA adapters unless `full_ft`.

    `sharding_strategy` is settled (`fit.settle`). `weights` is a checkpoint's folder of trained weights to go on from.
    What is trained is float32; a frozen base has the compute dtype.
    """
    source = weights if weights and config.full_ft else config.hf_model_id
    return adapted(_load_base(config, placement, str(source)), config, placement, weights)


def adapted(base: Any, config: Config, placement: Placement, weights: Path | None = None) -> Any:
    """`base` with what is trained: adapters, new or those of a checkpoint's folder; itself if all of it is."""
    if config.full_ft:
        return base
    from peft import LoraConfig, PeftModel, TaskType, get_peft_model

    if weights:
        return lora.lean(PeftModel.from_pretrained(base, str(weights), is_trainable=True), placement.dtype)
    targets = [name.strip() for name in config.lora_target_modules.split(",")]
    torch.manual_seed(config.seed)  # adapters are made alike on every worker, whatever their number
    adapters = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        bias="none",
    )
    return lora.lean(get_peft_model(base, adapters), placement.dtype)


def autocast(placement: Placement) -> Any:
    """The context in which the model is computed, as the library's Trainer opens it."""
    return torch.autocast(placement.device.type, placement.dtype, enabled=placement.dtype != torch.float32)


def sharding(model: Any) -> dict[str, int]:
    """Of the base model (not its adapters): bytes of all parameters and of those held here, tensors sharded or not."""
    from torch.distributed.tensor import DTensor

    figures = {"total_bytes": 0, "local_bytes": 0, "sharded": 0, "replicated": 0}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        size = parameter.element_size()
        is_sharded = isinstance(parameter.data, DTensor)
        local = parameter.data.to_local() if is_sharded else parameter.data
        figures["total_bytes"] += parameter.numel() * size
        figures["local_bytes"] += local.numel() * size
        figures["sharded" if is_sharded else "replicated"] += 1
    return figures


def assert_sharded(model: Any, config: Config, placement: Placement) -> None:
    """Stop if FSDP was asked for and did not happen: every base parameter is a DTensor, every layer an FSDP unit.

    Some ways to FSDP turn silently into replicas on CPU, and a layer outside any unit is gathered with the whole model.
    Raises UserError, since a restart would not change it.
    """
    if placement.world_size == 1 or config.sharding_strategy == "NO_SHARD":
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    def is_sharded(tensor: torch.Tensor) -> bool:
        return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)

    parameters = {name: each.data for name, each in model.named_parameters() if not is_adapter(name)}
    whole = [name for name, tensor in parameters.items() if not is_sharded(tensor)]
    if whole:
        raise UserError(f"{len(whole)} parameters are not sharded, such as {whole[0]}. {_UNSHARDED}")
    units = layer_names(model)
    if not units:
        raise UserError(f"{config.hf_model_id} does not name its layers (_no_split_modules). {_UNSHARDED}")
    loose = [name for name, module in model.named_modules() if name in units and not isinstance(module, FSDPModule)]
    if loose:
        raise UserError(f"{len(loose)} layers are not FSDP units, such as {loose[0]}. {_UNSHARDED}")


@torch.no_grad()
def _seen_through(model: Any, config: Config, placement: Placement, layout: Layout) -> str | None:
    """What is wrong if a document of a packed sequence is computed otherwise than alone: it sees the one before, or its
    place. None if it is not."""
    from torch.distributed.fsdp import FSDPModule

    before, document = torch.arange(1, 9), torch.arange(9, 1, -1)
    several = layout == "packed" and config.per_device_train_batch_size > 1
    rows = 2 if several else 1

    def last_logits(*documents: torch.Tensor) -> torch.Tensor:
        ids = torch.cat(documents).repeat(rows, 1).to(model.device)
        positions = torch.cat([torch.arange(len(each)) for each in documents]).repeat(rows, 1).to(model.device)
        with autocast(placement):
            found = model(input_ids=ids, position_ids=positions, use_cache=False)
        return found.logits[:, -len(document) :].float()

    was_training = model.training
    model.eval()
    try:
        alone, packed = last_logits(document), last_logits(before, document)
    except TypeError:
        return f"{config.hf_model_id} takes no position_ids, which packing needs. Leave out --packing."
    finally:
        model.train(was_training)
        for module in model.modules():  # without a backward pass, the root's weights stay gathered
            if isinstance(module, FSDPModule):
                module.reshard()
    tolerance = 1e-3 if placement.dtype == torch.float32 else 5e-2
    if float((alone - packed).abs().max()) <= tolerance * float(alone.abs().max()):
        return None
    return (
        f"In {config.hf_model_id} with {model.config._attn_implementation} attention, a packed document sees the one "
        "before it. Leave out --packing, or choose another --attn_implementation"
        f"{', or --per_device_train_batch_size 1' if several else ''}."
    )


def base_of(model: Any) -> Any:
    """The library's own model, without what adapters put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_adapter(name: str) -> bool:
    return "lora_" in name


def _load_base(config: Config, placement: Placement, source: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if config.full_ft else placement.dtype
    bare = architecture.skeleton(config)
    attention.register()
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_of(config, placement.device.type, bare),
        "trust_remote_code": config.trust_remote_code,
    }
    if placement.world_size > 1 and config.sharding_strategy != "NO_SHARD":
        arguments["distributed_config"] = _distributed(config, placement, bare)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **arguments)
    except ImportError as error:  # a package that only some nodes have
        needs = f"{config.hf_model_id} with attn_implementation {arguments['attn_implementation']}"
        raise UserError(
            f"{needs} needs a package that is not on this node: {diagnosis.first_line(error)}. Install it there, or "
            "leave out --attn_implementation."
        ) from error
    model.config.use_cache = False  # of keys and values: of no use in training, and in the way of recomputation
    return model


def _distributed(config: Config, placement: Placement, bare: PreTrainedModel) -> Any:
    from transformers.distributed import DistributedConfig

    replicas = placement.nodes if config.sharding_strategy == "HYBRID_SHARD" else 1
    style = "keep_full_weight" if config.sharding_strategy == "SHARD_GRAD_OP" else "free_full_weight"
    # The library's default plan knows layers by one name only; others would be gathered with the whole model at once.
    layers = {re.sub(r"\.\d+$", ".*", name) for name in layer_names(bare)}
    return DistributedConfig(
        fsdp_size=placement.world_size // replicas,
        dp_replicate_size=replicas,
        fsdp_plan=dict.fromkeys(sorted(layers), style),
        fsdp_cpu_offload=config.fsdp_cpu_offload and placement.device.type != "cpu",  # there already, and unpinnable
        fsdp_mixed_precision=config.full_ft and placement.dtype == torch.bfloat16,
    )


def layer_names(model: Any) -> set[str]:
    """Names of the decoder layers: the modules that their own library says are not to be split."""
    kinds = set(base_of(model)._no_split_modules or ())

    def is_layer(module: torch.nn.Module) -> bool:  # fully_shard puts a class of its own before the layer's
        return any(kind.__name__ in kinds for kind in type(module).__mro__)

    return {name for name, module in model.named_modules() if is_layer(module) and name[-1:].isdigit()}


def has_layers_alike(model: Any) -> bool:
    """Whether the decoder layers are one stack and have the same shapes."""
    names = layer_names(model)
    shapes = {tuple(each.shape for each in model.get_submodule(name).parameters()) for name in names}
    return len(shapes) == 1 and len({name.rpartition(".")[0] for name in names}) == 1


def shorten(model: Any, count: int) -> None:
    """Leave `model`, whose layers are one stack, its first `count`."""
    del model.get_submodule(min(layer_names(model)).rpartition(".")[0])[count:]
