"""Every setting of Manta, with its default and one line of help.

A leaf of the import graph: neither torch nor ray nor transformers is imported here, so that `manta --help` is quick
and a config can be checked anywhere. Configs are frozen and validated at construction.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from manta.dataset_config import HFDatasetConfig, LintConfig, explain, parse_json, without_password
from manta.errors import ConfigError
from manta.recipe import merged, read_recipe
from manta.references import writable

Metric = Literal["eval_loss", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"]
GENERATED = frozenset(get_args(Metric)) - {"eval_loss"}  # figures of answers
ShardingStrategy = Literal["auto", "FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]


class Config(BaseModel):
    """One run of Manta. `to_dict` and `from_dict` round-trip; the run's folder holds the resolved config."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    # --- Model
    hf_model_id: str = Field("Qwen/Qwen3-8B", min_length=1, description="Base model: hub name or local folder")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute precision; auto: bfloat16 where hardware has it. What is trained stays float32"
    )
    attn_implementation: str = Field(
        "auto", description="auto, documents, sdpa, eager, flash_attention_2; auto: what takes a batch without padding"
    )
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="What backward computes again to save memory: nothing, all but matrix products, all; auto: by need",
    )
    torch_compile: bool = Field(
        False, description="Compile the layers some steps into the run; undone, and said, if it does not pay"
    )
    fused_loss: Literal["auto", "on", "off"] = Field(
        "auto", description="Loss and its gradient without logits of all tokens at once; auto: on CUDA, or with LoRA"
    )
    use_liger_kernel: bool = Field(False, description="Fused Triton kernels of liger-kernel (CUDA only)")

    # --- Training
    objective: Literal["sft", "cpt"] = Field(
        "sft", description="sft: train on outputs; cpt: continual pre-training, every token is a target"
    )
    max_steps: int = Field(10000, ge=1, description="Optimizer steps")
    num_train_epochs: float | None = Field(None, gt=0, description="Passes over the data; if set, replaces max_steps")
    stop_at_step: int | None = Field(
        None, ge=1, description="Save and leave after this step; the same command without it goes on"
    )
    resume_from_checkpoint: bool = Field(
        True, description="Go on from the run's last checkpoint; false: refuse a run that has begun"
    )
    max_seq_length: int = Field(2048, ge=2, description="Longest sample, in tokens")
    overlong_policy: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="Samples over max_seq_length: cut the end, leave out (counted), or stop"
    )
    per_device_train_batch_size: int = Field(2, ge=1, description="Rows of one micro-batch")
    per_device_eval_batch_size: int = Field(2, ge=1, description="Rows of one evaluation batch")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Micro-batches per worker and step")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate")
    min_learning_rate: float = Field(1e-6, ge=0, description="Where the cosine schedule ends")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps that warm up")
    warmup_steps: int | None = Field(None, ge=0, description="Steps that warm up; if set, replaces warmup_ratio")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this norm; 0: never")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning rate after warm-up"
    )
    optim: str = Field("adamw_torch_fused", description="Optimizer, by its transformers name")
    seed: int = Field(16257, ge=0, description="Seed of split, order, initialisation and dropout")

    # --- LoRA
    full_ft: bool = Field(False, description="Train every weight instead of LoRA adapters")
    lora_rank: int = Field(32, ge=1, description="Rank of the adapters")
    lora_alpha: int = Field(32, ge=1, description="Scale: adapters are multiplied by alpha / rank")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="Dropout before the adapters")
    lora_target_modules: str = Field(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        min_length=1,
        description="Modules that get adapters, comma-separated, or all-linear",
    )

    # --- Evaluation, early stopping, checkpoints
    logging_steps: int = Field(10, ge=1, description="Steps between log lines")
    eval_steps: int = Field(100, ge=0, description="Steps between evaluations; 0: never, which ends early stopping too")
    max_eval_samples: int = Field(640, ge=1, description="Most validation rows per evaluation")
    metric_for_best: Metric = Field(
        "eval_loss",
        description="eval_loss, or a figure of answers generated beside training: exact_match, rouge1, rouge2, rougeL, "
        "bleu, chrf",
    )
    validation_samples: int = Field(64, ge=1, description="Validation rows that are answered for such a figure")
    validation_max_tokens: int = Field(128, ge=1, description="Most tokens of one such answer")
    validation_resources: dict[str, float] = Field(
        default_factory=dict, description="JSON: what answering reserves beside the workers; default: what one does"
    )
    early_stopping_patience: int = Field(
        3, ge=0, description="Evaluations without improvement before the end; 0: never"
    )
    early_stopping_threshold: float = Field(
        0.001, ge=0, description="Smallest change of metric_for_best that is improvement"
    )
    save_steps: int = Field(100, ge=1, description="Steps between checkpoints; a best one is saved besides")
    save_total_limit: int = Field(2, ge=1, description="Best checkpoints kept; the newest is kept besides")
    async_save: bool = Field(True, description="Write checkpoints beside training instead of waiting for them")
    step_copies: Literal["auto", "every", "off"] = Field(
        "auto", description="Copy what is trained to two nodes' memory; auto: as often as costs at most 3 %"
    )

    # --- Data
    data_dir: str = Field(
        "prepared",
        min_length=1,
        description="Where prepared data is kept, one folder per fingerprint: a folder or a URL such as s3://bucket/data",
    )
    chat_template: str | None = Field(
        None, description="Jinja file, or a model family such as qwen3; default: the tokenizer's own"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description='JSON: variables of the chat template, such as {"enable_thinking": false}'
    )
    packing: bool = Field(
        False, description="Fill sequences of max_seq_length with whole samples that see only themselves"
    )
    bad_rows_limit: float = Field(
        0.01, ge=0, le=1, description="Share of unreadable rows, which are put aside, that is allowed"
    )
    lint: LintConfig = Field(
        default_factory=LintConfig, description='JSON: finding → error, warning or off, such as {"duplicates": "off"}'
    )
    dataloader_num_workers: int = Field(
        4, ge=0, description="Most loader processes per worker; a worker with one CPU loads in its own process"
    )
    hf_dataset_config: HFDatasetConfig = Field(default_factory=HFDatasetConfig, description="The data (--hfdc_… flags)")

    # --- Ray and FSDP
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if the cluster has GPUs, else cpu")
    num_workers: int | str | None = Field(
        None, description="Training workers, or a range such as 1:4 to use what there is; default: one per GPU, or 1"
    )
    resize_check_s: float = Field(
        30, gt=0, description="With a range of workers: seconds between looks whether there is room for more"
    )
    nominal_workers: int | None = Field(
        None, ge=1, description="Workers that gradient_accumulation_steps counts for; kept from the run's first start"
    )
    resources_per_worker: dict[str, float] = Field(
        default_factory=dict, description='JSON: what a worker reserves, such as {"CPU": 4, "GPU": 1}'
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "SPREAD", description="How Ray places workers on nodes"
    )
    ray_address: str | None = Field(None, description="Ray cluster to join (auto, ip:port); default: one of our own")
    sharding_strategy: ShardingStrategy = Field(
        "auto", description="FSDP: shard all; keep weights gathered; within nodes; DDP. auto: DDP if a frozen base fits"
    )
    fsdp_cpu_offload: bool = Field(False, description="Keep sharded weights in host memory between uses")
    max_failures: int = Field(
        2, ge=0, description="Restarts of the workers after failures since the last new checkpoint"
    )
    max_node_losses: int = Field(100, ge=0, description="Restarts of the workers after lost or preempted nodes")
    step_timeout_s: int = Field(
        1800, ge=0, description="Seconds without progress after which stacks are logged and workers restarted; 0: never"
    )
    out_of_memory: Literal["halve", "stop"] = Field(
        "halve", description="halve: smaller micro-batches and more of them, with the same samples per step; or stop"
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop", description="On a NaN or infinite gradient: stop, or skip that step's update and count it"
    )
    spare_workers: bool = Field(
        True, description="Keep a started process for each worker, about 0.5 GB of memory, for a quick restart"
    )
    torch_timeout_s: int = Field(7200, ge=1, description="Time limit of one collective operation, in seconds")

    # --- Output
    results_dir: str = Field(
        "results", min_length=1, description="Folder of all runs, or its URL, such as s3://bucket/runs"
    )
    run_name: str | None = Field(None, description="Folder of this run in results_dir; default: model and fingerprint")
    logging_dir: str | None = Field(None, description="TensorBoard's folder; default: tensorboard in the run's folder")
    report_to: str = Field("none", min_length=1, description="tensorboard, wandb, mlflow (comma-separated), or none")
    use_wandb: bool = Field(False, description="Same as adding wandb to --report_to")
    notify: str | None = Field(
        None, description="URL or command to tell of the end, a failure or a restart; env:NAME: what NAME holds"
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Port for Prometheus, at the driver; 0: none")
    metrics_host: str = Field("127.0.0.1", min_length=1, description="Address that metrics_port is opened at")

    @field_validator("resources_per_worker", "validation_resources", "chat_template_kwargs", "lint", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        return parse_json(value)

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _check_recomputation(cls, value: Any) -> Any:
        return {"true": "full", "false": "none"}.get(str(value).lower(), value)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_variables(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if wrong := [name for name in variables if not name.isidentifier()]:
            raise ValueError(f"names {wrong}, which no template can use")
        return variables

    _check_places = field_validator("results_dir", "data_dir")(without_password)
    _check_notify = field_validator("notify")(writable)

    @field_validator("run_name")
    @classmethod
    def _check_run_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("may hold letters, digits, '.', '_' and '-', and starts with a letter or digit")
        return name

    @field_validator("num_workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> int | str | None:
        if value is None:
            return None
        fewest, colon, most = str(value).partition(":")
        most = most if colon else fewest
        if isinstance(value, bool) or not (fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most)):
            raise ValueError("must be a whole number from 1, or a range of two such as 1:4")
        return int(most) if int(fewest) == int(most) else f"{int(fewest)}:{int(most)}"

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}; lower it"
            )
        if self.objective == "cpt" and not self.hf_dataset_config.output_template:
            raise ValueError("objective cpt trains on output_template; set it, such as {text}")
        if self.metric_for_best != "eval_loss" and (self.objective == "cpt" or not self.evaluates):
            raise ValueError(
                f"metric_for_best {self.metric_for_best} compares answers with those of a validation split; it needs "
                "objective sft, eval_steps above 0 and hf_dataset_config.train_split_ratio below 1"
            )
        return self

    def micro_batches(self, workers: int) -> int:
        """Of one step, over all workers: fixed by the number that the run first had, or else by `workers`."""
        return self.gradient_accumulation_steps * (self.nominal_workers or workers)

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Fewest and most training workers, if they are set."""
        if self.num_workers is None:
            return None
        fewest, _, most = str(self.num_workers).partition(":")
        return int(fewest), int(most or fewest)

    @property
    def evaluates(self) -> bool:
        """Whether there is a validation split that is looked at during training."""
        return self.eval_steps > 0 and self.hf_dataset_config.train_split_ratio < 1

    def to_dict(self) -> dict[str, Any]:
        """Plain types only: what JSON, YAML and Ray can carry."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Leaves `values` as it is. Raises ConfigError, one line per wrong setting."""
        for keys, model, where in (
            (values, cls, ""),
            (values.get("hf_dataset_config") or {}, HFDatasetConfig, "hf_dataset_config."),
        ):
            if not isinstance(keys, Mapping):
                raise ConfigError(f"{where.rstrip('.')} must be a mapping of settings, not {keys!r}.")
            for key in keys:
                if key not in model.model_fields:
                    raise ConfigError(f"Unknown setting {where}{key}.{did_you_mean(str(key))}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(explain(problem) for problem in error.errors())) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML recipe; `overrides` (same keys, `hf_dataset_config` merged key by key) win over it."""
        return cls.from_dict(merged(read_recipe(path), overrides or {}))

    def dump(self) -> str:
        """YAML that `load` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def fingerprint(self) -> str:
        """16 hex digits over every setting that shapes the trained weights; where and on what it runs is left out."""
        shaping = _shaping(self)
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Config) -> list[str]:
        """Settings that shape the trained weights and differ, as `name: ours → theirs`."""
        ours, theirs = _shaping(self), _shaping(other)
        return [f"{key}: {ours[key]!r} → {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]


# Settings that say where and on what a run goes on, how often it saves, or when it pauses: a run may be resumed with
# others. How often it is evaluated is not among them, since that decides when early stopping ends it.
NOT_SHAPING = frozenset(
    (
        *("resume_from_checkpoint", "stop_at_step", "logging_steps", "save_steps", "save_total_limit"),
        *("async_save", "step_copies", "spare_workers", "fused_loss"),
        *("device", "num_workers", "resources_per_worker", "placement_strategy", "ray_address", "num_proc"),
        *("sharding_strategy", "fsdp_cpu_offload", "gradient_checkpointing", "attn_implementation", "max_failures"),
        *("data_dir", "results_dir", "run_name", "logging_dir", "report_to", "use_wandb", "trust_remote_code"),
        *("dataloader_num_workers", "per_device_eval_batch_size", "torch_timeout_s", "bad_rows_limit", "lint"),
        *("notify", "metrics_port", "metrics_host"),
        *("validation_resources", "resize_check_s", "max_node_losses", "step_timeout_s", "out_of_memory", "non_finite"),
    )
)


def whole_path(name: str) -> str:
    """A local file or folder by its absolute path; any other name, such as one on the hub, as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def did_you_mean(key: str) -> str:
    """` Did you mean …?` for the nearest setting, or a pointer to the list."""
    names = {name: f"hf_dataset_config.{name}" for name in HFDatasetConfig.model_fields}
    names |= {name: name for name in Config.model_fields}
    wanted = key.replace("-", "_").removeprefix("hfdc_").removeprefix("hf_dataset_config.")
    nearest = difflib.get_close_matches(wanted, names, n=1)
    return f" Did you mean {names[nearest[0]]}?" if nearest else " `manta train --help` lists them all."


def _shaping(config: Config) -> dict[str, Any]:
    values = config.to_dict()
    data = {f"hf_dataset_config.{key}": value for key, value in values.pop("hf_dataset_config").items()}
    return {key: value for key, value in (values | data).items() if key.split(".")[-1] not in NOT_SHAPING}
