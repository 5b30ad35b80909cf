"""The guide's own entry points to data, for those who call them from a train function of their own.

`manta train` prepares through `prepare.py` instead; both share the same templates, splits and labels.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from manta import manifest
from manta.config import Config, HFDatasetConfig
from manta.data import formats, source
from manta.data.lines import BadRow
from manta.data.source import SPLITS
from manta.data.tokenize import Encoder, fit
from manta.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SFTDataset(Dataset):
    """Rows `{"input": …, "output": …}` of a JSONL file as `input_ids`, `labels` and `attention_mask` lists.

    The input is masked with -100, the output and EOS are trained. Rows whose prompt alone fills `max_seq_length`
    tokens train nothing and are left out; `dropped` counts them.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_length: int):
        with Path(path).open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        encoded = Encoder(tokenizer)([row["input"] for row in rows], [row["output"] for row in rows])
        fitted = [piece for sample in encoded for piece in fit(sample, max_seq_length, "truncate")]
        self.samples = [sample for sample in fitted if sample.trains]
        self.dropped = len(rows) - len(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {
            "input_ids": sample.input_ids,
            "labels": sample.labels,
            "attention_mask": [1] * len(sample.input_ids),
        }


def load_and_prepare_datasets(
    config: HFDatasetConfig,
    dataset_root: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    rank: int,
    seed: int = Config().seed,
) -> tuple[SFTDataset, SFTDataset]:
    """Training and validation data from JSONL files under `dataset_root`; rank 0 writes them, once per config.

    The folder is keyed by data, templates, mapping, split and seed, so that other settings never meet old files, and
    the other ranks wait in a collective instead of polling. All ranks must see `dataset_root`.
    """
    parts = {"data": source.identity(config), "templates": config.model_dump(exclude={"num_proc"}), "seed": seed}
    folder = Path(dataset_root).absolute() / manifest.fingerprint(parts)
    if rank == 0 and manifest.damage(folder) is not None:
        _write_splits(config, folder, seed, parts)
    _barrier()
    return (
        SFTDataset(folder / "training.jsonl", tokenizer, max_seq_length),
        SFTDataset(folder / "validation.jsonl", tokenizer, max_seq_length),
    )


def _write_splits(config: HFDatasetConfig, folder: Path, seed: int, parts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    opened = source.open_source(config, folder / ".source")
    formats.check_templates(opened, "sft")
    splits = source.assign_splits(len(opened), config, seed)
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"{split}.jsonl").open("w", encoding="utf-8")) for split in SPLITS]
        for number, row in enumerate(opened):
            if row is None:
                continue
            if isinstance(row, BadRow):
                raise UserError(f"{opened.rows.where(number)} cannot be used: {row}. Mend it, or leave it out.")
            prompt, answer = formats.render(config, row, "sft")
            if answer.strip():
                line = {"input": prompt, "output": answer, "row": number}
                files[splits[number]].write(json.dumps(line, ensure_ascii=False) + "\n")
    names = [f"{split}.jsonl" for split in SPLITS]
    manifest.close(folder, manifest.digests(folder, names), {"kind": "splits", "made_from": parts})
    shutil.rmtree(folder / ".source", ignore_errors=True)


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
