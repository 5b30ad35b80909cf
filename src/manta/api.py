"""The stages as functions, for Python programs and notebooks: what `manta.prepare`, `train`, `evaluate`, `convert` are.

Nothing here ends the process. What the user can mend is a UserError, a run that failed a TrainingError. Ray is used as
it is found: one that the program initialised stays, else each call starts its own and ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manta import notebook
from manta.errors import InterruptedRunError
from manta.results import Evaluation, TrainResult

if TYPE_CHECKING:
    from manta.config import Config
    from manta.data.prepare import Prepared
    from manta.evaluate import Where
    from manta.generation import Sampling
    from manta.runs import Run
    from manta.scores import Scoring

MAX_SHARD_SIZE = "50GB"


def prepare(config: Config, *, quiet: bool = False) -> Prepared:
    """Split, render and tokenize the data of `config`; at once if that was done before.

    Args:
        config: The run's settings; only those of the data, the tokenizer and the length count.
        quiet: Say nothing.

    Returns:
        The prepared folder. `counts` has rows, samples and tokens of each split, `text(split)` is its readable JSONL,
        `tokenized(split)` the samples: `input_ids` and `labels`, lists of at most `max_seq_length` token ids, with -100
        where nothing is trained.

    Raises:
        UserError: The data is missing, its columns do not fit, or more rows are bad than `bad_rows_limit` allows.
    """
    console = notebook.console(quiet)
    from manta.data.prepare import Prepared
    from manta.preparation import prepare_only

    return Prepared(prepare_only(config, console))


def train(config: Config, *, quiet: bool = False) -> TrainResult:
    """Fine-tune by `config`, from where its run stands, to its end.

    A run is named by `run_name`, or by its settings: the same call after an interrupt or a kill goes on from the last
    checkpoint, and one of a finished run returns its result at once.

    Args:
        config: All settings.
        quiet: Say nothing, and show no bar.

    Returns:
        How it ended: status, best metric, checkpoints, tokens per second.

    Raises:
        UserError: Anything that is wrong before a worker starts: data, model, settings, room, a run in use.
        TrainingError: The workers failed for good; the message says why, and where their logs are.
        KeyboardInterrupt: On Ctrl-C, or a notebook's stop button. The run can be gone on with.
    """
    console = notebook.console(quiet)
    from manta.train import train as run_training

    try:
        return TrainResult.of(run_training(config, console))
    except InterruptedRunError as error:
        raise KeyboardInterrupt(str(error)) from None


def evaluate(
    run: str | Path | Run | TrainResult,
    *,
    test_path: str | Path | None = None,
    checkpoints: Sequence[str] = ("best",),
    max_samples: int = 1024,
    batch_size: int = 128,
    sampling: Sampling | None = None,
    scoring: Scoring | None = None,
    where: Where | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Compare the base model with checkpoints of a run on rows that neither training nor their choice has seen.

    Args:
        run: A run's folder, its URL, or what `train` returned.
        test_path: JSONL with `input` and `output`; by default the test split of the run's own data.
        checkpoints: `best`, `latest`, or steps, such as `"40"`.
        max_samples: Most rows to score.
        batch_size: Rows generated at once.
        sampling: How answers are drawn; by default up to 512 tokens at temperature 0.1.
        scoring: What of an answer is compared, and how.
        where: Engine, device and number of actors.
        quiet: Say nothing.

    Returns:
        Figures of each model, with 95 % intervals. Beside them on disk: every answer, and a page.

    Raises:
        UserError: There is no such run or checkpoint, or nothing to score.
    """
    console = notebook.console(quiet)
    from manta.evaluate import evaluate as run_evaluation

    found = run_evaluation(
        _run(run),
        test_path=test_path,
        checkpoints=checkpoints,
        max_samples=max_samples,
        batch_size=batch_size,
        sampling=sampling,
        scoring=scoring,
        where=where,
        console=console,
    )
    return Evaluation.of(found)


def convert(
    run: str | Path | Run | TrainResult,
    output: str | Path | None = None,
    *,
    checkpoint: str = "best",
    merge: bool = True,
    max_shard_size: str = MAX_SHARD_SIZE,
    verify: bool = True,
) -> Path:
    """Write a run's checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads, with tokenizer and card.

    Args:
        run: A run's folder, its URL, or what `train` returned.
        output: Where to write; by default `export` (or `adapter`) in the run's folder.
        checkpoint: `best`, `latest`, or a step.
        merge: Add a LoRA adapter to the base's weights; False keeps it apart, in PEFT's format.
        max_shard_size: Largest weights file, such as `5GB`.
        verify: Compare logits with the trained model's first, and write nothing where they differ.

    Returns:
        The folder, which appears whole or not at all.

    Raises:
        UserError: There is no such run or checkpoint, it cannot be merged, or `output` holds something else.
        TrainingError: What was made does not compute what was trained.
    """
    from manta import storage
    from manta.convert import Options
    from manta.convert import convert as write

    options = Options(merge=merge, max_shard_size=max_shard_size, verify=verify)
    return write(_run(run), storage.place(output) if output else None, merge, checkpoint, options)


def _run(run: str | Path | Run | TrainResult) -> Run:
    from manta import runs

    if isinstance(run, runs.Run):
        return run
    return runs.open_run(run.run if isinstance(run, TrainResult) else run)
