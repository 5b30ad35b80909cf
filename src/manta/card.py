"""The model card: README.md of a converted folder, with where its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from manta.config import NOT_SHAPING, Config


def write(folder: Path, name: str, lineage: dict[str, Any], config: Config | None) -> None:
    """Write README.md with metadata that the hub accepts: a local base has no name there, so it is left out."""
    from huggingface_hub import ModelCardData

    lora, merged, base = lineage["lora"], lineage["merged"], lineage["base_model"]
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["manta", *(["lora"] if lora else []), *([config.objective] if config else [])],
        datasets=[each for each in _datasets(config) if _on_hub(each)] or None,
        base_model_relation=("finetune" if merged else "adapter") if _on_hub(base) else None,
    )
    how = ("LoRA, merged into the base" if merged else "a LoRA adapter of the base") if lora else "every weight trained"
    lines = [
        f"# {name}",
        f"`{_shown(base)}`, fine-tuned with Manta: {how}.",
        _usage(merged),
        "## Where it comes from",
        _table(_facts(lineage)),
    ]
    if config:
        lines += ["## Settings that shaped it", f"```yaml\n{_settings(config)}```"]
    text = "\n\n".join(lines)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def _facts(lineage: dict[str, Any]) -> dict[str, str]:
    facts = {"Base model": f"`{_shown(lineage['base_model'])}`", "Checkpoint": f"`{lineage['checkpoint']}`"}
    facts |= {f"`{name}` there": f"{value:.6g}" for name, value in lineage["metrics"].items()}
    if lineage.get("data"):
        facts["Data (fingerprint)"] = f"`{lineage['data']}`"
    if checked := lineage.get("verified"):
        facts["Checked against what was trained"] = (
            f"{checked['prompts']} prompts in {checked['computed_in']}: logits differ by "
            f"{checked['difference']:.1e} of the largest ({checked['weights']} is allowed {checked['tolerance']:.0e})"
        )
    facts["Versions"] = ", ".join(f"{name} {number}" for name, number in lineage["versions"].items())
    return facts


def _usage(merged: bool) -> str:
    if merged:
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n'
        )
    else:
        code = (
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n'
        )
    return f'```python\n{code}tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")\n```'


def _table(facts: dict[str, str]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())


def _settings(config: Config) -> str:
    """YAML without what only says where and on what the run was; of local paths, the last part."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items() if key not in NOT_SHAPING and each is not None}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return _shown(value) if isinstance(value, str) else value

    return yaml.safe_dump(plain(config.to_dict()), sort_keys=False, allow_unicode=True)


def _datasets(config: Config | None) -> list[str]:
    return [part.dataset_name for part in config.hf_dataset_config.parts()] if config else []


def _shown(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def _on_hub(name: str) -> bool:
    """Whether `name` can be one of the hub: the config writes local paths in full."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()
